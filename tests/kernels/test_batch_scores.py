"""`stash_rows` and `batch_scores`: references against a loop over pairs, kernels against the references, bits that do
not depend on the batch, the layer block or the prompt's chunks."""

import math

import pytest
import torch
from tgvkv_kernels.batch_scores import ScorePlan, batch_peak_scores, batch_text_weights, batch_vision_scores
from tgvkv_kernels.common.errors import KernelInputError
from tgvkv_kernels.common.lse import LOG2_E
from tgvkv_kernels.stash_rows import stash_rows

from tests.kernels.kernel_support import (
    assert_close_to_oracle,
    assert_same_bits,
    attention_lse,
    generator,
    normal,
    poisoned_storage,
)

DTYPES = ("float32", "float16", "bfloat16")
HEAD_DIMS = (64, 80, 96, 128, 256)
GROUPS = (1, 4, 8)
SLOTS = 500
KV_HEADS = 2


class Batch:
    """Scoring requests whose text and vision interleave (so the mask matters), in poisoned storage of some layers."""

    def __init__(self, seed, lengths, layers, group, head_dim, dtype, kv_dtype=None, k_scales=None):
        gen = generator(seed)
        self.layers, self.scale, self.group = layers, head_dim**-0.5, group
        used = torch.randperm(SLOTS, generator=gen)
        self.text, self.vision, slots = [], [], []
        for tokens, vision in lengths:
            order = torch.randperm(tokens + vision + 3, generator=gen)
            self.text.append(order[:tokens].sort().values)
            self.vision.append(order[tokens : tokens + vision])
            slots.append((used[:tokens], used[tokens : tokens + vision]))
            used = used[tokens + vision :]
        self.text_slots, self.vision_slots = (torch.cat([own[kind] for own in slots]) for kind in range(2))
        every = torch.cat([self.text_slots, self.vision_slots])
        units = (torch.arange(layers)[:, None] * SLOTS + every).flatten()
        self.k_flat = poisoned_storage(gen, layers * SLOTS, KV_HEADS, head_dim, kv_dtype or dtype, units)
        self.k_scales = k_scales
        total = sum(tokens for tokens, _ in lengths)
        self.q = normal(gen, layers, total, group * KV_HEADS, head_dim, dtype=dtype)
        self.lse_b2 = torch.stack([self._lse(layer, slots) for layer in range(layers)])
        self.w = torch.rand(layers, total, generator=gen)

    def _lse(self, layer, slots):
        """A row's own log-sum-exp over the keys it sees (its own among them), base 2."""
        parts, start = [], 0
        for text, vision, (text_slots, vision_slots) in zip(self.text, self.vision, slots, strict=True):
            keys = self.true_keys()[torch.cat([text_slots, vision_slots]) + layer * SLOTS]
            visible = torch.cat([text, vision])[None, :] <= text[:, None]
            rows = slice(start, start + len(text))
            parts.append(attention_lse(self.q[layer, rows], keys, visible, self.scale) * LOG2_E)
            start += len(text)
        return torch.cat(parts)

    def true_keys(self):
        """K as the model made it, in float64."""
        factors = torch.ones(self.layers) if self.k_scales is None else self.k_scales
        return self.k_flat.double() * factors.double().repeat_interleave(SLOTS)[:, None, None]

    def plan(self):
        heads = KV_HEADS * self.group
        return ScorePlan(self.text, self.vision, heads, KV_HEADS, self.q.shape[-1], self.q.dtype, "cpu")

    def run(self, backend, first=0, last=None, double=False, **options):
        """What `NAMES` says, of layers ``first..last``."""
        block = slice(first, self.layers if last is None else last)
        q, lse_b2, w, k_flat, k_scales = self.q[block], self.lse_b2[block], self.w[block], self.k_flat, self.k_scales
        if double:
            q, lse_b2, w, k_flat, k_scales = q.double(), lse_b2.double(), w.double(), self.true_keys(), None
        options = {"backend": backend, "k_scales": k_scales, **options}
        where = (first, SLOTS, self.scale)
        plan = self.plan()
        weights = batch_text_weights(plan, q, lse_b2, k_flat, self.text_slots, *where, **options)
        results = [*batch_vision_scores(plan, q, lse_b2, w, k_flat, self.vision_slots, *where, **options)]
        for power in (None, 4):
            given = {"power": power, **options}
            results += batch_peak_scores(plan, q, lse_b2, k_flat, self.vision_slots, *where, **given)
        return weights, *results


NAMES = ("weights", "scores", "masses", "peaks", "masses beside peaks", "powers", "masses beside powers")


def compare(batch):
    exact, low, got = batch.run("reference", double=True), batch.run("reference"), batch.run("triton")
    for name, g, lo, ex in zip(NAMES, got, low, exact, strict=True):
        factor = 16 if name == "powers" else 4  # a fourth power has four times the relative error
        assert_close_to_oracle(name, g, lo, ex, factor)


def check_grid(seed, group, head_dim, dtype_name):
    compare(Batch(seed, [(5, 30), (19, 71)], 2, group, head_dim, getattr(torch, dtype_name)))


def check_quantised(kv_dtype_name, dtype_name):
    """K of 8 bits beside queries of more, each layer's divided by something else; blocks of layers keep the bits."""
    kinds = getattr(torch, dtype_name), getattr(torch, kv_dtype_name)
    batch = Batch(8, [(5, 30), (19, 71)], 3, 4, 80, *kinds, torch.tensor([0.5, 1.7, 0.03]))
    compare(batch)
    whole = batch.run("triton")
    for name, got, want in zip(NAMES, batch.run("triton", 1, 3), whole, strict=True):
        assert_same_bits(f"{name} of layers 1..3", got, want[1:3])


def check_edges(lengths):
    compare(Batch(1, lengths, 1, 4, 64, torch.bfloat16))
    compare(Batch(2, lengths, 1, 7, 64, torch.float32))  # a group that is no power of two


def check_small_chunks():
    """More keys than a piece of work and than a reducing block."""
    from tgvkv_kernels.batch_scores import launch, plan

    kept = plan.KEY_CHUNK, plan.REDUCE_BLOCK
    try:
        plan.KEY_CHUNK = launch.KEY_CHUNK = 64
        plan.REDUCE_BLOCK = launch.REDUCE_BLOCK = 32
        compare(Batch(3, [(70, 130), (2, 65)], 1, 4, 64, torch.bfloat16))
    finally:
        plan.KEY_CHUNK, plan.REDUCE_BLOCK = launch.KEY_CHUNK, launch.REDUCE_BLOCK = kept


def check_same_bits_alone_and_in_blocks():
    lengths = [(5, 30), (40, 71), (1, 1)]
    batch = Batch(4, lengths, 3, 4, 64, torch.bfloat16)
    whole = batch.run("triton")
    for first, last in ((0, 1), (1, 3)):
        for name, got, want in zip(NAMES, batch.run("triton", first, last), whole, strict=True):
            assert_same_bits(f"{name} of layers {first}..{last}", got, want[first:last])
    text = vision = 0
    for request, (tokens, columns) in enumerate(lengths):
        alone = Batch.__new__(Batch)
        alone.__dict__ = dict(batch.__dict__)
        rows, cols = slice(text, text + tokens), slice(vision, vision + columns)
        alone.text, alone.vision = [batch.text[request]], [batch.vision[request]]
        alone.text_slots, alone.vision_slots = batch.text_slots[rows], batch.vision_slots[cols]
        alone.q, alone.lse_b2, alone.w = (t[:, rows].contiguous() for t in (batch.q, batch.lse_b2, batch.w))
        of_column, of_mass = (slice(None), cols), (slice(None), slice(request, request + 1))
        of = (slice(None), rows), *(3 * [of_column, of_mass])
        for name, got, want, own in zip(NAMES, alone.run("triton"), whole, of, strict=True):
            assert_same_bits(f"{name} of request {request} alone", got, want[own])
        text, vision = text + tokens, vision + columns


def check_tensor_parallel_halves():
    batch = Batch(5, [(9, 40)], 2, 4, 64, torch.float32)
    whole = batch.run("reference")
    parts = []
    for rank in range(KV_HEADS):
        half = Batch.__new__(Batch)
        half.__dict__ = dict(batch.__dict__)
        heads = slice(rank * 4, rank * 4 + 4)
        half.q, half.lse_b2 = batch.q[:, :, heads].contiguous(), batch.lse_b2[:, :, heads].contiguous()
        half.k_flat = batch.k_flat[:, rank : rank + 1].contiguous()
        half.plan = lambda half=half: ScorePlan(half.text, half.vision, 4, 1, 64, torch.float32, "cpu")
        parts.append(half.run("triton", total_q_heads=8))
    for name, first, second, want in zip(NAMES, *parts, whole, strict=True):
        both = torch.maximum(first, second) if name == "peaks" else first + second
        torch.testing.assert_close(both, want, rtol=1e-5, atol=1e-7, msg=name)


def check_masses_of_what_is_not_finite(backend):
    """Only the layer and request with a score that is not finite is told by its mass; the others keep their bits."""
    lengths = [(5, 30), (40, 300), (3, 9)]  # 300: three reducing blocks
    batch = Batch(9, lengths, 2, 4, 64, torch.float32)
    batch.vision = [torch.arange(len(own)) for own in batch.vision]  # before all text: every key is seen
    batch.text = [torch.arange(len(own)) + 1000 for own in batch.text]
    whole = batch.run(backend)
    assert all(bool(part.isfinite().all()) for part in whole)
    last_key, rows = SLOTS + int(batch.vision_slots[30 + 299]), slice(5, 45)
    flat = {"q": [((1, rows), 0.0)], "lse_b2": [((1, rows), 0.0)]}  # A = 1
    for changes, spoiled in (
        ({"lse_b2": [((1, 44, 7), -math.inf)]}, NAMES[1:]),
        ({"q": [((1, 5, 7, 63), math.nan)]}, NAMES[1:]),
        ({"k_flat": [((last_key, 1, 3), math.nan)]}, NAMES[1:]),
        ({"w": [((1, 44), math.inf)]}, ("scores",)),
        ({"w": [((1, 5), math.nan)]}, ("scores",)),
        ({**flat, "w": [((1, rows), 3e38)]}, ("scores",)),
        ({**flat, "w": [((1, rows), 2e36)]}, ("scores",)),  # the sum of a tile does not overflow, that of all may
    ):
        other = Batch.__new__(Batch)
        other.__dict__ = dict(batch.__dict__)
        for name, own in changes.items():
            setattr(other, name, _changed(getattr(batch, name), own))
        got = other.run(backend)
        for index in (1, 3, 5):
            _assert_told(f"{NAMES[index]}, {changes}", NAMES[index] in spoiled, lengths, got[index:], whole[index:])


def _changed(tensor, changes):
    tensor = tensor.clone()
    for at, value in changes:
        tensor[at] = value
    return tensor


def _assert_told(name, spoiled, lengths, got, whole):
    """``got``, ``whole``: scores, then masses; only layer 1 of request 1 may differ, and not where not ``spoiled``."""
    finite = torch.stack([part.isfinite().all(1) for part in got[0].split([v for _, v in lengths], 1)], 1)
    assert bool(got[1][~finite].isnan().all()), f"{name}: {got[1]}, and whether all scores are finite: {finite}"
    others = torch.ones_like(finite)
    others[1, 1] = False
    assert bool(finite[others].all()), f"{name}: scores of others are not finite"
    assert_same_bits(f"{name}: masses of the others", got[1][others], whole[1][others])
    may_be_finite = "2e+36" in name  # in the reference, which divides by the heads first
    assert bool(finite[1, 1]) != spoiled or may_be_finite, f"{name}: finite is {bool(finite[1, 1])}"


def check_stash(dtype_name, head_dim):
    """Rows of a slice of a fused projection, in two chunks, into one layer of a stash: equal bits, no others."""
    gen = generator(6)
    dtype = getattr(torch, dtype_name)
    fused = normal(gen, 20, 3, 6, head_dim, dtype=dtype)
    q, lse_b2 = fused[:, 1], normal(gen, 20, 6)
    stash = torch.full((2, 9, 6, head_dim), 7.0, dtype=dtype), torch.full((2, 9, 6), 7.0)
    expected = [part.clone() for part in stash]
    chunks = (torch.tensor([3, 19, 0]), torch.tensor([4, 0, 8])), (torch.tensor([7]), torch.tensor([2]))
    for rows, targets in chunks:
        stash_rows(q, lse_b2, rows, targets.int(), stash[0][1], stash[1][1], backend="triton")
        for row, target in zip(rows.tolist(), targets.tolist(), strict=True):
            expected[0][1, target], expected[1][1, target] = q[row], lse_b2[row]
    for name, got, want in zip(("q", "lse_b2"), stash, expected, strict=True):
        assert_same_bits(name, got, want)


def test_references_match_a_loop_over_pairs():
    batch = Batch(7, [(4, 5), (3, 2)], 2, 4, 64, torch.float32)
    weights, scores, *rest = batch.run("reference", double=True)
    (peaks, powers), masses = rest[1::2], rest[0::2]
    q, lse_e = batch.q.double(), batch.lse_b2.double() / LOG2_E
    text_at = vision_at = 0
    for request, (text, vision) in enumerate(zip(batch.text.copy(), batch.vision.copy(), strict=True)):
        for layer in range(2):

            def by_head(row, slot, layer=layer):
                key = batch.k_flat[layer * SLOTS + slot].double()
                logits = [q[layer, row, h] @ key[h // 4] * batch.scale - lse_e[layer, row, h] for h in range(8)]
                return torch.stack(logits).exp().tolist()

            for t in range(len(text)):
                seen = [sum(by_head(text_at + s, batch.text_slots[text_at + t])) / 8 for s in range(t, len(text))]
                assert abs(weights[layer, text_at + t] - sum(seen) / len(seen)) < 1e-9
            mass = 0.0
            for v, position in enumerate(vision):
                score = peak = power = 0.0
                for t in range(len(text)):
                    if position < text[t]:
                        of_heads = by_head(text_at + t, batch.vision_slots[vision_at + v])
                        score += float(batch.w[layer, text_at + t]) * sum(of_heads) / 8
                        mass += sum(of_heads) / 8
                        peak = max(peak, *of_heads)
                        power += sum(a**4 for a in of_heads)
                for got, want in ((scores, score), (peaks, peak), (powers, power)):
                    assert abs(got[layer, vision_at + v] - want) < 1e-9
            for got in masses:
                assert abs(got[layer, request] - mass) < 1e-9
        text_at, vision_at = text_at + len(text), vision_at + len(vision)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_kernels_match_references(interpreted, head_dim, group, dtype):
    interpreted(check_grid, head_dim + group, group, head_dim, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kv_dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_kernels_read_quantised_keys(interpreted, kv_dtype, dtype):
    interpreted(check_quantised, kv_dtype, dtype)


@pytest.mark.parametrize("lengths", [[(1, 1)], [(1, 64), (64, 1)], [(33, 63), (2, 65)], [(32, 128), (65, 129)]])
def test_kernels_at_block_edges(interpreted, lengths):
    interpreted(check_edges, lengths)


def test_kernels_over_several_chunks(interpreted):
    interpreted(check_small_chunks)


def test_a_request_has_the_same_bits_in_any_batch_and_layer_block(interpreted):
    interpreted(check_same_bits_alone_and_in_blocks)


def test_tensor_parallel_halves_sum_to_the_whole(interpreted):
    interpreted(check_tensor_parallel_halves)


def test_masses_of_what_is_not_finite():
    check_masses_of_what_is_not_finite("reference")


def test_masses_of_what_is_not_finite_in_kernels(interpreted):
    interpreted(check_masses_of_what_is_not_finite, "triton")


@pytest.mark.parametrize(("dtype", "head_dim"), [("bfloat16", 80), ("float16", 128), ("float32", 256)])
def test_stash_kernel_is_exact(interpreted, dtype, head_dim):
    interpreted(check_stash, dtype, head_dim)


def test_stash_reference_by_hand():
    q, lse_b2 = torch.arange(6.0).view(3, 1, 2), torch.arange(3.0).view(3, 1)
    stash, lse_stash = torch.zeros(2, 1, 2), torch.zeros(2, 1)
    stash_rows(q, lse_b2, torch.tensor([2, 0]), torch.tensor([0, 1]), stash, lse_stash)
    assert stash.flatten().tolist() == [4, 5, 0, 1] and lse_stash.flatten().tolist() == [2, 0]


def test_pieces_read_little_more_than_once():
    """64 text tokens after 4096 vision tokens, Qwen3-VL-8B: the bytes of one layer by the plan's own pieces."""
    heads, kv_heads, dim, text, vision = 32, 8, 128, 64, 4096
    plan = ScorePlan([torch.arange(vision, vision + text)], [torch.arange(vision)], heads, kv_heads, dim,
                     torch.bfloat16, "cpu")  # fmt: skip
    least = vision * kv_heads * dim * 2 + text * heads * (dim * 2 + 4)
    rows = plan.row_tile * (dim * 2 + 8)
    work = plan.vision.work.tolist()
    keys = {(piece[3], piece[4]): min(1024, piece[5] - piece[4]) for piece in work}
    once = sum(keys.values()) * kv_heads * dim * 2 + len(work) * kv_heads * rows  # row tiles of a chunk share it in L2
    sums = 2 * 4 * plan.vision.partials * kv_heads + 4 * vision
    assert sum(keys.values()) == vision and plan.vision.partials == 2 * vision
    assert once + sums <= 1.25 * least
    assert len(work) == 2 * len(keys)  # so L2 gives every key twice
    stash, results = text * heads * (dim * 2 + 4), 4 * (text + vision)
    assert plan.layer_bytes == stash + results + 4 * kv_heads * 2 * vision  # two row tiles


def test_a_vision_token_that_no_text_follows_has_no_peak():
    batch = Batch(10, [(3, 4)], 1, 4, 64, torch.float32)
    batch.text, batch.vision = [torch.arange(3)], [torch.tensor([9, 8, 7, 1])]
    *_, peaks, _, powers, masses = batch.run("reference")
    assert bool((peaks[0, :3] == 0).all() and (powers[0, :3] == 0).all()) and float(peaks[0, 3]) > 0 < float(masses)


def test_errors_name_the_value():
    with pytest.raises(KernelInputError, match=r"\[2\] text and \[0\] vision tokens"):
        ScorePlan([torch.arange(2)], [torch.arange(0)], 4, 2, 64, torch.float32, "cpu")
    batch = Batch(8, [(4, 5)], 2, 4, 64, torch.float32)
    with pytest.raises(KernelInputError, match=r"layers 1..2 of 500 slots lie outside the storage of 1000 units"):
        batch_text_weights(batch.plan(), batch.q, batch.lse_b2, batch.k_flat, batch.text_slots, 1, SLOTS, 1.0)
    with pytest.raises(KernelInputError, match="the stash must be contiguous"):
        batch_text_weights(
            batch.plan(), batch.q.transpose(2, 3).contiguous().transpose(2, 3), batch.lse_b2, batch.k_flat,
            batch.text_slots, 0, SLOTS, 1.0,
        )  # fmt: skip
    with pytest.raises(KernelInputError, match="total_q_heads=2"):
        batch.run("reference", total_q_heads=2)
    with pytest.raises(KernelInputError, match=r"vision_slots has shape \[4\], expected \[5\]"):
        batch_vision_scores(
            batch.plan(), batch.q, batch.lse_b2, batch.w, batch.k_flat, batch.vision_slots[1:], 0, SLOTS, 1.0
        )
    with pytest.raises(KernelInputError, match="power=2 is neither None"):
        batch_peak_scores(batch.plan(), batch.q, batch.lse_b2, batch.k_flat, batch.vision_slots, 0, SLOTS, 1.0, power=2)
    with pytest.raises(KernelInputError, match="lie outside 0..499"):
        batch_text_weights(batch.plan(), batch.q, batch.lse_b2, batch.k_flat, batch.text_slots + 500, 0, SLOTS, 1.0)
    with pytest.raises(KernelInputError, match="must be contiguous"):
        stash_rows(batch.q[0], batch.lse_b2[0], torch.arange(2), torch.arange(2), batch.q[0, ::2], batch.lse_b2[0, ::2])
