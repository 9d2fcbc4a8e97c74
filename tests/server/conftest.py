"""One live server per configuration, started when the first test asks for it.

``eager`` serves retention 1.0 unless a request says otherwise, so that one server shows both that 1.0 is stock and
what eviction does. ``SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY=2`` and ``SGLANG_CHECK_KV_PAGE_INVARIANTS=1`` are on
in all of them: a slot that is lost or owned twice kills the server and fails the test.
"""

from __future__ import annotations

from pathlib import Path
from typing import Iterator

import pytest

from tests.fakes import gpu_like_env, plugin_env
from tests.oracle.oracle import Oracle, load
from tgvkv_sglang.testing.server import Server, launch

OURS = ("--attention-backend", "tgvkv")
EAGER = (*OURS, "--tgvkv-retention", "1.0", "--tgvkv-reclaim", "eager")
CHUNK = 40
CHUNKED = ("--chunked-prefill-size", str(CHUNK))
PRESSURE = (*OURS, "--tgvkv-retention", "0.1", *CHUNKED)
TOTAL = (*OURS, "--tgvkv-retention", "0.6", "--tgvkv-scope", "total", "--tgvkv-reclaim", "eager", *CHUNKED)
BACKENDS = {
    "torch": ((), None),
    "flashinfer": ((), gpu_like_env()),
    "graphs": ((), gpu_like_env(graphs=True)),
}
FEATURES = (*OURS, "--tgvkv-retention", "0.1", "--dp-size", "2", "--grammar-backend", "llguidance",
            "--constrained-json-disable-any-whitespace", "--enable-priority-scheduling", "--default-priority-value",
            "0", "--max-running-requests", "2")  # fmt: skip
RETRACT = {"SGLANG_TEST_RETRACT": "1"}


def pytest_collection_modifyitems(items):
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.server)


@pytest.fixture(scope="session")
def oracle(model_dir) -> Oracle:
    return load(model_dir, image_backend="pil")


def _serve(model: Path, directory: Path, *flags: str, **options) -> Iterator[Server]:
    with launch(model, directory, *flags, **options) as server:
        yield server


@pytest.fixture(scope="session")
def eager(model_dir, tmp_path_factory) -> Iterator[Server]:
    yield from _serve(model_dir, tmp_path_factory.mktemp("eager"), *EAGER)


@pytest.fixture(scope="module")
def stock(model_dir, tmp_path_factory) -> Iterator[Server]:
    yield from _serve(model_dir, tmp_path_factory.mktemp("stock"), "--attention-backend", "torch_native")


@pytest.fixture(scope="module", params=BACKENDS)
def pressure(request, model_dir, tmp_path_factory) -> Iterator[Server]:
    """The same server on each attention backend: torch; FlashInfer (a stand-in); that in decode graphs."""
    flags, env = BACKENDS[request.param]
    yield from _serve(model_dir, tmp_path_factory.mktemp("pressure"), *PRESSURE, *flags, tokens=1500, env=env)


@pytest.fixture(scope="module")
def quantised(model_dir, tmp_path_factory) -> Iterator[Server]:
    """KV of 8 bits, on FlashInfer (a stand-in) in decode graphs."""
    flags = (*PRESSURE, "--kv-cache-dtype", "fp8_e4m3")
    env = gpu_like_env(graphs=True)
    yield from _serve(model_dir, tmp_path_factory.mktemp("quantised"), *flags, tokens=1500, env=env)


@pytest.fixture(scope="module")
def colliding(model_dir, tmp_path_factory) -> Iterator[Server]:
    """Every two pictures have the same pad id; prefills are chunked, memory is short, requests are retracted."""
    env = {**plugin_env("few_bits"), **RETRACT}
    yield from _serve(model_dir, tmp_path_factory.mktemp("colliding"), *PRESSURE, tokens=1500, env=env)


@pytest.fixture(scope="module")
def total(model_dir, tmp_path_factory) -> Iterator[Server]:
    yield from _serve(model_dir, tmp_path_factory.mktemp("total"), *TOTAL, env=RETRACT)


@pytest.fixture(scope="module")
def tensor_parallel(model_dir, tmp_path_factory) -> Iterator[Server]:
    flags = (*PRESSURE, "--tp-size", "2")
    env = {**RETRACT, "SGLANG_CPU_OMP_THREADS_BIND": "0|1"}
    yield from _serve(model_dir, tmp_path_factory.mktemp("tp"), *flags, tokens=1500, env=env)


@pytest.fixture(scope="module")
def features(model_dir, tmp_path_factory) -> Iterator[Server]:
    """Two data-parallel ranks that run two requests each at most, a grammar backend that a CPU can use, priorities."""
    yield from _serve(model_dir, tmp_path_factory.mktemp("features"), *FEATURES, tokens=3000)


@pytest.fixture(scope="session")
def tgvkv_server(eager) -> Server:
    """Any server of ours, for tests that only need one (examples)."""
    return eager
