"""Our Triton kernels in a CPU server: every operation runs its launches, in Triton's interpreter."""

from __future__ import annotations

import sys
from typing import Any

from tests.fakes.launches import entries


def use_interpreter(backend: str, device: Any) -> bool:
    """Stands in for ``use_triton``: what runs on a GPU by itself runs in the interpreter on the CPU."""
    from tgvkv_kernels.common import dispatch

    return dispatch.use_triton("triton" if backend == "auto" else backend, device)


def install() -> None:
    """In this process, which was started with TRITON_INTERPRET=1; the log tells of each kernel when it first ran."""
    from triton.runtime.interpreter import InterpretedFunction

    for entry in entries():
        sys.modules[entry.__module__].use_triton = use_interpreter
    run, seen = InterpretedFunction.run, set()

    def telling(kernel: Any, *args: Any, **kwargs: Any) -> Any:
        if kernel.fn.__name__ not in seen:
            seen.add(kernel.fn.__name__)
            print(f"gpu_like: the interpreter runs {kernel.fn.__name__}", flush=True)
        return run(kernel, *args, **kwargs)

    InterpretedFunction.run = telling
