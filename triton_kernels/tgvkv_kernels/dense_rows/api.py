"""Public entries of `dense_rows`."""

import torch

from tgvkv_kernels.common.checks import (
    INDEX_DTYPES,
    check_dtype,
    check_last_dim_contiguous,
    check_same_device,
    check_shape,
)
from tgvkv_kernels.common.dispatch import use_triton
from tgvkv_kernels.common.errors import KernelInputError
from tgvkv_kernels.dense_rows.reference import (
    dense_rows_reference,
    extend_dense_rows_reference,
    fill_dense_table_reference,
)


def dense_rows(
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    hole_start: torch.Tensor,
    hole_end: torch.Tensor,
    hole_indptr: torch.Tensor,
    *,
    total: int | None = None,
    kv_indices: torch.Tensor | None = None,
    kv_indptr: torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each request's slots at its logical positions outside its holes, concatenated (FlashInfer's page-size-1 form).

    Args:
        req_to_token: ``[rows, max_len]`` int32 slot of each logical position.
        req_pool_indices: ``[B]`` row of each request, -1 for padding (empty row). seq_lens: ``[B]`` logical lengths.
        hole_start, hole_end: ``[H]`` half-open intervals, sorted and disjoint within a request, inside its length.
        hole_indptr: ``[B+1]``; request ``b`` has holes ``hole_indptr[b]:hole_indptr[b+1]``.
        total: indices in all, known on the host; default: read back from the device (synchronises on CUDA) unless
            ``kv_indices`` is given.
        kv_indices, kv_indptr: int32 buffers to write to (fixed address; may be larger than needed, the rest is left).
        backend: see `tgvkv_kernels.common.dispatch.use_triton`.

    Returns:
        ``(kv_indices, kv_indptr)`` int32: the given buffers, or tensors of ``[total]`` and ``[B+1]``.

    Raises:
        KernelInputError: shapes, dtypes or devices that do not fit; on the CPU also holes out of order or too small
            a buffer.
    """
    batch = _check_rows(req_to_token, req_pool_indices, seq_lens, hole_start, hole_end, hole_indptr)
    device = req_to_token.device
    if kv_indptr is None:
        kv_indptr = torch.empty(batch + 1, dtype=torch.int32, device=device)
    if kv_indices is None:
        if total is None:
            total = _total(req_pool_indices, seq_lens, hole_start, hole_end, hole_indptr)
        kv_indices = torch.empty(total, dtype=torch.int32, device=device)
    check_dtype("kv_indices", kv_indices, (torch.int32,))
    check_dtype("kv_indptr", kv_indptr, (torch.int32,))
    check_same_device(req_to_token=req_to_token, kv_indices=kv_indices, kv_indptr=kv_indptr)
    if kv_indptr.dim() != 1 or kv_indptr.shape[0] < batch + 1:
        raise KernelInputError(f"kv_indptr has shape {list(kv_indptr.shape)}, needs at least [{batch + 1}]")
    if device.type == "cpu":
        needed = _total(req_pool_indices, seq_lens, hole_start, hole_end, hole_indptr)
        if needed > kv_indices.shape[0]:
            raise KernelInputError(f"kv_indices holds {kv_indices.shape[0]} indices, {needed} are needed")
    args = (req_to_token, req_pool_indices, seq_lens, hole_start, hole_end, hole_indptr, kv_indices, kv_indptr)
    if not use_triton(backend, device):
        dense_rows_reference(*args)
        return kv_indices, kv_indptr
    from tgvkv_kernels.dense_rows.launch import launch_dense_rows

    launch_dense_rows(*args)
    return kv_indices, kv_indptr


def fill_dense_table(
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    hole_start: torch.Tensor,
    hole_end: torch.Tensor,
    hole_indptr: torch.Tensor,
    table: torch.Tensor,
    table_rows: torch.Tensor,
    row_lens: torch.Tensor,
    *,
    backend: str = "auto",
) -> None:
    """Write each request's dense row into row ``table_rows[b]`` of a fixed-address table, and its length.

    First six arguments as in `dense_rows`. table: ``[rows, width]`` int32. table_rows: ``[B]`` distinct rows, -1 skips.
    row_lens: ``[rows]`` int32, written at ``table_rows``. The rest of both is left as it is. Such a table is itself a
    ``req_to_token`` without holes: pass it to `dense_rows` for the concatenated form.
    """
    batch = _check_rows(req_to_token, req_pool_indices, seq_lens, hole_start, hole_end, hole_indptr)
    _check_table(table, row_lens, table_rows, batch)
    check_same_device(req_to_token=req_to_token, table=table, table_rows=table_rows, row_lens=row_lens)
    args = (
        req_to_token,
        req_pool_indices,
        seq_lens,
        hole_start,
        hole_end,
        hole_indptr,
        table,
        table_rows,
        row_lens,
    )
    if not use_triton(backend, table.device):
        fill_dense_table_reference(*args)
        return
    from tgvkv_kernels.dense_rows.launch import launch_fill_dense_table

    launch_fill_dense_table(*args)


def extend_dense_rows(
    table: torch.Tensor, row_lens: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor, *, backend: str = "auto"
) -> None:
    """Append one decode slot per row, in place: ``table[rows[b], row_lens[rows[b]]++] = slots[b]``.

    Args:
        table: ``[rows, width]`` int32. row_lens: ``[rows]`` int32.
        rows: ``[B]`` distinct rows, -1 skips (padding). slots: ``[B]`` int32 or int64.
        backend: see `tgvkv_kernels.common.dispatch.use_triton`.

    Raises:
        KernelInputError: shapes, dtypes or devices that do not fit; on the CPU also a full row.
    """
    check_shape("rows", rows, (None,))
    _check_table(table, row_lens, rows, rows.shape[0])
    check_shape("slots", slots, (rows.shape[0],))
    check_dtype("slots", slots, INDEX_DTYPES)
    check_same_device(table=table, row_lens=row_lens, rows=rows, slots=slots)
    if table.device.type == "cpu":
        used = row_lens[rows[rows >= 0].long()]
        if used.numel() and int(used.max()) >= table.shape[1]:
            raise KernelInputError(
                f"a row already holds {int(used.max())} of {table.shape[1]} indices: widen the table"
            )
    if rows.shape[0] == 0:
        return
    if not use_triton(backend, table.device):
        extend_dense_rows_reference(table, row_lens, rows, slots)
        return
    from tgvkv_kernels.dense_rows.launch import launch_extend_dense_rows

    launch_extend_dense_rows(table, row_lens, rows, slots)


def _check_rows(req_to_token, req_pool_indices, seq_lens, hole_start, hole_end, hole_indptr) -> int:
    check_shape("req_to_token", req_to_token, (None, None))
    check_dtype("req_to_token", req_to_token, (torch.int32,))
    check_last_dim_contiguous("req_to_token", req_to_token)
    check_shape("req_pool_indices", req_pool_indices, (None,))
    batch = req_pool_indices.shape[0]
    check_shape("seq_lens", seq_lens, (batch,))
    check_shape("hole_start", hole_start, (None,))
    check_shape("hole_end", hole_end, tuple(hole_start.shape))
    check_shape("hole_indptr", hole_indptr, (batch + 1,))
    indices = {
        "req_pool_indices": req_pool_indices,
        "seq_lens": seq_lens,
        "hole_start": hole_start,
        "hole_end": hole_end,
        "hole_indptr": hole_indptr,
    }
    for name, tensor in indices.items():
        check_dtype(name, tensor, INDEX_DTYPES)
    check_same_device(req_to_token=req_to_token, **indices)
    if req_to_token.device.type == "cpu":
        _check_holes(seq_lens, hole_start, hole_end, hole_indptr)
    return batch


def _check_holes(seq_lens, hole_start, hole_end, hole_indptr) -> None:
    bounds = hole_indptr.tolist()
    for request, length in enumerate(seq_lens.tolist()):
        position = 0
        for hole in range(bounds[request], bounds[request + 1]):
            start, end = int(hole_start[hole]), int(hole_end[hole])
            if not position <= start <= end <= length:
                raise KernelInputError(
                    f"hole {hole} = [{start}, {end}) of request {request}: holes must be sorted, disjoint and inside "
                    f"its {length} positions"
                )
            position = end


def _total(req_pool_indices, seq_lens, hole_start, hole_end, hole_indptr) -> int:
    sizes = torch.zeros(hole_start.shape[0] + 1, dtype=torch.int64, device=seq_lens.device)
    sizes[1:] = (hole_end - hole_start).long().cumsum(0)
    bounds = sizes[hole_indptr.long()]
    lengths = seq_lens.long() - bounds.diff()
    return int(torch.where(req_pool_indices >= 0, lengths, 0).sum())


def _check_table(table: torch.Tensor, row_lens: torch.Tensor, rows: torch.Tensor, batch: int) -> None:
    check_shape("table", table, (None, None))
    check_dtype("table", table, (torch.int32,))
    check_last_dim_contiguous("table", table)
    check_shape("row_lens", row_lens, (table.shape[0],))
    check_dtype("row_lens", row_lens, (torch.int32,))
    check_shape("table rows", rows, (batch,))
    check_dtype("table rows", rows, INDEX_DTYPES)
