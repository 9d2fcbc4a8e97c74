"""The oracle engine against stock transformers, by routes that share none of its attention code."""

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import AutoProcessor, DynamicCache, Qwen3VLForConditionalGeneration

from tests.oracle import TEXT, VIEWED, VISION, Oracle, Prefill, Prompt, Selection, load, single_threaded
from tgvkv_sglang.demo.tiny_model import make_tiny_model
from tgvkv_sglang.testing.images import make_image

CLEAR_GAP = 1e-3  # stock transformers normalises in float32, which moves a logit by up to about 1e-5
UNUSED_TOKEN = 319


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    with single_threaded():
        yield


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def oracle(model_dir) -> Oracle:
    return load(model_dir)


@pytest.fixture(scope="module")
def stock(model_dir):
    return Qwen3VLForConditionalGeneration.from_pretrained(
        model_dir, dtype=torch.float64, attn_implementation="eager"
    ).eval()


IMAGES = [make_image(1, 192, 128), make_image(2, 96, 160)]


def user(*parts: str) -> dict:
    content = [{"type": "image"} if part == "<image>" else {"type": "text", "text": part} for part in parts]
    return {"role": "user", "content": content}


@pytest.fixture(scope="module")
def prompt(oracle) -> Prompt:
    return oracle.prepare([user("Look: ", "<image>", "What is this?")], IMAGES[:1])


@pytest.fixture(scope="module")
def prefill(oracle, prompt) -> Prefill:
    return oracle.prefill(prompt)


def follow_up(oracle: Oracle, state, text: str, images) -> Prompt:
    """The next prompt of a conversation: its tokens so far, end of turn, another question."""
    new = oracle.tokenizer.encode(f"<|im_end|>\n<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n")
    return oracle.prepare_ids(state.token_ids + new, images)


def processor_inputs(model_dir, messages, images):
    processor = AutoProcessor.from_pretrained(model_dir)
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return processor(text=[text], images=images or None, return_tensors="pt")


# -- against stock transformers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "num_images"),
    [
        (["What is this?"], 0),
        (["<image>", "What is this?"], 1),
        (["First ", "<image>", " and then ", "<image>", " what differs?"], 2),
    ],
)
def test_full_decoding_equals_stock_generate(oracle, stock, model_dir, parts, num_images):
    images = IMAGES[:num_images]
    inputs = processor_inputs(model_dir, [user(*parts)], images)
    prompt = oracle.prepare([user(*parts)], images)
    assert prompt.token_ids == inputs["input_ids"][0].tolist()
    turn = oracle.greedy(prompt, 12)
    assert min(turn.gaps) > CLEAR_GAP
    generated = stock.generate(**inputs, max_new_tokens=12, eos_token_id=UNUSED_TOKEN)
    assert turn.token_ids == generated[0, len(prompt.token_ids) :].tolist()


@torch.no_grad()
def test_attention_equals_stock_eager(oracle, stock, model_dir, prompt, prefill):
    inputs = processor_inputs(model_dir, [user("Look: ", "<image>", "What is this?")], IMAGES[:1])
    weights = stock(**inputs, output_attentions=True).attentions
    expected = torch.stack([layer[0].mean(0) for layer in weights]).numpy()
    np.testing.assert_allclose(prefill.attention, expected, atol=2e-6)
    np.testing.assert_allclose(prefill.attention.sum(-1), 1, rtol=1e-12)
    assert prefill.kinds == [VISION if v else TEXT for v in prompt.is_vision]
    assert sum(prompt.is_vision) == 6 * 4


def random_selection(prefill: Prefill, seed: int) -> Selection:
    """A selection with a different number of tokens in every layer, as only a per-layer mask can express."""
    rng = np.random.default_rng(seed)
    positions = np.flatnonzero(np.array(prefill.kinds) == VISION)
    layers = len(prefill.attention)
    kept = np.array([rng.permutation(len(positions)) < 3 + 2 * layer for layer in range(layers)])
    empty = np.zeros((layers, 0))
    return Selection(positions, np.array([]), empty, empty, empty, (), kept.sum(1), kept, 0, "vision")


def pruned_cache(prefill: Prefill, selection: Selection) -> DynamicCache:
    """KV with the evicted tokens cut out: a different length in every layer, and no mask anywhere."""
    cache = DynamicCache()
    for layer, kept in enumerate(selection.kept):
        visible = np.ones(prefill.state.num_computed, dtype=bool)
        visible[selection.vision_positions] = kept
        stored = prefill.state.cache.layers[layer]
        cache.update(stored.keys[:, :, visible], stored.values[:, :, visible], layer)
    return cache


@torch.no_grad()
def stock_steps(stock, cache: DynamicCache, token_ids: list[int], first_position: int) -> torch.Tensor:
    """Feed tokens one at a time (one query sees all keys there are, so no mask is needed); the last one's logits."""
    for i, token in enumerate(token_ids):
        output = stock.model.language_model(
            input_ids=torch.tensor([[token]]),
            position_ids=torch.full((3, 1, 1), first_position + i),
            past_key_values=cache,
            attention_mask=torch.zeros(1, 1, 1, 1),
            use_cache=True,
        )
    return stock.lm_head(output.last_hidden_state[0, -1])


def test_masked_decoding_equals_stock_on_a_pruned_cache(oracle, stock, prefill):
    selection = random_selection(prefill, 0)
    turn = oracle.decode(prefill, 8, selection)
    cache, n = pruned_cache(prefill, selection), len(prefill.kinds)
    tokens = turn.token_ids[:1]
    for i in range(7):
        logits = stock_steps(stock, cache, tokens[-1:], n + i + prefill.position_delta)
        top = logits.topk(2).values
        assert float(top[0] - top[1]) == pytest.approx(turn.gaps[i + 1], abs=1e-4)
        tokens.append(int(logits.argmax()))
    assert min(turn.gaps) > CLEAR_GAP
    assert turn.token_ids == tokens
    assert oracle.decode(prefill, 8).token_ids != tokens, "the mask made no difference, so it was not tested"


def test_later_turn_on_the_kept_view_equals_stock_on_a_pruned_cache(oracle, stock, prefill):
    selection = random_selection(prefill, 1)
    first = oracle.decode(prefill, 3, selection)
    second = follow_up(oracle, first.state, "And now?", IMAGES[:1])
    later = oracle.prefill(second, first.state, view="kept")
    n = len(prefill.kinds)
    logits = stock_steps(stock, pruned_cache(prefill, selection), second.token_ids[n:], n + prefill.position_delta)
    torch.testing.assert_close(later.logits, logits, atol=1e-4, rtol=0)

    new = slice(later.new_start, None)
    assert later.new_start == n + 2  # the last generated token has no KV yet
    to_vision = later.attention[:, new][:, :, selection.vision_positions]
    assert ((to_vision > 0) == selection.kept[:, None]).all()
    assert {later.kinds[p] for p in selection.vision_positions} == {VIEWED}
    assert oracle.select(later, 0.1) is None
    assert oracle.continue_(first.state, second, 4, view="kept", retention=0.1).state.evicted.any()


# -- consistency -------------------------------------------------------------------------------------------------------


def test_keeping_everything_changes_nothing(oracle, prompt, prefill):
    everything = oracle.select(prefill, 1.0)
    assert everything.kept.all()
    full = oracle.decode(prefill, 10)
    kept = oracle.decode(prefill, 10, everything)
    assert kept.token_ids == full.token_ids
    assert kept.gaps == full.gaps
    assert oracle.greedy(prompt, 10, retention=1.0).gaps == full.gaps
    assert oracle.greedy(prompt, 10, everything).gaps == full.gaps


@pytest.mark.parametrize("chunk_size", [1, 7, 16])
def test_chunks_change_nothing(oracle, prompt, prefill, chunk_size):
    chunked = oracle.prefill(prompt, chunk_size=chunk_size)
    np.testing.assert_allclose(chunked.attention, prefill.attention, atol=1e-12)
    torch.testing.assert_close(chunked.logits, prefill.logits, atol=1e-10, rtol=0)
    a, b = oracle.select(chunked, 0.2), oracle.select(prefill, 0.2)
    assert (a.kept == b.kept).all()


def test_decoding_does_not_disturb_the_prefill(oracle, prefill):
    once = oracle.decode(prefill, 6, oracle.select(prefill, 0.1))
    oracle.decode(prefill, 6)
    again = oracle.decode(prefill, 6, oracle.select(prefill, 0.1))
    assert once.gaps == again.gaps
    assert prefill.state.num_computed == len(prefill.kinds)


def test_later_turn_without_eviction_equals_one_long_prompt(oracle, prompt):
    first = oracle.greedy(prompt, 4)
    second = follow_up(oracle, first.state, "And now?", IMAGES[:1])
    fresh = oracle.prefill(second)
    for view in ("kept", "full"):
        later = oracle.prefill(second, first.state, view=view)
        new = slice(later.new_start, None)
        assert np.isnan(later.attention[:, : later.new_start]).all()
        np.testing.assert_allclose(later.attention[:, new], fresh.attention[:, new], atol=1e-12)
        torch.testing.assert_close(later.logits, fresh.logits, atol=1e-10, rtol=0)


def test_regrounding_sees_the_whole_image_and_selects_afresh(oracle, prompt):
    first = oracle.greedy(prompt, 4, retention=0.2)
    second = follow_up(oracle, first.state, "And now?", IMAGES[:1])
    later = oracle.prefill(second, first.state, view="full")
    assert (later.attention[:, later.new_start :][:, :, prompt.vision_positions] > 0).all()
    selection = oracle.select(later, 0.2)
    assert selection.vision_positions.tolist() == prompt.vision_positions.tolist()
    assert selection.grounding_positions.tolist() == list(range(later.new_start, len(second.token_ids)))
    assert (selection.kept != first.selection.kept).any()
    turn = oracle.continue_(first.state, second, 5, view="full", retention=0.2)
    assert (turn.state.evicted[:, prompt.vision_positions] == ~selection.kept).all()
    stale = oracle.continue_(first.state, second, 5, view="kept")
    assert (stale.state.evicted[:, prompt.vision_positions] == ~first.selection.kept).all()
    assert abs(turn.gaps[0] - stale.gaps[0]) > CLEAR_GAP, "what the prefill saw made no difference"


def test_a_new_image_is_selected_from_while_the_old_one_keeps_its_view(oracle, prompt):
    first = oracle.greedy(prompt, 4, retention=0.2)
    text = "<|vision_start|><|image_pad|><|vision_end|>And this?"
    second = follow_up(oracle, first.state, text, IMAGES)
    turn = oracle.continue_(first.state, second, 4, view="kept", retention=0.25)
    old, new = second.vision_positions[:24], second.vision_positions[24:]
    assert len(new) == 3 * 5
    assert turn.selection.vision_positions.tolist() == new.tolist()
    assert turn.selection.budget.sum() == 4 * 15 * 0.25
    assert (turn.state.evicted[:, old] == ~first.selection.kept).all()
    assert (turn.state.evicted[:, new] == ~turn.selection.kept).all()


def test_a_shorter_cached_prefix_is_computed_anew_and_in_full(oracle, prompt):
    first = oracle.greedy(prompt, 4, retention=0.2)
    second = follow_up(oracle, first.state, "And now?", IMAGES[:1])
    before_image = int(prompt.vision_positions[0])
    later = oracle.prefill(second, first.state, view="kept", cached_len=before_image)
    fresh = oracle.prefill(second)
    assert later.kinds == fresh.kinds
    np.testing.assert_allclose(later.attention[:, before_image:], fresh.attention[:, before_image:], atol=1e-12)
    assert later.new_start == before_image


def test_two_questions_after_the_same_turn_do_not_disturb_each_other(oracle, prompt):
    state = oracle.greedy(prompt, 4, retention=0.2).state
    alone = oracle.prefill(follow_up(oracle, state, "And now?", IMAGES[:1]), state)
    oracle.continue_(state, follow_up(oracle, state, "Why?", IMAGES[:1]), 4, view="full", retention=0.2, cached_len=3)
    after = oracle.prefill(follow_up(oracle, state, "And now?", IMAGES[:1]), state)
    assert torch.equal(after.logits, alone.logits)
    assert state.cache.get_seq_length() == state.num_computed


def test_stop_at_eos(oracle, prompt, prefill, monkeypatch):
    tokens = oracle.decode(prefill, 6).token_ids
    end = tokens[3]
    monkeypatch.setattr(oracle, "eos_token_id", end)
    turn = oracle.decode(prefill, 6, stop_at_eos=True)
    assert turn.token_ids == tokens[: tokens.index(end) + 1]
    assert turn.state.num_computed == len(prompt.token_ids) + len(turn.token_ids) - 1


def test_chat_messages_continue_the_very_tokens_of_the_turn_before(oracle):
    messages = [user("<image>", "What is this?")]
    first = oracle.greedy(oracle.prepare(messages, IMAGES[:1]), 12, retention=0.2)
    messages += [{"role": "assistant", "content": oracle.tokenizer.decode(first.token_ids)}, user("And now?")]
    second = oracle.prepare(messages, IMAGES[:1])
    assert second.token_ids[: len(first.state.token_ids)] == first.state.token_ids
    assert oracle.prefill(second, first.state).new_start == first.state.num_computed


# -- prompts -----------------------------------------------------------------------------------------------------------


def test_placeholders_may_be_expanded_or_not(oracle, prompt):
    image = oracle.config.image_token_id
    first = prompt.token_ids.index(image)
    short = [t for i, t in enumerate(prompt.token_ids) if t != image or i == first]
    for ids in (short, prompt.token_ids):
        other = oracle.prepare_ids(ids, IMAGES[:1])
        assert other.token_ids == prompt.token_ids
        torch.testing.assert_close(other.embeds, prompt.embeds, atol=0, rtol=0)
    with pytest.raises(ValueError, match=r"runs of \[1\] image placeholders do not fit images of \[24, 15\]"):
        oracle.prepare_ids(short, IMAGES)


def test_positions_of_an_image(oracle):
    """A 2 x 3 token image starting at position 2 takes max(2, 3) positions: text goes on at 5."""
    start, pad, end = oracle.tokenizer.convert_tokens_to_ids(["<|vision_start|>", "<|image_pad|>", "<|vision_end|>"])
    prompt = oracle.prepare_ids([65, start, pad, end, 66], [make_image(3, 96, 64)])
    assert prompt.positions.tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 6],
        [0, 1, 2, 2, 2, 3, 3, 3, 5, 6],
        [0, 1, 2, 3, 4, 2, 3, 4, 5, 6],
    ]
    assert prompt.position_delta == 7 - 10


def test_half_pixel_interpolation_equals_torch(model_dir):
    oracle = load(model_dir, precise_embedding_interpolation=False)
    table = torch.randn(24, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for h, w in [(4, 6), (10, 8), (30, 26)]:
        corners = oracle._interpolation(torch.tensor([[1, h, w]]))
        ours = (table.flatten()[corners["image_bilinear_indices"]] * corners["image_bilinear_weights"]).sum(0)
        expected = functional.interpolate(table[None, None], (h, w), mode="bilinear", align_corners=False)[0, 0]
        by_token = expected.view(h // 2, 2, w // 2, 2).permute(0, 2, 1, 3).flatten()
        torch.testing.assert_close(ours, by_token, atol=1e-5, rtol=0)


def test_interpolation_mode_reaches_the_vision_tower(model_dir):
    precise, half_pixel = load(model_dir), load(model_dir, precise_embedding_interpolation=False)
    message, images = [user("<image>", "What?")], IMAGES[:1]
    first, second = (o.prepare(message, images).embeds for o in (precise, half_pixel))
    torch.testing.assert_close(first, second, atol=1e-5, rtol=0)  # the stand-in's table is constant on purpose
    for o in (precise, half_pixel):
        rows = o.model.model.visual.pos_embed.weight
        rows.data = torch.randn(rows.shape, generator=torch.Generator().manual_seed(0), dtype=rows.dtype)
    first, second = (o.prepare(message, images).embeds for o in (precise, half_pixel))
    assert (first - second).abs().max() > 0.01


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"view": "some"}, "view must be one of"),
        ({"cached_len": 10**6}, r"cached_len must lie in \[0, "),
        ({"state": None, "cached_len": 3}, "there is no state"),
    ],
)
def test_bad_prefill_arguments(oracle, prompt, prefill, arguments, message):
    with pytest.raises(ValueError, match=message):
        oracle.prefill(prompt, **{"state": prefill.state, **arguments})


def test_a_prompt_must_continue_the_conversation(oracle, prefill):
    other = oracle.prepare([user("Here: ", "<image>", "What is this?")], IMAGES[:1])
    with pytest.raises(ValueError, match="are not the conversation's"):
        oracle.prefill(other, prefill.state)
