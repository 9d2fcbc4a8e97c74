"""Public entry of `dense_rows`."""

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
from tgvkv_kernels.dense_rows.reference import dense_rows_reference


def dense_rows(
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    hole_start: torch.Tensor,
    hole_end: torch.Tensor,
    hole_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    kv_indptr: torch.Tensor,
    *,
    backend: str = "auto",
) -> None:
    """Write each request's slots at its logical positions outside its holes, one request after the other, and their
    bounds (FlashInfer's page-size-1 form).

    Args:
        req_to_token: ``[rows, max_len]`` int32 slot of each logical position.
        req_pool_indices: ``[B]`` row of each request, -1 for padding (empty row). seq_lens: ``[B]`` logical lengths.
        hole_start, hole_end: ``[H]`` half-open intervals, sorted and disjoint within a request, inside its length.
        hole_indptr: ``[B+1]``; request ``b`` has holes ``hole_indptr[b]:hole_indptr[b+1]``.
        kv_indices: int32, written from 0 on; at least as long as all rows together (the rest is left as it is).
        kv_indptr: int32, ``[>= B+1]``; request ``b``'s slots are ``kv_indices[kv_indptr[b]:kv_indptr[b+1]]``.
        backend: see `tgvkv_kernels.common.dispatch.use_triton`.

    Raises:
        KernelInputError: shapes, dtypes or devices that do not fit; on the CPU also holes out of order or too small
            a ``kv_indices``.
    """
    batch = _check_rows(req_to_token, req_pool_indices, seq_lens, hole_start, hole_end, hole_indptr)
    check_shape("kv_indices", kv_indices, (None,))
    check_dtype("kv_indices", kv_indices, (torch.int32,))
    check_dtype("kv_indptr", kv_indptr, (torch.int32,))
    check_same_device(req_to_token=req_to_token, kv_indices=kv_indices, kv_indptr=kv_indptr)
    if kv_indptr.dim() != 1 or kv_indptr.shape[0] < batch + 1:
        raise KernelInputError(f"kv_indptr has shape {list(kv_indptr.shape)}, needs at least [{batch + 1}]")
    if kv_indices.device.type == "cpu":
        needed = _total(req_pool_indices, seq_lens, hole_start, hole_end, hole_indptr)
        if needed > kv_indices.shape[0]:
            raise KernelInputError(f"kv_indices holds {kv_indices.shape[0]} indices, {needed} are needed")
    args = (req_to_token, req_pool_indices, seq_lens, hole_start, hole_end, hole_indptr, kv_indices, kv_indptr)
    if not use_triton(backend, req_to_token.device):
        dense_rows_reference(*args)
        return
    from tgvkv_kernels.dense_rows.launch import launch_dense_rows

    launch_dense_rows(*args)


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
