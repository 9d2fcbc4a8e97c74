"""Hooks that let a server with our backend run on a machine without a GPU."""

from __future__ import annotations

from typing import Any

from ..flags import BACKEND


def support_triton(original: Any, backend: str) -> bool:
    """Our backend supports Triton where CUDA does; the stock gate knows names only."""
    import torch

    if backend == BACKEND:
        return torch.cuda.is_available()
    return original(backend)


def pynccl_init(original: Any, self: Any, group: Any, device: Any, *args: Any, **kwargs: Any) -> None:
    """Without CUDA: the same state that SGLang leaves when the NCCL library is missing (gloo is used instead)."""
    import torch
    import torch.distributed as dist

    if torch.cuda.is_available() or not isinstance(group, dist.ProcessGroup):
        original(self, group, device, *args, **kwargs)
        return
    self.group, self.rank, self.world_size = group, dist.get_rank(group), dist.get_world_size(group)
    self.available, self.disabled = False, True
