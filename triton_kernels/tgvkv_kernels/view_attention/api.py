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
    check_storage_dtype,
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
    out: torch.Tensor,
    lse_b2: torch.Tensor,
    *,
    v_scale: float = 1.0,
    backend: str = "auto",
) -> None:
    """Add each query row's attention over its request's view units to the dense part of the same row, in place (no
    mask: vision precedes the text that queries it).

    Safe in a CUDA graph: grids come from shapes, units and bounds are read on the device, nothing synchronises. A row's
    result depends on its own request alone, to the bit, whatever the batch.

    Args:
        q: ``[R, Hq, D]`` queries.
        k_flat, v_flat: ``[L*slots, Hkv, D]`` flat storage, dtype of ``q`` or one of `FP8`.
        units: ``[N]`` int32 or int64 flat unit ids of this layer; entries past ``indptr[B]`` are never read, so a table
            of fixed capacity may be passed.
        indptr: ``[B+1]`` int32; request ``b`` owns ``units[indptr[b]:indptr[b+1]]`` (may be empty).
        row_to_request: ``[R]`` int32 request of each row, -1 for none; ``None``: row ``b`` is request ``b`` (decode).
            Any order is correct; rows of one request next to each other share their loads.
        scale: softmax scale; times the factor that K was divided by when it was stored.
        out: ``[R, Hq, D]`` (dtype of ``q``) the dense part's output; overwritten with that of the whole row.
        lse_b2: ``[R, Hq]`` float32 the dense part's LSE in base 2 (FlashInfer's), -inf where it had no keys (its output
            may then hold anything); overwritten likewise. Rows without units keep both, bit for bit.
        v_scale: what V was divided by when it was stored, above 0.
        backend: see `tgvkv_kernels.common.dispatch.use_triton`.

    Raises:
        KernelInputError: shapes, dtypes, heads, units or devices that do not fit.
    """
    _check(q, k_flat, v_flat, units, indptr, row_to_request, out, lse_b2)
    if units.shape[0] == 0 or q.shape[0] == 0:
        return
    if not use_triton(backend, q.device):
        view_attention_reference(q, k_flat, v_flat, units, indptr, row_to_request, scale, v_scale, out, lse_b2)
        return
    from tgvkv_kernels.view_attention.launch import launch_view_attention

    check_kernel_float("q", q)
    for name, tensor in (("q", q), ("out", out), ("lse_b2", lse_b2)):
        check_last_dim_contiguous(name, tensor)
    launch_view_attention(q, k_flat, v_flat, units, indptr, row_to_request, scale, v_scale, out, lse_b2)


def _check(q, k_flat, v_flat, units, indptr, row_to_request, out, lse_b2) -> None:
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
    check_shape("out", out, (rows, q_heads, head_dim))
    check_shape("lse_b2", lse_b2, (rows, q_heads))
    check_dtype("lse_b2", lse_b2, (torch.float32, torch.float64))
    for name, tensor in (("k_flat", k_flat), ("v_flat", v_flat)):
        check_storage_dtype(name, tensor, q)
    check_dtype("out", out, (q.dtype,))
    tensors = {"q": q, "k_flat": k_flat, "v_flat": v_flat, "units": units, "indptr": indptr, "out": out}
    check_same_device(**tensors, row_to_request=row_to_request, lse_b2=lse_b2)


def _check_unit_table(units: torch.Tensor, indptr: torch.Tensor, storage_rows: int) -> None:
    """Checks the used part only: past ``indptr[B]`` a fixed-capacity table may hold anything."""
    if units.device.type != "cpu":
        check_units("units", units, storage_rows)
        return
    used = int(indptr[-1])
    if used > units.shape[0] or bool((indptr[1:] < indptr[:-1]).any()) or int(indptr[0]) < 0:
        raise KernelInputError(f"indptr={indptr.tolist()} must ascend within the {units.shape[0]} units")
    check_units("units", units[:used], storage_rows)
