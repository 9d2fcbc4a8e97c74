"""Public entry of `view_attention`."""

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
from tgvkv_kernels.view_attention.reference import view_attention_reference


def view_attention(
    q: torch.Tensor,
    k_flat: torch.Tensor,
    v_flat: torch.Tensor,
    units: torch.Tensor,
    indptr: torch.Tensor,
    row_to_request: torch.Tensor | None,
    scale: float,
    dense_out: torch.Tensor | None = None,
    dense_lse_e: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
    out_lse_e: torch.Tensor | None = None,
    num_splits: int | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of each query row over its request's view units (no mask: vision precedes the text that queries it),
    merged with the dense part of the same rows where that is given.

    Args:
        q: ``[R, Hq, D]`` queries.
        k_flat, v_flat: ``[L*slots, Hkv, D]`` flat storage, dtype of ``q``.
        units: ``[N]`` int32 or int64 flat unit ids of this layer; entries past ``indptr[B]`` are never read, so a table
            of fixed capacity may be passed.
        indptr: ``[B+1]`` int32; request ``b`` owns ``units[indptr[b]:indptr[b+1]]`` (may be empty).
        row_to_request: ``[R]`` int32 request of each row, -1 for none; ``None``: row ``b`` is request ``b`` (decode).
            Any order is correct; rows of one request next to each other share their loads.
        scale: softmax scale.
        dense_out, dense_lse_e: ``[R, Hq, D]`` (dtype of ``q``) and ``[R, Hq]`` float32: the dense part, LSE base e.
        out, out_lse_e: where to write; ``dense_out``/``dense_lse_e`` themselves are allowed (in place, CUDA graphs).
        num_splits: parts that each request's units are cut into; default from the shapes alone, so it is constant
            under a CUDA graph. The last bits of the result depend on it.
        backend: see `tgvkv_kernels.common.dispatch.use_triton`.

    Returns:
        ``(out [R, Hq, D], lse_e [R, Hq])``. A row with no units returns its dense part unchanged bit for bit; without
        a dense part, 0 and ``-inf``. With ``N == 0`` no kernel is launched.

    Raises:
        KernelInputError: shapes, dtypes, heads, units or devices that do not fit; one of the dense pair missing.
    """
    _check(q, k_flat, v_flat, units, indptr, row_to_request, dense_out, dense_lse_e, out, out_lse_e)
    if num_splits is not None and num_splits < 1:
        raise KernelInputError(f"num_splits={num_splits} must be at least 1")
    if units.shape[0] == 0 and dense_out is not None and out is None and out_lse_e is None:
        return dense_out, dense_lse_e
    out = torch.empty_like(q) if out is None else out
    if out_lse_e is None:
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        out_lse_e = torch.empty(q.shape[:2], dtype=dtype, device=q.device)
    if units.shape[0] == 0 or q.shape[0] == 0 or not use_triton(backend, q.device):
        view_attention_reference(
            q, k_flat, v_flat, units, indptr, row_to_request, scale, dense_out, dense_lse_e, out, out_lse_e
        )
        return out, out_lse_e
    from tgvkv_kernels.view_attention.launch import launch_view_attention

    check_kernel_float("q", q)
    for name, tensor in (
        ("q", q),
        ("out", out),
        ("dense_out", dense_out),
        ("out_lse_e", out_lse_e),
        ("dense_lse_e", dense_lse_e),
    ):
        if tensor is not None:
            check_last_dim_contiguous(name, tensor)
    launch_view_attention(
        q,
        k_flat,
        v_flat,
        units,
        indptr,
        row_to_request,
        scale,
        dense_out,
        dense_lse_e,
        out,
        out_lse_e,
        num_splits,
    )
    return out, out_lse_e


def _check(q, k_flat, v_flat, units, indptr, row_to_request, dense_out, dense_lse_e, out, out_lse_e) -> None:
    check_shape("q", q, (None, None, None))
    rows, q_heads, head_dim = q.shape
    check_float("q", q)
    check_flat("k_flat", k_flat)
    check_flat("v_flat", v_flat)
    check_shape("k_flat", k_flat, (None, None, head_dim))
    check_shape("v_flat", v_flat, tuple(k_flat.shape))
    check_heads(q_heads, k_flat.shape[1])
    check_shape("indptr", indptr, (None,))
    check_dtype("indptr", indptr, INDEX_DTYPES)
    if indptr.shape[0] == 0:
        raise KernelInputError("indptr is empty: it needs B+1 entries, so at least [0]")
    _check_unit_table(units, indptr, k_flat.shape[0])
    if row_to_request is None:
        check_shape("q (row_to_request=None: one row per request)", q, (indptr.shape[0] - 1, q_heads, head_dim))
    else:
        check_shape("row_to_request", row_to_request, (rows,))
        check_dtype("row_to_request", row_to_request, INDEX_DTYPES)
    for name, tensor in (("k_flat", k_flat), ("v_flat", v_flat), ("dense_out", dense_out), ("out", out)):
        if tensor is not None and tensor.dtype != q.dtype:
            raise KernelInputError(f"{name} is {tensor.dtype} but q is {q.dtype}: they must agree")
    if (dense_out is None) != (dense_lse_e is None):
        missing = "dense_out" if dense_out is None else "dense_lse_e"
        raise KernelInputError(f"{missing} is missing: give both of dense_out and dense_lse_e, or neither")
    for name, tensor, shape in (
        ("dense_out", dense_out, (rows, q_heads, head_dim)),
        ("dense_lse_e", dense_lse_e, (rows, q_heads)),
        ("out", out, (rows, q_heads, head_dim)),
        ("out_lse_e", out_lse_e, (rows, q_heads)),
    ):
        if tensor is not None:
            check_shape(name, tensor, shape)
    check_same_device(
        q=q,
        k_flat=k_flat,
        v_flat=v_flat,
        units=units,
        indptr=indptr,
        row_to_request=row_to_request,
        dense_out=dense_out,
        dense_lse_e=dense_lse_e,
        out=out,
        out_lse_e=out_lse_e,
    )


def _check_unit_table(units: torch.Tensor, indptr: torch.Tensor, storage_rows: int) -> None:
    """Checks the used part only: past ``indptr[B]`` a fixed-capacity table may hold anything."""
    if units.device.type != "cpu":
        check_units("units", units, storage_rows)
        return
    used = int(indptr[-1])
    if used > units.shape[0] or bool((indptr[1:] < indptr[:-1]).any()) or int(indptr[0]) < 0:
        raise KernelInputError(f"indptr={indptr.tolist()} must ascend within the {units.shape[0]} units")
    check_units("units", units[:used], storage_rows)
