"""`view_attention` in plain torch; defines correctness."""

import itertools

import torch

from tgvkv_kernels.common.lse import LN2, LOG2_E, compute_dtype, merge_by_lse


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Unmasked attention of ``q [R, Hq, D]`` over ``k, v [n>0, Hkv, D]`` -> ``(out [R, Hq, D], lse_e [R, Hq])``."""
    dtype = compute_dtype(q)
    rows, q_heads, head_dim = q.shape
    grouped = q.to(dtype).reshape(rows, k.shape[1], q_heads // k.shape[1], head_dim)
    logits = torch.einsum("rhgd,nhd->rhgn", grouped, k.to(dtype)) * scale
    lse_e = torch.logsumexp(logits, dim=-1)
    out = torch.einsum("rhgn,nhd->rhgd", torch.exp(logits - lse_e[..., None]), v.to(dtype))
    return out.reshape(rows, q_heads, v.shape[2]), lse_e.reshape(rows, q_heads)


def view_attention_reference(
    q: torch.Tensor,
    k_flat: torch.Tensor,
    v_flat: torch.Tensor,
    units: torch.Tensor,
    indptr: torch.Tensor,
    row_to_request: torch.Tensor | None,
    scale: float,
    v_scale: float,
    out: torch.Tensor,
    lse_b2: torch.Tensor,
) -> None:
    """See `tgvkv_kernels.view_attention.api.view_attention`; changes ``out`` and ``lse_b2``."""
    requests = torch.arange(q.shape[0], device=q.device) if row_to_request is None else row_to_request
    for request, (begin, end) in enumerate(itertools.pairwise(indptr.tolist())):
        rows = torch.nonzero(requests == request).flatten()
        if begin == end or rows.numel() == 0:
            continue
        ids = units[begin:end].long()
        view_out, view_lse_e = attend(q[rows], k_flat[ids], v_flat[ids], scale)
        dense_lse_e = lse_b2[rows].to(view_lse_e.dtype) * LN2
        merged, merged_lse_e = merge_by_lse(view_out * v_scale, view_lse_e, out[rows], dense_lse_e)
        out[rows] = merged.to(out.dtype)
        lse_b2[rows] = (merged_lse_e * LOG2_E).to(lse_b2.dtype)
