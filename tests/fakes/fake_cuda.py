"""A GPU's memory beside the host's, on a machine without one: tensors that say ``cuda`` and live in main memory.

Code that asks for the device, allocates on it, uploads to it or reads back from it does so as on a GPU, and every
operation passes through one place (:class:`FakeCuda`), where it can be counted. As on a GPU, an operation on tensors
of both memories is refused, but for what torch itself copies (indices, numbers).
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any, Callable
from unittest import mock
from weakref import WeakSet

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from tests.fakes.host_reads import INDEXING

HERE = str(Path(__file__).resolve().parent)
CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
COPIES = {"_to_copy", "copy_"}


class CudaTensor(torch.Tensor):
    """A tensor in the GPU's memory; ``inner`` is where its values really are. Usable under :class:`FakeCuda` only."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "CudaTensor":
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=CUDA,
        )  # fmt: skip
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} on a fake GPU tensor outside of `with FakeCuda():`")

    def __repr__(self, **options: Any) -> str:
        return f"CudaTensor({self.inner})"

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, **options: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")


class Event:
    """``torch.cuda.Event`` where all work is done at once."""

    def __init__(self, device: "FakeCuda", **options: Any) -> None:
        self._device = device

    def record(self, stream: Any = None) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        self._device.waits_for_event()


class FakeCuda(TorchDispatchMode):
    """``with FakeCuda():`` there is a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self._pinned: WeakSet[torch.Tensor] = WeakSet()
        self._patches = ExitStack()

    def ran(self, name: str, args: tuple, kwargs: dict, out: Any) -> None:
        """An operation of that name ran with these arguments; called for host tensors too."""

    def waits_for_event(self) -> None:
        """The host waits until the GPU has come to an event."""

    def waits_for_device(self, device: Any = None) -> None:
        """The host waits until the GPU is done with everything."""

    def __enter__(self) -> "FakeCuda":
        torch._C._ensureCUDADeviceGuardSet()  # torch asks for the current device; a guard that does nothing answers
        for name, value in (
            ("_lazy_init", lambda: None),
            ("Event", lambda **options: Event(self, **options)),
            ("synchronize", self.waits_for_device),
        ):
            self._patches.enter_context(mock.patch.object(torch.cuda, name, value))
        self._patches.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(.., device=) uploads through an operation seen here
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patches.close()

    def pinned(self, tensor: torch.Tensor) -> bool:
        """Whether a host tensor is page-locked."""
        return any(tensor is one or tensor._base is one for one in self._pinned)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func._schema.name.removeprefix("aten::"), dict(kwargs or {})
        if name == "is_pinned":
            return self.pinned(args[0])
        out = self._run(func, name, args, kwargs)
        self.ran(name, args, kwargs, out)
        return out

    def _run(self, func: Callable, name: str, args: tuple, kwargs: dict) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        outer = {id(tensor.inner): tensor for tensor in given if isinstance(tensor, CudaTensor)}
        _refuse_mixed(name, given)
        real = dict(kwargs, device=CPU) if kwargs.get("device") is not None else dict(kwargs)
        pin = bool(real.pop("pin_memory", False)) or name == "_pin_memory"
        inner_args, inner_kwargs = tree_map(_inner, (args, real))
        out = inner_args[0].clone() if name == "_pin_memory" else func(*inner_args, **inner_kwargs)
        if pin or (name == "_to_copy" and outer and kwargs.get("non_blocking")):  # torch pins what it copies down to
            self._pinned.add(out)
        if not _lies_on_gpu(outer, kwargs):
            return out
        return tree_map(lambda one: _outer(one, outer), out)


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, CudaTensor) else value


def _outer(value: Any, outer: dict[int, CudaTensor]) -> Any:
    """The tensor itself where an operation returned its argument."""
    if not isinstance(value, torch.Tensor):
        return value
    found = outer.get(id(value))
    return CudaTensor(value) if found is None else found


def _lies_on_gpu(outer: dict, kwargs: dict) -> bool:
    device = kwargs.get("device")
    return bool(outer) if device is None else torch.device(device).type == "cuda"


def _refuse_mixed(name: str, given: list[torch.Tensor]) -> None:
    if name in COPIES | INDEXING:
        return
    where = {isinstance(tensor, CudaTensor) for tensor in given if isinstance(tensor, CudaTensor) or tensor.dim()}
    if len(where) > 1:
        raise RuntimeError(f"{name}: Expected all tensors to be on the same device, found cuda:0 and cpu")


def on_gpu(tensor: torch.Tensor) -> CudaTensor:
    """``tensor`` in the GPU's memory; what is written to either is seen in both."""
    return CudaTensor(tensor)


def values(tensor: torch.Tensor) -> torch.Tensor:
    """What is in it, without going through any device."""
    return tensor.inner if isinstance(tensor, CudaTensor) else tensor
