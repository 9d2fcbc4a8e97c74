"""Two worker processes for the kernel tests: Triton's interpreter, and Triton's compiler.

Triton reads TRITON_INTERPRET once, when it is imported, and other test folders need it unset. So the variable is set in
a spawned worker only, never in the test process.
"""

import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
for folder in (ROOT / "triton_kernels", ROOT):  # the workers inherit the path
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from tests.kernels import kernel_workers  # noqa: E402 - needs the path above


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in Path(item.fspath).parents:
            item.add_marker(pytest.mark.kernels)


def _worker(initializer):
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=initializer) as pool:
        yield lambda function, *args, **kwargs: pool.submit(function, *args, **kwargs).result()


@pytest.fixture(scope="session")
def interpreted():
    """``interpreted(function, *args)`` runs a module-level function where TRITON_INTERPRET=1."""
    yield from _worker(kernel_workers.start_interpreter)


@pytest.fixture
def fresh_compiler():
    """As ``compiler``, in a process that has compiled nothing."""
    yield from _worker(kernel_workers.start_compiler)


@pytest.fixture(scope="session")
def compiler():
    """``compiler(function, *args)`` runs a module-level function where Triton compiles."""
    yield from _worker(kernel_workers.start_compiler)
