"""Launches of `dense_rows`."""

import torch

from tgvkv_kernels.common.tiles import ceil_div, next_power_of_2
from tgvkv_kernels.dense_rows.kernel import extend_rows_kernel, fill_rows_kernel, row_bounds_kernel

BOUNDS_BLOCK = 1024
FILL_BLOCK = 512
FILL_PROGRAMS = 8  # per request: enough for short rows, and long ones loop (lengths are not known on the host)
EXTEND_BLOCK = 128


def launch_dense_rows(
    req_to_token, req_pool_indices, seq_lens, hole_start, hole_end, hole_indptr, kv_indices, kv_indptr
) -> None:
    """Checked arguments of `tgvkv_kernels.dense_rows.api.dense_rows`; two launches."""
    batch = req_pool_indices.shape[0]
    request = _contiguous(req_pool_indices, seq_lens, hole_start, hole_end, hole_indptr)
    launch_row_bounds(request, kv_indptr)
    if batch:
        fill_rows_kernel[(batch, FILL_PROGRAMS)](
            req_to_token,
            *request,
            kv_indices,
            kv_indptr,
            kv_indptr,
            req_to_token.stride(0),
            0,
            BN=FILL_BLOCK,
            TABLE=False,
        )


def launch_row_bounds(request: tuple[torch.Tensor, ...], kv_indptr: torch.Tensor) -> None:
    """Bounds of the compact rows of ``request``, the five per-request tensors of `dense_rows`; one launch."""
    batch = request[0].shape[0]
    block = min(BOUNDS_BLOCK, next_power_of_2(batch))
    row_bounds_kernel[(1,)](*request, kv_indptr, batch, BB=block, num_warps=4)


def launch_fill_dense_table(
    req_to_token, req_pool_indices, seq_lens, hole_start, hole_end, hole_indptr, table, table_rows, row_lens
) -> None:
    """Checked arguments of `tgvkv_kernels.dense_rows.api.fill_dense_table`; one launch."""
    batch = req_pool_indices.shape[0]
    if batch:
        fill_rows_kernel[(batch, FILL_PROGRAMS)](
            req_to_token,
            *_contiguous(req_pool_indices, seq_lens, hole_start, hole_end, hole_indptr),
            table,
            table_rows.contiguous(),
            row_lens,
            req_to_token.stride(0),
            table.stride(0),
            BN=FILL_BLOCK,
            TABLE=True,
        )


def launch_extend_dense_rows(
    table: torch.Tensor, row_lens: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor
) -> None:
    """Checked arguments of `tgvkv_kernels.dense_rows.api.extend_dense_rows`; one launch."""
    batch = rows.shape[0]
    extend_rows_kernel[(ceil_div(batch, EXTEND_BLOCK),)](
        table, row_lens, rows.contiguous(), slots.contiguous(), batch, table.stride(0), BB=EXTEND_BLOCK
    )


def _contiguous(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(tensor.contiguous() for tensor in tensors)
