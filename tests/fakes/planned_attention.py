"""Attention of one request over gathered keys, and the checks between ``plan()`` and ``run()`` of the fake wrappers.

Semantics follow FlashInfer 0.6.15.post1: scores are ``sm_scale * q @ k``, soft-capped if asked, queries are aligned
with the *end* of the keys, and log-sum-exp is in base 2. FlashInfer's ``math::inf`` is 5e4: a row that sees no key has
output 0 and log-sum-exp -5e4, not ``-inf`` (``state.cuh``, ``variants.cuh``; merging two such rows stays finite).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

EMPTY_LSE = -5e4  # FlashInfer's -math::inf (data/include/flashinfer/math.cuh)


class StalePlanError(RuntimeError):
    """What the kernel would read differs from what the host planned: silent corruption on a real GPU."""


@dataclass(frozen=True)
class Module:
    """What FlashInfer compiles into the kernel at ``plan()``; a later call cannot turn these on."""

    window: bool
    soft_cap: bool


@dataclass(frozen=True)
class Scores:
    """How scores become weights: softmax scale, soft cap (0: none), causality and left window (-1: none)."""

    sm_scale: float
    soft_cap: float = 0.0
    causal: bool = False
    window_left: int = -1


def visibility(queries: int, keys: int, scores: Scores, custom_mask: torch.Tensor | None) -> torch.Tensor | None:
    """Which key each query sees, bool ``[queries, keys]``, the last query aligned with the last key; None: all."""
    causal = scores.causal and custom_mask is None and queries > 1
    if not causal and scores.window_left < 0:
        return custom_mask
    position = torch.arange(queries)[:, None] + keys - queries
    key = torch.arange(keys)[None]
    visible = torch.ones(queries, keys, dtype=torch.bool) if custom_mask is None else custom_mask.clone()
    if causal:
        visible &= key <= position
    if scores.window_left >= 0:
        visible &= key >= position - scores.window_left
    return visible


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores, custom_mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one request in float64.

    Args:
        q: ``[queries, num_qo_heads, head_dim]``.
        k, v: ``[keys, num_kv_heads, head_dim]``, each for ``num_qo_heads // num_kv_heads`` heads.
        custom_mask: bool ``[queries, keys]``, replaces causality (not the window), as in FlashInfer.

    Returns:
        Output ``[queries, num_qo_heads, head_dim]`` and base-2 log-sum-exp ``[queries, num_qo_heads]``, both float64.
    """
    queries, heads, _ = q.shape
    keys, kv_heads, _ = k.shape
    if not keys:
        return q.new_zeros(queries, heads, v.shape[2]).double(), q.new_full((queries, heads), EMPTY_LSE).double()
    # [kv_heads, group * queries, ...]: every query head beside the others of its group, keys not repeated
    grouped = q.double().view(queries, kv_heads, -1, q.shape[2]).permute(1, 2, 0, 3).flatten(1, 2)
    logits = (grouped @ k.double().permute(1, 2, 0)) * scores.sm_scale
    if scores.soft_cap > 0:
        logits = scores.soft_cap * torch.tanh(logits / scores.soft_cap)
    visible = visibility(queries, keys, scores, custom_mask)
    if visible is not None:
        logits.view(heads, queries, keys).masked_fill_(~visible, -math.inf)
    lse = logits.logsumexp(-1, keepdim=True)
    blind = lse == -math.inf
    out = (logits - lse.masked_fill(blind, 0)).exp() @ v.double().transpose(0, 1)
    out = out.view(heads, queries, -1).transpose(0, 1)
    lse = (lse / math.log(2)).masked_fill(blind, EMPTY_LSE)
    return out, lse.view(heads, queries).T


def gather_pages(cache: torch.Tensor, pages: torch.Tensor, tokens: int) -> torch.Tensor:
    """The first ``tokens`` entries of ``pages``; nothing else of ``cache`` ``[pages, page_size, ...]`` is read."""
    low, high = (int(x) for x in pages.aminmax()) if pages.numel() else (0, 0)
    if low < 0 or high >= cache.shape[0]:
        raise IndexError(f"page index {low if low < 0 else high} is outside a cache of {cache.shape[0]} pages")
    size = cache.shape[1]
    if size == 1:
        return cache[:, 0].index_select(0, pages)
    token = torch.arange(tokens)
    return cache[pages.long()[token // size], token % size]


def check_int32(**tensors: torch.Tensor) -> None:
    """The kernels read these as int32 whatever they are (``CHECK_INPUT_TYPE(..., dl_int32)`` in batch_decode.cu)."""
    for name, tensor in tensors.items():
        if tensor.dtype != torch.int32:
            raise TypeError(f"{name} must be int32, got {tensor.dtype}")


def check_planned(name: str, buffer: torch.Tensor, planned: torch.Tensor) -> list[int]:
    """The values of ``buffer``, which must be those that the host planned with."""
    now, then = buffer.tolist(), planned.tolist()
    if now != then:
        raise StalePlanError(f"{name} is {now} on the device, but the plan was made for {then}; plan() again")
    return now


def check_indptr(name: str, values: list[int], length: int) -> None:
    """An indptr starts at 0 (or later), never falls, and stays within ``length`` entries."""
    if any(a > b for a, b in zip(values, values[1:], strict=False)) or values[0] < 0:
        raise ValueError(f"{name} must not decrease: {values}")
    if values[-1] > length:
        raise IndexError(f"{name} ends at {values[-1]}, beyond {length} entries")


def check_same_buffer(name: str, given: torch.Tensor, buffer: torch.Tensor) -> None:
    """``fast_decode_plan`` copies nothing in CUDA-graph mode: other tensors than the wrapper's buffers are ignored."""
    if given.numel() and given.data_ptr() != buffer.data_ptr():
        raise StalePlanError(
            f"fast_decode_plan ignores {name} in CUDA-graph mode unless it is the wrapper's own buffer; "
            f"write into the buffer and pass that"
        )


def refuse(**unsupported: object) -> None:
    """Options of the real FlashInfer that the fake does not have."""
    asked = {name: value for name, value in unsupported.items() if value is not None and value is not False}
    if asked:
        raise NotImplementedError(f"the fake FlashInfer has no {', '.join(asked)} (got {asked})")
