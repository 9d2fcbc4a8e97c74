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


def visibility(queries: int, keys: int, scores: Scores) -> torch.Tensor:
    """Which key each query sees, bool ``[queries, keys]``, the last query aligned with the last key."""
    position = torch.arange(queries)[:, None] + keys - queries
    key = torch.arange(keys)[None]
    visible = torch.ones(queries, keys, dtype=torch.bool)
    if scores.causal:
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
    visible = visibility(q.shape[0], k.shape[0], scores)
    if custom_mask is not None:
        window = Scores(scores.sm_scale, window_left=scores.window_left)
        visible = visibility(q.shape[0], k.shape[0], window) & custom_mask
    group = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(group, dim=1) for x in (k, v))
    logits = torch.einsum("qhd,khd->hqk", q.double(), k) * scores.sm_scale
    if scores.soft_cap > 0:
        logits = scores.soft_cap * torch.tanh(logits / scores.soft_cap)
    logits = logits.masked_fill(~visible, -math.inf)
    blind = ~visible.any(-1)
    highest = logits.max(-1, keepdim=True).values if k.shape[0] else logits.new_zeros(*logits.shape[:-1], 1)
    weights = (logits - highest.masked_fill(blind[:, None], 0)).exp()
    total = weights.sum(-1)
    out = torch.einsum("hqk,khd->qhd", weights / total.masked_fill(blind, 1)[..., None], v)
    lse = (total.log() + highest[..., 0]) / math.log(2)
    return out.masked_fill(blind[:, None, None], 0), lse.masked_fill(blind, EMPTY_LSE).T


def gather_pages(cache: torch.Tensor, pages: torch.Tensor, tokens: int) -> torch.Tensor:
    """The first ``tokens`` entries of ``pages``; nothing else of ``cache`` ``[pages, page_size, ...]`` is read."""
    low, high = (int(x) for x in pages.aminmax()) if pages.numel() else (0, 0)
    if low < 0 or high >= cache.shape[0]:
        raise IndexError(f"page index {low if low < 0 else high} is outside a cache of {cache.shape[0]} pages")
    size = cache.shape[1]
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
