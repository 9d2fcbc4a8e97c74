"""`text_weights` in plain torch; defines correctness."""

import torch

from tgvkv_kernels.common.lse import compute_dtype

QUERY_CHUNK = 256  # bounds the score matrix at [Hq, 256, T]


def text_weights_reference(
    q: torch.Tensor, k: torch.Tensor, lse_e: torch.Tensor, scale: float, total_q_heads: int
) -> torch.Tensor:
    """See `tgvkv_kernels.text_weights.api.text_weights`; returns float64 for float64 inputs, else float32."""
    tokens, q_heads, _ = q.shape
    dtype = compute_dtype(q)
    keys = k.to(dtype).repeat_interleave(q_heads // k.shape[1], dim=1).permute(1, 2, 0)  # [Hq, D, T]
    position = torch.arange(tokens, device=q.device)
    column_sum = torch.zeros(tokens, dtype=dtype, device=q.device)
    for start in range(0, tokens, QUERY_CHUNK):
        rows = slice(start, start + QUERY_CHUNK)
        logits = q[rows].to(dtype).transpose(0, 1) @ keys * scale  # [Hq, rows, T]
        attention = torch.exp(logits - lse_e[rows].to(dtype).T[..., None])
        causal = position[None, :] <= position[rows, None]
        column_sum += torch.where(causal, attention, 0.0).sum(dim=(0, 1))
    return column_sum / total_q_heads / (tokens - position).to(dtype)
