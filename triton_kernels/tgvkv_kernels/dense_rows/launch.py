"""Launches of `dense_rows`."""

import torch

from tgvkv_kernels.dense_rows.kernel import fill_rows_kernel, row_bounds_kernel

BOUNDS_BLOCK = 256  # one for all batch sizes; larger batches loop
FILL_BLOCK = 512
FILL_PROGRAMS = 8  # per request: enough for short rows, and long ones loop (lengths are not known on the host)


def launch_dense_rows(
    req_to_token, req_pool_indices, seq_lens, hole_start, hole_end, hole_indptr, kv_indices, kv_indptr
) -> None:
    """Checked arguments of `tgvkv_kernels.dense_rows.api.dense_rows`; two launches."""
    batch = req_pool_indices.shape[0]
    request = _contiguous(req_pool_indices, seq_lens, hole_start, hole_end, hole_indptr)
    launch_row_bounds(request, kv_indptr)
    pool, _, *holes = request
    if batch:
        fill_rows_kernel[(batch, FILL_PROGRAMS)](
            req_to_token,
            pool,
            *holes,
            kv_indices,
            kv_indptr,
            req_to_token.stride(0),
            BN=FILL_BLOCK,
        )


def launch_row_bounds(request: tuple[torch.Tensor, ...], kv_indptr: torch.Tensor) -> None:
    """Bounds of the compact rows of ``request``, the five per-request tensors of `dense_rows`; one launch."""
    row_bounds_kernel[(1,)](*request, kv_indptr, request[0].shape[0], BB=BOUNDS_BLOCK, num_warps=4)


def _contiguous(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(tensor.contiguous() for tensor in tensors)
