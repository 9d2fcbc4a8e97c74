"""`view_attention` in plain torch; defines correctness."""

import itertools
import math

import torch

from tgvkv_kernels.common.lse import compute_dtype, merge_by_lse


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
    dense_out: torch.Tensor | None,
    dense_lse_e: torch.Tensor | None,
    out: torch.Tensor,
    out_lse_e: torch.Tensor,
) -> None:
    """See `tgvkv_kernels.view_attention.api.view_attention`; writes ``out`` and ``out_lse_e``."""
    if dense_out is None:
        out.zero_()
        out_lse_e.fill_(-math.inf)
    else:
        if out is not dense_out:
            out.copy_(dense_out)
        if out_lse_e is not dense_lse_e:
            out_lse_e.copy_(dense_lse_e)
    bounds = indptr.tolist()
    requests = torch.arange(q.shape[0], device=q.device) if row_to_request is None else row_to_request
    for request, (begin, end) in enumerate(itertools.pairwise(bounds)):
        rows = torch.nonzero(requests == request).flatten()
        if begin == end or rows.numel() == 0:
            continue
        ids = units[begin:end].long()
        view_out, view_lse_e = attend(q[rows], k_flat[ids], v_flat[ids], scale)
        if dense_out is not None:
            view_out, view_lse_e = merge_by_lse(
                view_out, view_lse_e, dense_out[rows], dense_lse_e[rows].to(view_lse_e.dtype)
            )
        out[rows] = view_out.to(out.dtype)
        out_lse_e[rows] = view_lse_e.to(out_lse_e.dtype)
