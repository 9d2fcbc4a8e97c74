"""Public entry of `vision_scores`."""

import torch

from tgvkv_kernels.common.checks import (
    INDEX_DTYPES,
    check_dtype,
    check_flat,
    check_float,
    check_heads,
    check_kernel_float,
    check_last_dim_contiguous,
    check_same_device,
    check_shape,
    check_units,
)
from tgvkv_kernels.common.dispatch import use_triton
from tgvkv_kernels.common.errors import KernelInputError
from tgvkv_kernels.vision_scores.reference import vision_scores_reference


def vision_scores(
    q: torch.Tensor,
    lse_e: torch.Tensor,
    w: torch.Tensor,
    k_flat: torch.Tensor,
    units: torch.Tensor,
    q_pos: torch.Tensor,
    v_pos: torch.Tensor,
    scale: float,
    *,
    total_q_heads: int | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of V vision tokens and the text-to-vision mass of one layer (TGV-KV, TWR and TVB).

    ``score_v = sum_t w_t A[t,v]`` and ``mass = sum_{t,v} A[t,v]``, where ``A`` is the mean over query heads of
    ``exp(q.k*scale - lse)`` and only pairs with ``v_pos < q_pos`` count. The attention matrix is never built.

    Args:
        q: ``[T, Hq, D]`` text queries. lse_e: ``[T, Hq]`` float32 natural log-sum-exp of their whole attention rows.
        w: ``[T]`` float32 text weights (under tensor parallelism already all-reduced).
        k_flat: ``[L*slots, Hkv, D]`` flat key storage, dtype of ``q``.
        units: ``[V]`` int32 or int64 flat unit ids of the vision tokens in this layer, in any order.
        q_pos, v_pos: ``[T]`` and ``[V]`` int32 or int64 logical positions.
        scale: softmax scale.
        total_q_heads: heads of the whole model under tensor parallelism; the mean divides by it, so that the ranks'
            scores and masses sum to the model's. Default: ``Hq``.
        backend: see `tgvkv_kernels.common.dispatch.use_triton`.

    Returns:
        ``(scores [V], mass [])``, both float32. Without queries or vision tokens they are zero.

    Raises:
        KernelInputError: shapes, dtypes, heads, units or devices that do not fit.
    """
    check_shape("q", q, (None, None, None))
    tokens, q_heads, head_dim = q.shape
    check_shape("lse_e", lse_e, (tokens, q_heads))
    check_shape("w", w, (tokens,))
    check_flat("k_flat", k_flat)
    check_shape("k_flat", k_flat, (None, None, head_dim))
    check_heads(q_heads, k_flat.shape[1])
    check_units("units", units, k_flat.shape[0])
    check_shape("q_pos", q_pos, (tokens,))
    check_shape("v_pos", v_pos, (units.shape[0],))
    for name, tensor in (("q", q), ("lse_e", lse_e), ("w", w)):
        check_float(name, tensor)
    check_dtype("q_pos", q_pos, INDEX_DTYPES)
    check_dtype("v_pos", v_pos, INDEX_DTYPES)
    if k_flat.dtype != q.dtype:
        raise KernelInputError(f"k_flat is {k_flat.dtype} but q is {q.dtype}: use one dtype for queries and keys")
    check_same_device(q=q, lse_e=lse_e, w=w, k_flat=k_flat, units=units, q_pos=q_pos, v_pos=v_pos)
    heads = q_heads if total_q_heads is None else total_q_heads
    if heads < q_heads:
        raise KernelInputError(f"total_q_heads={heads} is below this rank's {q_heads} query heads")
    if not use_triton(backend, q.device):
        return vision_scores_reference(q, lse_e, w, k_flat, units, q_pos, v_pos, scale, heads)
    from tgvkv_kernels.vision_scores.launch import launch_vision_scores

    check_kernel_float("q", q)
    check_last_dim_contiguous("q", q)
    return launch_vision_scores(q, lse_e, w, k_flat, units, q_pos, v_pos, scale, heads)
