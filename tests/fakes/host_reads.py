"""Which of torch's operations make the host wait for a GPU, because it needs their result or its size."""

from __future__ import annotations

from typing import Any, Callable

import torch
from torch.overrides import TorchFunctionMode

NUMBERS = {"_local_scalar_dense", "item", "is_nonzero"}
"""One number is copied to the host."""
RESULTS = {"equal", "nonzero", "masked_select", "unique_dim", "_unique", "_unique2", "unique_consecutive", "bincount"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}


def reads_back(name: str, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether the operation of that name (without ``aten::``) waits, called like that on tensors of a GPU."""
    if name in INDEXING:  # a mask: the number of hits, unless one number is written
        masked = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        return masked and (name == "index" or args[2].numel() != 1)
    if name == "repeat_interleave":
        return kwargs.get("output_size") is None
    return name in NUMBERS | RESULTS


class NoHostCalls(TorchFunctionMode):
    """Refuses calls that lead between host and GPU, where all tensors are of one memory and no operation shows it.

    Args:
        allowed: whether they are, at the moment.
    """

    REFUSED = {torch.Tensor.cpu, torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.item, torch.Tensor.pin_memory}
    MADE_ON_HOST = {torch.tensor, torch.as_tensor}

    def __init__(self, allowed: Callable[[], bool]) -> None:
        super().__init__()
        self._allowed = allowed

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        uploads = func in self.MADE_ON_HOST and kwargs.get("device") is not None and not torch.is_tensor(args[0])
        if (func in self.REFUSED or uploads) and not self._allowed():
            name = func.__name__
            raise RuntimeError(f"{name} leads between device and host: a CUDA graph cannot be captured around it")
        return func(*args, **kwargs)
