"""`vision_scores` in plain torch; defines correctness."""

import torch

from tgvkv_kernels.common.lse import compute_dtype

QUERY_CHUNK = 64  # bounds the score matrix at [Hq, 64, V]


def vision_scores_reference(
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
    """See `tgvkv_kernels.vision_scores.api.vision_scores`; float64 for float64 inputs, else float32."""
    tokens, q_heads, _ = q.shape
    dtype = compute_dtype(q)
    keys = k_flat[units.long()].to(dtype).repeat_interleave(q_heads // k_flat.shape[1], dim=1)
    keys = keys.permute(1, 2, 0)  # [Hq, D, V]
    scores = torch.zeros(units.shape[0], dtype=dtype, device=q.device)
    mass = torch.zeros((), dtype=dtype, device=q.device)
    for start in range(0, tokens, QUERY_CHUNK):
        rows = slice(start, start + QUERY_CHUNK)
        logits = q[rows].to(dtype).transpose(0, 1) @ keys * scale  # [Hq, rows, V]
        attention = torch.exp(logits - lse_e[rows].to(dtype).T[..., None])
        visible = v_pos[None, :] < q_pos[rows, None]
        attention = torch.where(visible, attention, 0.0).sum(dim=0) / total_q_heads  # [rows, V]
        scores += w[rows].to(dtype) @ attention
        mass += attention.sum()
    return scores, mass
