"""`batch_scores` in plain torch: each request and layer by itself. Defines correctness."""

import torch

from tgvkv_kernels.common.lse import LN2, compute_dtype

QUERY_CHUNK = 64  # bounds the score matrix at [Hq, 64, keys]


def column_sums(
    q: torch.Tensor,
    lse_b2: torch.Tensor,
    w: torch.Tensor | None,
    keys: torch.Tensor,
    visible: torch.Tensor,
    scale: float,
    total_q_heads: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``sum_t w_t A[t, n]`` (``w`` None: 1) and ``sum A`` over visible pairs, ``A`` the mean over ``total_q_heads``.

    ``q [T, Hq, D]``, ``lse_b2 [T, Hq]``, ``keys [n, Hkv, D]``, ``visible [T, n]`` -> ``([n], [])``.
    """
    dtype = compute_dtype(q)
    wide = keys.to(dtype).repeat_interleave(q.shape[1] // keys.shape[1], dim=1).permute(1, 2, 0)  # [Hq, D, n]
    columns = torch.zeros(keys.shape[0], dtype=dtype, device=q.device)
    mass = torch.zeros((), dtype=dtype, device=q.device)
    for start in range(0, q.shape[0], QUERY_CHUNK):
        rows = slice(start, start + QUERY_CHUNK)
        logits = q[rows].to(dtype).transpose(0, 1) @ wide * scale  # [Hq, rows, n]
        attention = torch.exp(logits - (lse_b2[rows].to(dtype) * LN2).T[..., None])
        attention = torch.where(visible[rows], attention, 0.0).sum(dim=0) / total_q_heads  # [rows, n]
        weights = torch.ones(attention.shape[0], dtype=dtype, device=q.device) if w is None else w[rows].to(dtype)
        columns += weights @ attention
        mass += attention.sum()
    return columns, mass


def batch_text_weights_reference(plan, q, lse_b2, k_flat, slots, first_unit, scale, heads) -> torch.Tensor:
    """See `tgvkv_kernels.batch_scores.api.batch_text_weights`; ``first_unit [L]``: unit of each layer's slot 0."""
    weights = []
    for layer, base in enumerate(first_unit):
        for rows in _slices(plan.text_lens):
            keys = k_flat[slots[rows].long() + base]
            token = torch.arange(rows.stop - rows.start, device=q.device)
            visible = token[None, :] <= token[:, None]
            sums, _ = column_sums(q[layer, rows], lse_b2[layer, rows], None, keys, visible, scale, heads)
            weights.append(sums / (token.shape[0] - token))
    return torch.cat(weights).view(q.shape[:2])


def batch_vision_scores_reference(
    plan, q, lse_b2, w, k_flat, slots, first_unit, scale, heads
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `tgvkv_kernels.batch_scores.api.batch_vision_scores`; ``first_unit [L]``: unit of each layer's slot 0."""
    scores, masses = [], []
    for layer, base in enumerate(first_unit):
        for rows, columns in zip(_slices(plan.text_lens), _slices(plan.vision_lens), strict=True):
            keys = k_flat[slots[columns].long() + base]
            token = torch.arange(rows.stop - rows.start, device=q.device)
            visible = plan.first_text[None, columns] <= token[:, None]
            own = q[layer, rows], lse_b2[layer, rows], w[layer, rows]
            score, mass = column_sums(*own, keys, visible, scale, heads)
            scores.append(score)
            masses.append(mass)
    layers = q.shape[0]
    return torch.cat(scores).view(layers, -1), torch.stack(masses).view(layers, -1)


def _slices(lengths) -> list[slice]:
    ends, end = [], 0
    for length in lengths:
        ends.append(slice(end, end + length))
        end += length
    return ends
