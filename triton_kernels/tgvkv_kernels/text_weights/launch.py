"""Launches of `text_weights`."""

import torch

from tgvkv_kernels.common.lse import LOG2_E
from tgvkv_kernels.common.tiles import ceil_div, column_blocks, row_splits
from tgvkv_kernels.text_weights.kernel import text_columns_kernel, text_reduce_kernel

REDUCE_BLOCK = 128


def launch_text_weights(
    q: torch.Tensor, k: torch.Tensor, lse_e: torch.Tensor, scale: float, total_q_heads: int
) -> torch.Tensor:
    """Checked arguments of `tgvkv_kernels.text_weights.api.text_weights`; two launches."""
    tokens, q_heads, head_dim = q.shape
    kv_heads = k.shape[1]
    weights = torch.empty(tokens, dtype=torch.float32, device=q.device)
    if tokens == 0:
        return weights
    k, lse_e = _rows_contiguous(k), lse_e.contiguous()
    blocks = column_blocks(head_dim, q.element_size())
    group = q_heads // kv_heads
    key_tiles = ceil_div(tokens, blocks["BN"])
    splits = row_splits(ceil_div(tokens * group, blocks["BM"]), key_tiles * kv_heads)
    partial = torch.empty(splits * kv_heads, tokens, dtype=torch.float32, device=q.device)
    text_columns_kernel[(key_tiles, kv_heads, splits)](
        q,
        k,
        lse_e,
        partial,
        tokens,
        float(scale) * LOG2_E,
        q.stride(0),
        q.stride(1),
        k.stride(0),
        lse_e.stride(0),
        G=group,
        D=head_dim,
        **blocks,
    )
    text_reduce_kernel[(ceil_div(tokens, REDUCE_BLOCK),)](
        partial, weights, tokens, splits * kv_heads, total_q_heads, BN=REDUCE_BLOCK
    )
    return weights


def _rows_contiguous(k: torch.Tensor) -> torch.Tensor:
    """Keys sliced out of a fused projection keep their token stride; only heads must lie next to each other."""
    return k if k.stride(1) == k.shape[2] else k.contiguous()
