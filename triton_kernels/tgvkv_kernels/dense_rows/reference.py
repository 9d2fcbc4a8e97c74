"""Dense index rows in plain torch; defines correctness."""

import torch


def dense_row(row: torch.Tensor, length: int, holes: list[tuple[int, int]]) -> torch.Tensor:
    """Entries ``0..length`` of one request's row without those inside ``holes`` (half-open intervals)."""
    keep = torch.ones(length, dtype=torch.bool, device=row.device)
    for start, end in holes:
        keep[start:end] = False
    return row[:length][keep]


def dense_row_list(
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    hole_start: torch.Tensor,
    hole_end: torch.Tensor,
    hole_indptr: torch.Tensor,
) -> list[torch.Tensor]:
    """One compact row per request; a negative pool index gives an empty row (padding)."""
    intervals = list(zip(hole_start.tolist(), hole_end.tolist(), strict=True))
    bounds = hole_indptr.tolist()
    rows = []
    for request, (pool, length) in enumerate(zip(req_pool_indices.tolist(), seq_lens.tolist(), strict=True)):
        holes = intervals[bounds[request] : bounds[request + 1]]
        rows.append(dense_row(req_to_token[max(pool, 0)], length if pool >= 0 else 0, holes))
    return rows


def dense_rows_reference(
    req_to_token, req_pool_indices, seq_lens, hole_start, hole_end, hole_indptr, kv_indices, kv_indptr
) -> None:
    """Writes the concatenated rows and their bounds; see `tgvkv_kernels.dense_rows.api.dense_rows`."""
    rows = dense_row_list(req_to_token, req_pool_indices, seq_lens, hole_start, hole_end, hole_indptr)
    ends = torch.tensor([row.shape[0] for row in rows], dtype=torch.int64).cumsum(0)
    kv_indptr[0] = 0
    kv_indptr[1 : len(rows) + 1] = ends.to(kv_indptr)
    if rows:
        kv_indices[: int(ends[-1])] = torch.cat(rows).to(kv_indices.dtype)
