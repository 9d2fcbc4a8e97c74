"""Tensor parallelism: text weights, scores and masses are summed over ranks; the first rank speaks for all."""

from __future__ import annotations

from typing import Any, Callable

import torch
from sglang.srt.runtime_context import get_parallel

from ..attention.grounding import Grounding
from ..attention.state import RequestState
from ..kv.store import UnitStore


def is_first_rank() -> bool:
    """Whether this rank writes what all ranks know alike (traces)."""
    return get_parallel().attn_tp_rank == 0


def rank_query_heads(model_runner: Any) -> int:
    """Query heads of this rank."""
    return model_runner.model_config.num_attention_heads // get_parallel().attn_tp_size


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


def grounding_starter(store: UnitStore, model_runner: Any) -> Callable[[RequestState], Grounding | None]:
    """How a backend starts a request's grounding: with all layers, the whole model's heads, and the sum over ranks."""
    heads, reduce = model_runner.model_config.num_attention_heads, tensor_parallel_sum()
    return lambda state: state.begin_grounding(store.layers, heads, reduce)
