"""Public entries of `batch_scores`."""

import torch

from tgvkv_kernels.batch_scores.plan import ScorePlan
from tgvkv_kernels.batch_scores.reference import (
    batch_peak_scores_reference,
    batch_text_weights_reference,
    batch_vision_scores_reference,
)
from tgvkv_kernels.common.checks import (
    INDEX_DTYPES,
    check_dtype,
    check_flat,
    check_float,
    check_heads,
    check_kernel_float,
    check_same_device,
    check_shape,
    check_storage_dtype,
)
from tgvkv_kernels.common.dispatch import use_triton
from tgvkv_kernels.common.errors import KernelInputError


def batch_text_weights(
    plan: ScorePlan,
    q: torch.Tensor,
    lse_b2: torch.Tensor,
    k_flat: torch.Tensor,
    text_slots: torch.Tensor,
    first_layer: int,
    slots_per_layer: int,
    scale: float,
    *,
    total_q_heads: int | None = None,
    k_scales: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Weight of each text token in each of L layers: ``w_t = (sum_{q>=t} A[q,t]) / #{q>=t}``, ``A`` the mean over
    query heads of ``exp(q.k*scale - lse)`` (TGV-KV, TWR, with the normalisation of the paper's text).

    Tokens of all requests lie one request after the other, in order (``plan.text_lens``), ``T`` in all.

    Args:
        plan: of this batch. q: ``[L, T, Hq, D]`` contiguous, the stash (`tgvkv_kernels.stash_rows`), rotary embedding
            applied. lse_b2: ``[L, T, Hq]`` float32 contiguous, LSE of each query's *whole* attention row, base 2.
        k_flat: ``[layers*slots, Hkv, D]`` flat key storage, dtype of ``q`` or one of `FP8`.
        text_slots: ``[T]`` int32 or int64 slot of each token.
        first_layer, slots_per_layer: the stash holds the storage's layers ``first_layer .. first_layer+L-1``.
        scale: softmax scale.
        total_q_heads: heads of the whole model under tensor parallelism; the mean divides by it, so that the ranks'
            results sum to the weights. Default: ``Hq``.
        k_scales: ``[layers of the storage]`` float32, what each layer's K was divided by when it was stored; None: 1.
        backend: see `tgvkv_kernels.common.dispatch.use_triton`.

    Returns:
        ``[L, T]`` float32. Two launches, whatever the number of layers and requests.

    Raises:
        KernelInputError: shapes, dtypes, heads, layers or devices that do not fit.
    """
    heads = _check(plan, q, lse_b2, k_flat, text_slots, first_layer, slots_per_layer, total_q_heads, k_scales)
    check_shape("text_slots", text_slots, (q.shape[1],))
    if not use_triton(backend, q.device):
        layers = _layers(q, first_layer, slots_per_layer, scale, k_scales)
        return batch_text_weights_reference(plan, q, lse_b2, k_flat, text_slots, layers, heads)
    from tgvkv_kernels.batch_scores.launch import launch_column_sums

    check_kernel_float("q", q)
    layer_args = (first_layer, slots_per_layer, scale, heads)
    return launch_column_sums("text", plan, q, lse_b2, None, k_flat, k_scales, text_slots.contiguous(), *layer_args)[0]


def batch_vision_scores(
    plan: ScorePlan,
    q: torch.Tensor,
    lse_b2: torch.Tensor,
    w: torch.Tensor,
    k_flat: torch.Tensor,
    vision_slots: torch.Tensor,
    first_layer: int,
    slots_per_layer: int,
    scale: float,
    *,
    total_q_heads: int | None = None,
    k_scales: torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of the vision tokens and text-to-vision masses in each of L layers (TGV-KV, TWR and TVB).

    ``score_v = sum_t w_t A[t,v]`` and ``mass = sum_{t,v} A[t,v]`` over the pairs of a request where the vision token's
    position comes before the text's, ``A`` as in `batch_text_weights`. The attention matrix is never built.

    Args:
        w: ``[L, T]`` float32 text weights (under tensor parallelism already all-reduced).
        vision_slots: ``[V]`` int32 or int64 slots of the vision tokens, one request after the other, in the order of
            the plan's positions.
        The others: as in `batch_text_weights`.

    Returns:
        ``(scores [L, V], masses [L, S])`` float32, S requests. A mass is NaN where a score of that layer and request is
        not finite. Two launches.

    Raises:
        KernelInputError: shapes, dtypes, heads, layers or devices that do not fit.
    """
    heads = _check(plan, q, lse_b2, k_flat, vision_slots, first_layer, slots_per_layer, total_q_heads, k_scales)
    check_shape("w", w, tuple(q.shape[:2]))
    check_shape("vision_slots", vision_slots, (plan.vision.keys,))
    check_same_device(q=q, w=w)
    if not use_triton(backend, q.device):
        layers = _layers(q, first_layer, slots_per_layer, scale, k_scales)
        return batch_vision_scores_reference(plan, q, lse_b2, w, k_flat, vision_slots, layers, heads)
    from tgvkv_kernels.batch_scores.launch import launch_column_sums

    check_kernel_float("q", q)
    slots = vision_slots.contiguous()
    layer_args = (first_layer, slots_per_layer, scale, heads)
    return launch_column_sums("weighted", plan, q, lse_b2, w.contiguous(), k_flat, k_scales, slots, *layer_args)


def batch_peak_scores(
    plan: ScorePlan,
    q: torch.Tensor,
    lse_b2: torch.Tensor,
    k_flat: torch.Tensor,
    vision_slots: torch.Tensor,
    first_layer: int,
    slots_per_layer: int,
    scale: float,
    *,
    power: int | None = None,
    total_q_heads: int | None = None,
    k_scales: torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of the vision tokens by what any single head and query makes of them, and masses, in each of L layers.

    ``score_v = max_{h,t} A_h[t,v]``, or with ``power=4`` ``sum_{h,t} A_h[t,v]^4``, over the query heads ``h`` and the
    text tokens ``t`` of the request that come after the vision token, ``A_h = exp(q_h.k*scale - lse_h)``; 0 where none
    does. Masses as in `batch_vision_scores`. Under tensor parallelism the ranks' peaks combine by maximum, their sums
    of powers and their masses by sum.

    Args:
        power: None or 4.
        The others: as in `batch_vision_scores`; ``total_q_heads`` concerns the masses.

    Returns:
        ``(scores [L, V], masses [L, S])`` float32. A mass is NaN where a score of that layer and request is not finite.
        Two launches.

    Raises:
        KernelInputError: shapes, dtypes, heads, layers, devices or a power that do not fit.
    """
    if power not in (None, 4):
        raise KernelInputError(f"power={power!r} is neither None (the largest) nor 4 (the sum of fourth powers)")
    heads = _check(plan, q, lse_b2, k_flat, vision_slots, first_layer, slots_per_layer, total_q_heads, k_scales)
    check_shape("vision_slots", vision_slots, (plan.vision.keys,))
    if not use_triton(backend, q.device):
        layers = _layers(q, first_layer, slots_per_layer, scale, k_scales)
        return batch_peak_scores_reference(plan, q, lse_b2, k_flat, vision_slots, layers, heads, power)
    from tgvkv_kernels.batch_scores.launch import launch_column_sums

    check_kernel_float("q", q)
    kind = "peak" if power is None else "peak4"
    layer_args = (first_layer, slots_per_layer, scale, heads)
    return launch_column_sums(kind, plan, q, lse_b2, None, k_flat, k_scales, vision_slots.contiguous(), *layer_args)


def _layers(q, first_layer, slots_per_layer, scale, k_scales) -> list[tuple[int, float]]:
    """Of each layer of the stash, the unit of its slot 0 and its softmax scale over what is stored."""
    layers = range(first_layer, first_layer + q.shape[0])
    factors = [1.0] * len(layers) if k_scales is None else k_scales[layers.start : layers.stop].tolist()
    return [(layer * slots_per_layer, scale * factor) for layer, factor in zip(layers, factors, strict=True)]


def _check(plan, q, lse_b2, k_flat, slots, first_layer, slots_per_layer, total_q_heads, k_scales) -> int:
    """Checks what all share; returns the heads to divide by."""
    tokens = plan.text.keys
    check_shape("q", q, (None, tokens, None, None))
    layers, _, q_heads, head_dim = q.shape
    check_shape("lse_b2", lse_b2, (layers, tokens, q_heads))
    check_flat("k_flat", k_flat)
    check_shape("k_flat", k_flat, (None, None, head_dim))
    check_heads(q_heads, k_flat.shape[1])
    for name, tensor in (("q", q), ("lse_b2", lse_b2)):
        check_float(name, tensor)
        if not tensor.is_contiguous():
            raise KernelInputError(f"{name} has strides {tensor.stride()}: the stash must be contiguous")
    check_dtype("slots", slots, INDEX_DTYPES)
    check_storage_dtype("k_flat", k_flat, q)
    if first_layer < 0 or (first_layer + layers) * slots_per_layer > k_flat.shape[0]:
        raise KernelInputError(
            f"layers {first_layer}..{first_layer + layers - 1} of {slots_per_layer} slots lie outside the storage of "
            f"{k_flat.shape[0]} units"
        )
    if slots.device.type == "cpu" and not 0 <= int(slots.min()) <= int(slots.max()) < slots_per_layer:
        raise KernelInputError(f"slots {int(slots.min())}..{int(slots.max())} lie outside 0..{slots_per_layer - 1}")
    if k_scales is not None:
        check_shape("k_scales", k_scales, (k_flat.shape[0] // slots_per_layer,))
        check_dtype("k_scales", k_scales, (torch.float32,))
    check_same_device(q=q, lse_b2=lse_b2, k_flat=k_flat, k_scales=k_scales, slots=slots, plan=plan.text.work)
    heads = q_heads if total_q_heads is None else total_q_heads
    if heads < q_heads:
        raise KernelInputError(f"total_q_heads={heads} is below this rank's {q_heads} query heads")
    return heads
