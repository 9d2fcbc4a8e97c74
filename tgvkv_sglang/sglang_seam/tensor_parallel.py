"""Tensor parallelism: text weights, scores and masses are reduced over ranks; the first rank speaks for all."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from sglang.srt.runtime_context import get_parallel

from ..selection.policy import Model

if TYPE_CHECKING:
    from sglang.srt.model_executor.model_runner import ModelRunner


def is_first_rank() -> bool:
    """Whether this rank writes what all ranks know alike (traces)."""
    return get_parallel().attn_tp_rank == 0


def model_of(model_runner: ModelRunner) -> Model:
    """The served model as scoring sees it: all layers, the whole model's heads, and reductions over ranks.

    Sums go through the group's own ``all_reduce``, which has its communicator already; it knows no maximum.
    """
    layers, heads = model_runner.token_to_kv_pool.store.layers, model_runner.model_config.num_attention_heads
    group, dtype = get_parallel().attn_tp_group, model_runner.dtype
    if group.world_size == 1:
        return Model(layers, heads, dtype=dtype)

    def largest(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.contiguous()
        torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX, group.device_group)
        return tensor

    return Model(layers, heads, lambda tensor: group.all_reduce(tensor.contiguous()), largest, group.world_size, dtype)
