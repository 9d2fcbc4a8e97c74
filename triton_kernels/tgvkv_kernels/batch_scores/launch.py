"""Launches of `batch_scores`."""

import torch

from tgvkv_kernels.batch_scores.kernel import column_reduce_kernel, column_sums_kernel
from tgvkv_kernels.batch_scores.plan import KEY_CHUNK, REDUCE_BLOCK, ScorePlan
from tgvkv_kernels.common.lse import LOG2_E
from tgvkv_kernels.common.tiles import MIN_DOT, block_dim

KINDS = ("text", "weighted", "peak", "peak4")  # `batch_text_weights`, `batch_vision_scores`, `batch_peak_scores`


def column_config(row_tile: int, head_dim: int, itemsize: int) -> dict[str, int]:
    """Tile sizes and launch options of `column_sums_kernel`.

    64 keys a step, fewer where a storage row is longer than 256 bytes. Keys wait on their slots: with 5 stages Triton
    3.6 keeps two key tiles in flight beside the rows that stay. Eight warps, not four, because each thread holds the
    LSE and the weight of its share of the rows: 128 rows over four warps would take 200 registers.
    """
    width = block_dim(head_dim)
    return {
        "BM": row_tile,
        "BN": max(MIN_DOT, 64 * 256 // max(width * itemsize, 256)),
        "BD": width,
        "KEYS": KEY_CHUNK,
        "num_warps": 8,
        "num_stages": 5,
    }


def launch_column_sums(
    kind: str,
    plan: ScorePlan,
    q: torch.Tensor,
    lse_b2: torch.Tensor,
    w: torch.Tensor | None,
    k_flat: torch.Tensor,
    k_scales: torch.Tensor | None,
    slots: torch.Tensor,
    first_layer: int,
    slots_per_layer: int,
    scale: float,
    total_q_heads: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Checked arguments of the three apis; two launches. ``kind``: one of `KINDS`; ``w``: of "weighted" only.

    Returns:
        Weights (twice) of kind "text", else scores and masses.
    """
    layers, tokens, q_heads, head_dim = q.shape
    text, device = kind == "text", q.device
    pieces = plan.text if text else plan.vision
    kv_heads, requests, count = k_flat.shape[1], len(plan.text_lens), pieces.work.shape[0]
    group = q_heads // kv_heads
    part = torch.empty(layers, kv_heads * pieces.partials, dtype=torch.float32, device=device)
    mass_part = part if text else torch.empty(layers, count, kv_heads, dtype=torch.float32, device=device)
    out = torch.empty(layers, pieces.keys, dtype=torch.float32, device=device)
    mass = out if text else torch.empty(layers, requests, dtype=torch.float32, device=device)
    config = column_config(plan.row_tile, head_dim, q.element_size())
    column_sums_kernel[(count, kv_heads, layers)](
        pieces.work, q, lse_b2, lse_b2 if w is None else w, k_flat, k_scales, slots, plan.first_text, part, mass_part,
        tokens, pieces.partials, first_layer, slots_per_layer, float(scale) * LOG2_E, k_flat.stride(0),
        G=group, D=head_dim, KIND=kind, **config,
    )  # fmt: skip
    column_reduce_kernel[(pieces.sums.shape[0], layers)](
        pieces.sums, part, mass_part, out, mass, pieces.partials, pieces.keys, requests, count, total_q_heads, kv_heads,
        G=group, BM=config["BM"], BN=REDUCE_BLOCK, KIND=kind, num_warps=4,
    )  # fmt: skip
    return out, mass
