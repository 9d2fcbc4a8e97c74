"""The one collective of ours: text weights, scores and masses are summed over tensor-parallel ranks."""

from __future__ import annotations

from typing import Callable

import torch


def tensor_parallel_sum() -> Callable[[torch.Tensor], torch.Tensor] | None:
    """A function that sums a tensor over the attention tensor-parallel group; None on one rank."""
    from sglang.srt.runtime_context import get_parallel

    group = get_parallel().attn_tp_group
    if group.world_size == 1:
        return None

    def total(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.contiguous()
        torch.distributed.all_reduce(tensor, group=group.device_group)
        return tensor

    return total
