"""Tensor parallelism: text weights, scores and masses are summed over ranks; the first rank speaks for all."""

from __future__ import annotations

from typing import Callable

import torch
from sglang.srt.runtime_context import get_parallel


def is_first_rank() -> bool:
    """Whether this rank writes what all ranks know alike (traces)."""
    return get_parallel().attn_tp_rank == 0


def tensor_parallel_sum() -> Callable[[torch.Tensor], torch.Tensor] | None:
    """A function that sums a tensor over the attention tensor-parallel group; None on one rank."""
    group = get_parallel().attn_tp_group
    if group.world_size == 1:
        return None

    def total(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.contiguous()
        torch.distributed.all_reduce(tensor, group=group.device_group)
        return tensor

    return total
