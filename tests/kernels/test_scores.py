"""`text_weights` and `vision_scores`: references against a double loop, kernels against the references."""

import pytest
import torch
from tgvkv_kernels.text_weights import text_weights
from tgvkv_kernels.vision_scores import vision_scores

from tests.kernels.kernel_support import assert_close_to_oracle, attention_lse, generator, normal, poisoned_storage

DTYPES = ("float32", "float16", "bfloat16")
HEAD_DIMS = (64, 80, 96, 128, 256)
GROUPS = (1, 4, 8)


def text_case(seed, tokens, group, head_dim, dtype, kv_heads=2):
    """Text of a prompt whose first ten tokens are context that takes part of each row's attention."""
    gen = generator(seed)
    q = normal(gen, tokens, group * kv_heads, head_dim, dtype=dtype)
    keys = normal(gen, 10 + tokens, kv_heads, head_dim, dtype=dtype)
    scale = head_dim**-0.5
    visible = torch.arange(10 + tokens)[None, :] <= 10 + torch.arange(tokens)[:, None]
    return q, keys[10:], attention_lse(q, keys, visible, scale), scale


def vision_case(seed, tokens, vision, group, head_dim, dtype, kv_heads=2):
    """Vision tokens scattered over poisoned storage; text and vision positions interleave, so the mask matters."""
    gen = generator(seed)
    slots = 3 * vision + 5
    units = torch.randperm(slots, generator=gen)[:vision].to(torch.int32)
    k_flat = poisoned_storage(gen, slots, kv_heads, head_dim, dtype, units)
    q = normal(gen, tokens, group * kv_heads, head_dim, dtype=dtype)
    positions = torch.randperm(tokens + vision + 3, generator=gen)
    q_pos, v_pos = positions[:tokens].sort().values, positions[tokens : tokens + vision]
    v_pos[-1] = q_pos[-1]  # a position does not see itself
    w = torch.rand(tokens, generator=gen)
    scale = head_dim**-0.5
    keys = torch.cat([normal(gen, 1, kv_heads, head_dim, dtype=dtype), k_flat[units.long()]])
    visible = torch.cat([torch.ones(tokens, 1, dtype=torch.bool), v_pos[None, :] < q_pos[:, None]], dim=1)
    return q, attention_lse(q, keys, visible, scale), w, k_flat, units, q_pos, v_pos, scale


def doubles(args):
    return [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]


def check_text(seed, tokens, group, head_dim, dtype_name):
    args = text_case(seed, tokens, group, head_dim, getattr(torch, dtype_name))
    exact = text_weights(*doubles(args))
    assert_close_to_oracle("w", text_weights(*args, backend="triton"), text_weights(*args), exact)


def check_vision(seed, tokens, vision, group, head_dim, dtype_name):
    args = vision_case(seed, tokens, vision, group, head_dim, getattr(torch, dtype_name))
    exact = vision_scores(*doubles(args))
    low, got = vision_scores(*args), vision_scores(*args, backend="triton")
    for name, g, lo, ex in zip(("scores", "mass"), got, low, exact, strict=True):
        assert_close_to_oracle(name, g, lo, ex)


def check_layouts(seed):
    """Inputs sliced out of a fused projection, int64 units in descending order, tensor parallel halves."""
    q, k, lse, scale = text_case(seed, 37, 4, 64, torch.float32, kv_heads=2)
    fused = torch.full((37, 8 * 64 + 2 * 64 + 7 * 64), float("nan"))
    fused[:, : 8 * 64], fused[:, 8 * 64 : 10 * 64] = q.flatten(1), k.flatten(1)
    q_view, k_view = fused[:, : 8 * 64].view(37, 8, 64), fused[:, 8 * 64 : 10 * 64].view(37, 2, 64)
    assert torch.equal(
        text_weights(q_view, k_view, lse, scale, backend="triton"), text_weights(q, k, lse, scale, backend="triton")
    )
    whole = text_weights(q, k, lse, scale)
    ranks = [
        text_weights(q[:, h], k[:, r : r + 1], lse[:, h], scale, total_q_heads=8, backend="triton")
        for r, h in enumerate((slice(0, 4), slice(4, 8)))
    ]
    torch.testing.assert_close(ranks[0] + ranks[1], whole, rtol=1e-5, atol=1e-7)

    q, lse, w, k_flat, units, q_pos, v_pos, scale = vision_case(seed, 21, 70, 4, 64, torch.float32)
    whole = vision_scores(q, lse, w, k_flat, units, q_pos, v_pos, scale)
    flipped = vision_scores(q, lse, w, k_flat, units.flip(0).long(), q_pos, v_pos.flip(0), scale, backend="triton")
    torch.testing.assert_close(flipped[0].flip(0), whole[0], rtol=1e-5, atol=1e-7)
    ranks = [
        vision_scores(
            q[:, h], lse[:, h], w, k_flat[:, r : r + 1].contiguous(), units, q_pos, v_pos, scale,
            total_q_heads=8, backend="triton",
        )
        for r, h in enumerate((slice(0, 4), slice(4, 8)))
    ]  # fmt: skip
    for part in range(2):
        torch.testing.assert_close(ranks[0][part] + ranks[1][part], whole[part], rtol=1e-5, atol=1e-7)


def check_empty():
    q, k, lse, scale = text_case(0, 3, 4, 64, torch.float32)
    assert text_weights(q[:0], k[:0], lse[:0], scale, backend="triton").shape == (0,)
    q, lse, w, k_flat, units, q_pos, v_pos, scale = vision_case(0, 3, 5, 4, 64, torch.float32)
    scores, mass = vision_scores(q[:0], lse[:0], w[:0], k_flat, units, q_pos[:0], v_pos, scale, backend="triton")
    assert torch.equal(scores, torch.zeros(5)) and mass == 0
    scores, mass = vision_scores(q, lse, w, k_flat, units[:0], q_pos, v_pos[:0], scale, backend="triton")
    assert scores.shape == (0,) and mass == 0


def test_references_match_a_loop_over_pairs():
    q, k, lse, scale = text_case(1, 6, 4, 64, torch.float64)
    q2, lse2, w2, k_flat, units, q_pos, v_pos, _ = vision_case(2, 5, 7, 4, 64, torch.float64)
    expected_w = [0.0] * 6
    for t in range(6):
        for s in range(t, 6):
            heads = [torch.exp(q[s, h] @ k[t, h // 4] * scale - lse[s, h]) for h in range(8)]
            expected_w[t] += float(sum(heads)) / 8 / (6 - t)
    torch.testing.assert_close(text_weights(q, k, lse, scale), torch.tensor(expected_w, dtype=torch.float64))
    scores, mass = [0.0] * 7, 0.0
    for v in range(7):
        for t in range(5):
            if v_pos[v] < q_pos[t]:
                key = k_flat[units[v]]
                a = float(sum(torch.exp(q2[t, h] @ key[h // 4] * scale - lse2[t, h]) for h in range(8))) / 8
                scores[v] += float(w2[t]) * a
                mass += a
    got = vision_scores(q2, lse2, w2, k_flat, units, q_pos, v_pos, scale)
    torch.testing.assert_close(got[0], torch.tensor(scores, dtype=torch.float64))
    torch.testing.assert_close(got[1], torch.tensor(mass, dtype=torch.float64))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_kernels_match_references(interpreted, head_dim, group, dtype):
    interpreted(check_text, head_dim + group, 29, group, head_dim, dtype)
    interpreted(check_vision, head_dim + group, 13, 71, group, head_dim, dtype)


@pytest.mark.parametrize(("tokens", "vision"), [(1, 1), (1, 64), (2, 65), (64, 63), (130, 3), (17, 200)])
def test_kernels_at_block_edges(interpreted, tokens, vision):
    interpreted(check_text, tokens, tokens, 4, 64, "bfloat16")
    interpreted(check_vision, tokens, tokens, vision, 4, 64, "bfloat16")
    interpreted(check_vision, tokens, tokens, vision, 7, 64, "float32")  # a group that is no power of two


def test_strided_inputs_and_tensor_parallel_halves(interpreted):
    interpreted(check_layouts, 5)


def test_empty_inputs(interpreted):
    interpreted(check_empty)
