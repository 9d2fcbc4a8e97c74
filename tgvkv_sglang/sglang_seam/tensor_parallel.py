"""Tensor parallelism: text weights, scores and masses are summed over ranks; the first rank speaks for all."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from sglang.srt.runtime_context import get_parallel

from ..selection.policy import Model, Reduce

if TYPE_CHECKING:
    from sglang.srt.model_executor.model_runner import ModelRunner


def is_first_rank() -> bool:
    """Whether this rank writes what all ranks know alike (traces)."""
    return get_parallel().attn_tp_rank == 0


def rank_query_heads(model_runner: ModelRunner) -> int:
    """Query heads of this rank."""
    return model_runner.model_config.num_attention_heads // get_parallel().attn_tp_size


def tensor_parallel_sum() -> Reduce | None:
    """A function that sums a tensor over the attention tensor-parallel group; None on one rank."""
    group = get_parallel().attn_tp_group
    if group.world_size == 1:
        return None

    def total(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.contiguous()
        torch.distributed.all_reduce(tensor, group=group.device_group)
        return tensor

    return total


def model_of(model_runner: ModelRunner) -> Model:
    """The served model as scoring sees it: all layers, the whole model's heads, and the sum over ranks."""
    layers, heads = model_runner.token_to_kv_pool.store.layers, model_runner.model_config.num_attention_heads
    total = tensor_parallel_sum()
    return Model(layers, heads) if total is None else Model(layers, heads, total)
