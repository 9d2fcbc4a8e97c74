"""What a GPU would have to do for a piece of code: kernel launches, copies between memories, waits of the host.

>>> with Launches() as seen:
...     scores = on_gpu(torch.rand(3)) * 2
...     best = scores.max().item()
>>> seen.kernels, seen.to_device, seen.to_host, [wait.split(" at ")[0] for wait in seen.waits]
(2, 0, 1, ['_local_scalar_dense'])

The code runs on the tensors of :mod:`tests.fakes.fake_cuda`. An operation of torch counts as one launch unless it
only allocates or makes a view (torch may launch more). Of an operation of ``tgvkv_kernels`` what its ``launch.py``
launches is counted, without Triton running it, and its reference computes the values.
"""

from __future__ import annotations

import functools
import inspect
import pkgutil
import sys
from collections import Counter
from contextlib import contextmanager
from importlib import import_module
from typing import Any, Callable, Iterator
from unittest import mock

import tgvkv_kernels
import torch
from torch.utils._pytree import tree_leaves

from tests.fakes.fake_cuda import ALLOCATIONS, COPIES, HERE, CudaTensor, FakeCuda, on_gpu, values
from tests.fakes.host_reads import INDEXING, NUMBERS, reads_back

__all__ = ["Launches", "on_gpu", "values"]

NO_KERNEL = ALLOCATIONS | {"lift_fresh", "record_stream", "_pin_memory", "_unsafe_view"}


class Launches(FakeCuda):
    """Counts while it is entered.

    Attributes:
        launches: kernel launches by name, of torch and of ours.
        to_device, to_host: copies between the memories.
        waits: where the host waits for the GPU, each as ``operation at file:line``. A copy from or to pageable memory
            is one, and so is a selection by a mask: the size of its result must be known.
        event_waits: the same for events; these are waited for where the work is known to be over.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.to_device = self.to_host = 0
        self.waits: list[str] = []
        self.event_waits: list[str] = []
        self._paused = self._capturing = False

    @property
    def kernels(self) -> int:
        return self.launches.total()

    def __enter__(self) -> "Launches":
        super().__enter__()
        stand_ins = {entry: self._counted(entry) for entry in entries()}
        _replace(stand_ins)
        self._patches.callback(_replace, {stand_in: entry for entry, stand_in in stand_ins.items()})
        for kernel in _kernel_types():
            self._patches.enter_context(mock.patch.object(kernel, "run", self._kernel_run))
        return self

    # -- what is counted -----------------------------------------------------------------------------------------

    def ran(self, name: str, args: tuple, kwargs: dict, out: Any) -> None:
        if self._paused:
            return
        if name == "_pin_memory":
            self._not_in_capture(name)
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        used = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if not any(isinstance(tensor, CudaTensor) for tensor in (*made, *used)):
            return
        if name in COPIES:
            self._copied(name, args, kwargs, out)
            return
        if name in INDEXING:
            self._host_indices(name, args)
        if name in NUMBERS:
            self.to_host += 1
        elif name not in NO_KERNEL and name not in _views():
            self._launched(name, made)
        if reads_back(name, args, kwargs):
            self._waited(name)

    def waits_for_event(self) -> None:
        self._not_in_capture("Event.synchronize")
        self.event_waits.append(f"Event.synchronize at {_caller()}")

    def waits_for_device(self, device: Any = None) -> None:
        self._waited("torch.cuda.synchronize")

    def _launched(self, name: str, made: list[torch.Tensor]) -> None:
        if not made or any(tensor.numel() for tensor in made):  # nothing is launched over nothing
            self.launches[name] += 1

    def _waited(self, name: str) -> None:
        self._not_in_capture(name)
        self.waits.append(f"{name} at {_caller()}")

    def _copied(self, name: str, args: tuple, kwargs: dict, out: torch.Tensor) -> None:
        target, source = (args[0], args[1]) if name == "copy_" else (out, args[0])
        asked = kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
        up, down = (isinstance(tensor, CudaTensor) for tensor in (target, source))
        if up and down:
            self._launched(name, [target])
            return
        self.to_device, self.to_host = self.to_device + up, self.to_host + down
        if not (asked and self.pinned(source if up else target)):
            self._waited(name)
        self._not_in_capture(name)

    def _host_indices(self, name: str, args: tuple) -> None:
        """An index of the host is copied."""
        for index in args[1]:
            if index is not None and not isinstance(index, CudaTensor):
                self.to_device += 1
                self._waited(name)

    # -- our kernels ---------------------------------------------------------------------------------------------

    def _counted(self, entry: Callable) -> Callable:
        """Launches are counted and not run; then the reference computes, in silence."""

        @functools.wraps(entry)
        def call(*args: Any, **options: Any) -> Any:
            if not any(isinstance(leaf, CudaTensor) for leaf in tree_leaves((args, options))):
                return entry(*args, **options)
            entry(*args, **{**options, "backend": "triton"})
            with self._silence():
                return entry(*args, **{**options, "backend": "reference"})

        return call

    @property
    def _kernel_run(self) -> Callable:
        def run(kernel: Any, *args: Any, **options: Any) -> None:
            if not self._paused:
                self.launches[kernel.fn.__name__] += 1

        return run

    @contextmanager
    def _silence(self) -> Iterator[None]:
        self._paused, before = True, self._paused
        try:
            yield
        finally:
            self._paused = before

    # -- capture -------------------------------------------------------------------------------------------------

    @contextmanager
    def capture(self) -> Iterator[None]:
        """What a CUDA graph cannot capture raises RuntimeError: waits, copies between the memories, pinning."""
        self._capturing = True
        try:
            yield
        finally:
            self._capturing = False

    def _not_in_capture(self, name: str) -> None:
        if self._capturing:
            raise RuntimeError(f"{name} at {_caller()}: a CUDA graph cannot be captured around it")


@functools.cache
def entries() -> frozenset[Callable]:
    """The functions of ``tgvkv_kernels`` that choose between Triton and their reference."""
    found = set()
    for module in pkgutil.walk_packages(tgvkv_kernels.__path__, "tgvkv_kernels."):
        if module.name.endswith(".api"):
            functions = inspect.getmembers(import_module(module.name), inspect.isfunction)
            found |= {one for _, one in functions if "backend" in inspect.signature(one).parameters}
    return frozenset(found - {_dispatch()})


def _dispatch() -> Callable:
    return import_module("tgvkv_kernels.common.dispatch").use_triton


def _replace(functions: dict[Callable, Callable]) -> None:
    """In every place of ours that holds one of them: callers have imported them by name, some of them just now."""
    for module in [module for name, module in sys.modules.items() if name.startswith(("tgvkv", "tests."))]:
        for name, value in list(vars(module).items()):
            if inspect.isfunction(value) and value in functions:
                setattr(module, name, functions[value])


def _kernel_types() -> list[type]:
    """What a Triton kernel is where it is compiled, and where it is interpreted."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    return [JITFunction, InterpretedFunction]


@functools.cache
def _views() -> frozenset[str]:
    """Operations of torch all of whose results share memory with an argument and write nothing."""
    names = set()
    for schema in torch._C._jit_get_all_schemas():
        results = [result.alias_info for result in schema.returns]
        if results and all(alias is not None and not alias.is_write for alias in results):
            names.add(schema.name.removeprefix("aten::"))
    return frozenset(names)


def _caller() -> str:
    """The innermost frame that is neither torch's nor this folder's."""
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if "/torch/" not in path and not path.startswith(HERE):
            return f"{'/'.join(path.split('/')[-2:])}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"
