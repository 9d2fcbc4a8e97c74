"""Lean training forwards over the parameters of a stock ``Qwen3VLForConditionalGeneration``.

They compute what transformers' modules compute (tests/training/test_demo_model.py compares them), but batch images of
different sizes with dropped tokens through the tower, and fold the two equal frames of a still picture into one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


def _rotate_half(x: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1)


def vision_forward(visual: nn.Module, pixels, patch_rc, grids, image) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Tower over N kept merged tokens -> merged ``[N, out]`` and the deepstack features (same shape each).

    pixels [N, 4, 768], patch_rc [N, 4, 2], grids [N, 2] patches a side, image [N] ascending image index.
    """
    config = visual.config
    n, side = pixels.shape[0], int(config.num_position_embeddings**0.5)
    weight = visual.patch_embed.proj.weight
    x = F.linear(pixels.reshape(n * 4, -1), weight.sum(dim=2).flatten(1), visual.patch_embed.proj.bias)
    x = x + _interpolated_positions(visual.pos_embed.weight, patch_rc, grids, side).reshape(n * 4, -1)
    angles = (patch_rc.reshape(-1, 2, 1) * visual.rotary_pos_emb.inv_freq).flatten(1)
    angles = torch.cat((angles, angles), dim=-1)

    counts = torch.bincount(image)
    longest, batch = int(counts.max()) * 4, len(counts)
    starts = torch.cumsum(counts, 0) - counts
    inside = torch.arange(n, device=image.device) - starts[image]
    slot = ((image * (longest // 4) + inside)[:, None] * 4 + torch.arange(4, device=image.device)).reshape(-1)
    mask = torch.zeros(batch * longest, dtype=torch.bool, device=x.device)
    mask[slot] = True
    even = bool(mask.all())
    mask = None if even else mask.view(batch, 1, 1, longest)

    def spread(t):
        return t if even else t.new_zeros(batch * longest, t.shape[-1]).index_copy(0, slot, t)

    cos, sin = (spread(a).view(batch, 1, longest, -1) for a in (angles.cos(), angles.sin()))
    x = spread(x).view(batch, longest, -1)
    deep = []
    for i, block in enumerate(visual.blocks):
        attention = block.attn
        qkv = attention.qkv(block.norm1(x)).view(batch, longest, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = q * cos + _rotate_half(q) * sin, k * cos + _rotate_half(k) * sin
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + attention.proj(y.transpose(1, 2).reshape(batch, longest, -1))
        x = x + block.mlp(block.norm2(x))
        if i in visual.deepstack_visual_indexes:
            merger = visual.deepstack_merger_list[visual.deepstack_visual_indexes.index(i)]
            deep.append(merger(x.reshape(batch * longest, -1)[slot]))
    return visual.merger(x.reshape(batch * longest, -1)[slot]), deep


def _interpolated_positions(table, patch_rc, grids, side):
    where = patch_rc * (side - 1) / (grids - 1).clamp(min=1)[:, None, :]  # [N, 4, 2] in table cells
    low = where.floor().long().clamp(max=side - 1)
    high, part = (low + 1).clamp(max=side - 1), (where - low)[..., None]
    (r0, c0), (r1, c1) = low.unbind(-1), high.unbind(-1)
    pr, pc = part.unbind(-2)
    top = table[r0 * side + c0] * (1 - pc) + table[r0 * side + c1] * pc
    bottom = table[r1 * side + c0] * (1 - pc) + table[r1 * side + c1] * pc
    return top * (1 - pr) + bottom * pr


def _norm(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, (x.shape[-1],), module.weight, module.variance_epsilon)


def layer_forward(layer: nn.Module, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor):
    attention = layer.self_attn
    b, s, _ = x.shape
    h = _norm(layer.input_layernorm, x)
    q = _norm(attention.q_norm, attention.q_proj(h).view(b, s, -1, attention.head_dim)).transpose(1, 2)
    k = _norm(attention.k_norm, attention.k_proj(h).view(b, s, -1, attention.head_dim)).transpose(1, 2)
    v = attention.v_proj(h).view(b, s, -1, attention.head_dim).transpose(1, 2)
    q, k = q * cos + _rotate_half(q) * sin, k * cos + _rotate_half(k) * sin
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    x = x + attention.o_proj(y.transpose(1, 2).reshape(b, s, -1))
    h = _norm(layer.post_attention_layernorm, x)
    return x + layer.mlp.down_proj(F.silu(layer.mlp.gate_proj(h)) * layer.mlp.up_proj(h)), q, k


def look_loss(q: torch.Tensor, k: torch.Tensor, looks: torch.Tensor, heads: tuple[int, ...]) -> torch.Tensor:
    """Mean -log of the attention mass that ``heads`` (averaged) of one layer put on the next token's evidence.

    q, k ``[B, H, S, d]`` after rotary; looks ``[P, 3]`` (batch, query position, key position), several keys a query.
    """
    s = q.shape[2]
    q, k = q[:, heads], k[:, heads]
    scores = (q.float() @ k.float().transpose(-1, -2)) * q.shape[-1] ** -0.5
    future = torch.ones(s, s, dtype=torch.bool, device=q.device).triu(1)
    weights = scores.float().masked_fill(future, float("-inf")).softmax(-1).mean(1).float()
    row, where = torch.unique(looks[:, 0] * s + looks[:, 1], return_inverse=True)
    mass = torch.zeros(len(row), device=q.device).index_add(0, where, weights[looks[:, 0], looks[:, 1], looks[:, 2]])
    return -(mass + 1e-4).log().mean()


def text_forward(
    text: nn.Module,
    ids,
    positions,
    vision,
    vision_embeds,
    deep=(),
    layer_fn=layer_forward,
    looks=None,
    look_at=(),
    taps=None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal forward over right-padded sequences -> final hidden states ``[B, S, hidden]`` and the look loss.

    ``look_at``: pairs (layer, heads) whose attention is taught where the evidence lies. ``taps``: a dict whose keys are
    layers; their outputs at the vision tokens ``[N, hidden]`` are put in.
    """
    look = torch.zeros((), device=ids.device)
    x = text.embed_tokens(ids).index_put((vision[:, 0], vision[:, 1]), vision_embeds)
    cos, sin = (a.unsqueeze(1) for a in text.rotary_emb(x, positions))
    for i, layer in enumerate(text.layers):
        x, q, k = layer_fn(layer, x, cos, sin)
        if taps is not None and i in taps:
            taps[i] = x[vision[:, 0], vision[:, 1]]
        for at, heads in look_at:
            if at == i:
                look = look + look_loss(q, k, looks, heads)
        if i < len(deep):
            x = x.index_put((vision[:, 0], vision[:, 1]), deep[i], accumulate=True)
    return _norm(text.norm, x), look
