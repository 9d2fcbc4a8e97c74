"""Launches of `view_attention`."""

import torch

from tgvkv_kernels.common.lse import LOG2_E
from tgvkv_kernels.common.tiles import MIN_DOT, TARGET_PROGRAMS, block_dim, ceil_div, next_power_of_2
from tgvkv_kernels.view_attention.kernel import view_attention_kernel, view_merge_kernel

MAX_SPLITS = 16
PREFILL_LANES = 64  # query rows x group of one tile when rows share a request, for storage rows up to 256 bytes
MERGE_HEADS = 4


def attention_config(group: int, head_dim: int, itemsize: int, has_row_map: bool) -> dict[str, int]:
    """Tile sizes and launch options, from shapes alone.

    Decode has one query row a tile (its request is its own), prefill as many as fill 64 lanes. Units per step: 64,
    halved for each doubling of the storage row beyond 256 bytes. Decode waits on memory: with 5 stages Triton 3.6 keeps
    two K and two V tiles in flight (64 KB; with 3 or 4 only one, because the unit ids are loaded first).
    """
    lanes = max(MIN_DOT, next_power_of_2(group))
    row_bytes = block_dim(head_dim) * itemsize
    if has_row_map:
        lanes = max(lanes, PREFILL_LANES if row_bytes <= 256 else PREFILL_LANES // 2)
    return {
        "ROWS": lanes // group if has_row_map else 1,
        "BM": lanes,
        "BN": max(MIN_DOT, 64 * 256 // max(row_bytes, 256)),
        "BD": block_dim(head_dim),
        "num_warps": 8 if has_row_map or itemsize == 4 else 4,
        "num_stages": 3 if has_row_map else 5,
    }


def default_splits(row_tiles: int, kv_heads: int) -> int:
    """Splits that bring the grid to about `TARGET_PROGRAMS`; 1 (a single, fused launch) for large batches."""
    return max(1, min(MAX_SPLITS, TARGET_PROGRAMS // (row_tiles * kv_heads)))


def launch_view_attention(
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
    num_splits: int | None,
) -> None:
    """Checked arguments of `tgvkv_kernels.view_attention.api.view_attention`; one launch, or two when split."""
    rows, q_heads, head_dim = q.shape
    kv_heads = k_flat.shape[1]
    group = q_heads // kv_heads
    config = attention_config(group, head_dim, q.element_size(), row_to_request is not None)
    row_tiles = ceil_div(rows, config["ROWS"])
    splits = default_splits(row_tiles, kv_heads) if num_splits is None else num_splits
    has_dense = dense_out is not None
    dense = dense_out if has_dense else out  # never read without HAS_DENSE
    dense_lse = dense_lse_e if has_dense else out_lse_e
    part_out = part_lse = out_lse_e
    if splits > 1:
        part_out = torch.empty(splits, rows, q_heads, head_dim, dtype=torch.float32, device=q.device)
        part_lse = torch.empty(splits, rows, q_heads, dtype=torch.float32, device=q.device)
    strides = (*dense.stride()[:2], dense_lse.stride(0), *out.stride()[:2], out_lse_e.stride(0))
    view_attention_kernel[(row_tiles, kv_heads, splits)](
        q,
        k_flat,
        v_flat,
        units,
        indptr,
        indptr if row_to_request is None else row_to_request,
        dense,
        dense_lse,
        out,
        out_lse_e,
        part_out,
        part_lse,
        rows,
        float(scale) * LOG2_E,
        *q.stride()[:2],
        k_flat.stride(0),
        v_flat.stride(0),
        *strides,
        G=group,
        D=head_dim,
        SPLIT=splits > 1,
        HAS_ROW_MAP=row_to_request is not None,
        HAS_DENSE=has_dense,
        **config,
    )
    if splits == 1:
        return
    view_merge_kernel[(rows, ceil_div(q_heads, MERGE_HEADS))](
        part_out,
        part_lse,
        dense,
        dense_lse,
        out,
        out_lse_e,
        rows,
        splits,
        *strides,
        H=q_heads,
        D=head_dim,
        BD=config["BD"],
        BH=MERGE_HEADS,
        HAS_DENSE=has_dense,
        num_warps=1,
    )
