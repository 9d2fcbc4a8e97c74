"""`batch_scores` in plain torch: each request and layer by itself. Defines correctness."""

from collections.abc import Iterator

import torch

from tgvkv_kernels.common.lse import LN2, compute_dtype

QUERY_CHUNK = 64  # bounds the score matrix at [Hq, 64, keys]


def attention_chunks(q, lse_b2, keys, visible, scale) -> Iterator[tuple[slice, torch.Tensor]]:
    """``exp(q.k*scale - lse)`` of a request's layer, 0 where not visible: query rows, and ``[Hq, rows, n]`` of them.

    ``q [T, Hq, D]``, ``lse_b2 [T, Hq]``, ``keys [n, Hkv, D]``, ``visible [T, n]``.
    """
    dtype = compute_dtype(q)
    wide = keys.to(dtype).repeat_interleave(q.shape[1] // keys.shape[1], dim=1).permute(1, 2, 0)  # [Hq, D, n]
    for start in range(0, q.shape[0], QUERY_CHUNK):
        rows = slice(start, start + QUERY_CHUNK)
        logits = q[rows].to(dtype).transpose(0, 1) @ wide * scale  # [Hq, rows, n]
        attention = torch.exp(logits - (lse_b2[rows].to(dtype) * LN2).T[..., None])
        yield rows, torch.where(visible[rows], attention, 0.0)


def batch_text_weights_reference(plan, q, lse_b2, k_flat, slots, layers, heads) -> torch.Tensor:
    """See `tgvkv_kernels.batch_scores.api.batch_text_weights`; ``layers [L]``: unit of slot 0, and scale."""
    weights = []
    for layer, (base, scale) in enumerate(layers):
        for rows in _slices(plan.text_lens):
            keys = k_flat[slots[rows].long() + base]
            token = torch.arange(rows.stop - rows.start, device=q.device)
            visible = token[None, :] <= token[:, None]
            chunks = attention_chunks(q[layer, rows], lse_b2[layer, rows], keys, visible, scale)
            sums = sum(attention.sum(0).sum(0) for _, attention in chunks) / heads
            weights.append(sums / (token.shape[0] - token))
    return torch.cat(weights).view(q.shape[:2])


def batch_vision_scores_reference(
    plan, q, lse_b2, w, k_flat, slots, layers, heads
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `tgvkv_kernels.batch_scores.api.batch_vision_scores`; ``layers [L]``: unit of slot 0, and scale."""

    def score(column, own, rows, attention):
        return column + w[own][rows].to(attention.dtype) @ attention.sum(0) / heads

    return _vision_columns(plan, q, lse_b2, k_flat, slots, layers, heads, score)


def batch_peak_scores_reference(
    plan, q, lse_b2, k_flat, slots, layers, heads, power
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `tgvkv_kernels.batch_scores.api.batch_peak_scores`; ``layers [L]``: unit of slot 0, and scale."""

    def score(column, own, rows, attention):
        if power is None:
            return torch.maximum(column, attention.amax((0, 1)))
        return column + (attention**power).sum((0, 1))

    return _vision_columns(plan, q, lse_b2, k_flat, slots, layers, heads, score)


def _vision_columns(plan, q, lse_b2, k_flat, slots, layers, heads, score):
    """Scores and masses; ``score(column [n], own, rows, attention [Hq, rows, n])`` takes in some query rows: ``own``
    selects the layer and request in the stash, ``rows`` them in the request."""
    scores, masses = [], []
    for layer, (base, scale) in enumerate(layers):
        for tokens, columns in zip(_slices(plan.text_lens), _slices(plan.vision_lens), strict=True):
            keys = k_flat[slots[columns].long() + base]
            token = torch.arange(tokens.stop - tokens.start, device=q.device)
            visible = plan.first_text[None, columns] <= token[:, None]
            own = (layer, tokens)
            column = torch.zeros(len(keys), dtype=compute_dtype(q), device=q.device)
            mass = column.new_zeros(())
            for rows, attention in attention_chunks(q[own], lse_b2[own], keys, visible, scale):
                column = score(column, own, rows, attention)
                mass = mass + attention.sum() / heads
            scores.append(column)
            masses.append(torch.where(column.isfinite().all(), mass, torch.nan))
    return torch.cat(scores).view(len(layers), -1), torch.stack(masses).view(len(layers), -1)


def _slices(lengths) -> list[slice]:
    ends, end = [], 0
    for length in lengths:
        ends.append(slice(end, end + length))
        end += length
    return ends
