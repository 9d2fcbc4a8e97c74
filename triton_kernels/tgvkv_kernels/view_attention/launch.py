"""Launches of `view_attention`."""

import torch

from tgvkv_kernels.common.lse import LOG2_E
from tgvkv_kernels.common.tiles import MIN_DOT, block_dim, ceil_div, next_power_of_2
from tgvkv_kernels.view_attention.kernel import view_decode_kernel, view_merge_kernel, view_prefill_kernel

# A chunk is a program's work in decode: 256 units are 4 steps of 64, enough to fill the pipeline and little enough that
# a layer whose budget is ten times the mean is spread over as many programs.
CHUNK = 256
MAX_CHUNKS = 16  # of a request; beyond 4096 units a layer they grow instead. Bounds the partial results.
DECODE_PROGRAMS = 4 * 132  # four a multiprocessor of an H200; programs take further chunks in turn
REQUEST_BLOCK = 256  # requests that a program counts chunks of at once
PREFILL_LANES = 64  # query rows x group of one tile when rows share a request, for storage rows up to 256 bytes
MERGE_HEADS = 4


def decode_config(group: int, head_dim: int, itemsize: int) -> dict[str, int]:
    """Tile sizes and launch options of one chunk of one request.

    Units per step: 64, halved for each doubling of the storage row beyond 256 bytes. Decode waits on memory: with 5
    stages Triton 3.6 keeps two K and two V tiles in flight (64 KB; with 3 or 4 only one, because the unit ids are
    loaded first).
    """
    return {
        "BM": max(MIN_DOT, next_power_of_2(group)),
        **_unit_tile(head_dim, itemsize),
        "BB": REQUEST_BLOCK,
        "CHUNK": CHUNK,
        "MAX_CHUNKS": MAX_CHUNKS,
        "num_warps": 8 if itemsize == 4 else 4,
        "num_stages": 5,
    }


def prefill_config(group: int, head_dim: int, itemsize: int) -> dict[str, int]:
    """Tile sizes and launch options of as many query rows as fill 64 lanes (32 where storage rows are long)."""
    wanted = PREFILL_LANES if block_dim(head_dim) * itemsize <= 256 else PREFILL_LANES // 2
    lanes = max(MIN_DOT, next_power_of_2(group), wanted)
    return {"ROWS": lanes // group, "BM": lanes, **_unit_tile(head_dim, itemsize), "num_warps": 8, "num_stages": 3}


def _unit_tile(head_dim: int, itemsize: int) -> dict[str, int]:
    width = block_dim(head_dim)
    return {"BN": max(MIN_DOT, 64 * 256 // max(width * itemsize, 256)), "BD": width}


def most_chunks(batch: int, units: int) -> int:
    """Upper bound of a batch's chunks in one layer, from shapes alone (``units``: entries of the unit table)."""
    return min(batch * MAX_CHUNKS, batch + units // CHUNK)


def launch_view_attention(
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
    """Checked arguments of `tgvkv_kernels.view_attention.api.view_attention`; one launch, in decode two (one
    while the unit table has no more than one chunk).

    The grids depend on shapes alone, so a CUDA graph may replay them with other units and bounds.
    """
    rows, q_heads, head_dim = q.shape
    kv_heads = k_flat.shape[1]
    group, itemsize = q_heads // kv_heads, q.element_size()
    scale_log2 = float(scale) * LOG2_E
    out_strides = (*out.stride()[:2], lse_b2.stride(0))
    strides = (*q.stride()[:2], k_flat.stride(0), v_flat.stride(0), *out_strides)
    if row_to_request is not None:
        config = prefill_config(group, head_dim, itemsize)
        view_prefill_kernel[(ceil_div(rows, config["ROWS"]), kv_heads)](
            q, k_flat, v_flat, units, indptr, row_to_request, out, lse_b2, rows, scale_log2, float(v_scale), *strides,
            G=group, D=head_dim, **config,
        )  # fmt: skip
        return
    parts = min(MAX_CHUNKS, ceil_div(units.shape[0], CHUNK))  # a request has no more chunks than this table holds
    part_out = torch.empty(parts, rows, q_heads, head_dim, dtype=torch.float32, device=q.device)
    part_lse = torch.empty(parts, rows, q_heads, dtype=torch.float32, device=q.device)
    config = decode_config(group, head_dim, itemsize)
    programs = min(most_chunks(rows, units.shape[0]), ceil_div(DECODE_PROGRAMS, kv_heads))
    view_decode_kernel[(programs, kv_heads)](
        q, k_flat, v_flat, units, indptr, out, lse_b2, part_out, part_lse, rows, scale_log2,
        float(v_scale), *strides,
        G=group, D=head_dim, **config,
    )  # fmt: skip
    if parts == 1:
        return
    view_merge_kernel[(rows, ceil_div(q_heads, MERGE_HEADS))](
        indptr, part_out, part_lse, out, lse_b2, rows, *out_strides,
        H=q_heads, D=head_dim, BD=config["BD"], BH=MERGE_HEADS, CHUNK=CHUNK, MAX_CHUNKS=MAX_CHUNKS, num_warps=1,
    )  # fmt: skip
