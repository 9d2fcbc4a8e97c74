"""Launches of `vision_scores`."""

import torch

from tgvkv_kernels.common.lse import LOG2_E
from tgvkv_kernels.common.tiles import ceil_div, column_blocks, row_splits
from tgvkv_kernels.vision_scores.kernel import vision_columns_kernel, vision_reduce_kernel

REDUCE_BLOCK = 256


def launch_vision_scores(
    q: torch.Tensor,
    lse_e: torch.Tensor,
    w: torch.Tensor,
    k_flat: torch.Tensor,
    units: torch.Tensor,
    q_pos: torch.Tensor,
    v_pos: torch.Tensor,
    scale: float,
    total_q_heads: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Checked arguments of `tgvkv_kernels.vision_scores.api.vision_scores`; two launches."""
    tokens, q_heads, head_dim = q.shape
    vision, kv_heads = units.shape[0], k_flat.shape[1]
    scores = torch.empty(vision, dtype=torch.float32, device=q.device)
    mass = torch.empty((), dtype=torch.float32, device=q.device)
    if tokens == 0 or vision == 0:
        return scores.zero_(), mass.zero_()
    lse_e, w, units, q_pos, v_pos = (tensor.contiguous() for tensor in (lse_e, w, units, q_pos, v_pos))
    blocks = column_blocks(head_dim, q.element_size())
    group = q_heads // kv_heads
    key_tiles = ceil_div(vision, blocks["BN"])
    splits = row_splits(ceil_div(tokens * group, blocks["BM"]), key_tiles * kv_heads)
    parts = splits * kv_heads
    partial = torch.empty(parts, vision, dtype=torch.float32, device=q.device)
    mass_partial = torch.empty(key_tiles, parts, dtype=torch.float32, device=q.device)
    vision_columns_kernel[(key_tiles, kv_heads, splits)](
        q,
        lse_e,
        w,
        k_flat,
        units,
        q_pos,
        v_pos,
        partial,
        mass_partial,
        tokens,
        vision,
        float(scale) * LOG2_E,
        q.stride(0),
        q.stride(1),
        k_flat.stride(0),
        lse_e.stride(0),
        G=group,
        D=head_dim,
        **blocks,
    )
    vision_reduce_kernel[(ceil_div(vision, REDUCE_BLOCK),)](
        partial, mass_partial, scores, mass, vision, parts, mass_partial.numel(), total_q_heads, BN=REDUCE_BLOCK
    )
    return scores, mass
