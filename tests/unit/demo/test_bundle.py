"""The bundled demo model, through stock transformers (no SGLang): files, tokenizer, prompts, weights."""

from __future__ import annotations

import json
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tgvkv_sglang.demo import questions as Q
from tgvkv_sglang.demo import scenes as S
from tgvkv_sglang.demo.bundle import DEMO_MODEL
from training.demo_model import probes as P
from training.demo_model.evaluate import TransformersRunner

SPECIAL = (
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|endoftext|>",
)


@pytest.fixture(scope="module")
def runner():
    return TransformersRunner(DEMO_MODEL)


@pytest.fixture(scope="module")
def tokenizer(runner):
    return runner.processor.tokenizer


def prompt_of(runner, probe: P.Probe) -> str:
    messages = P.chat_messages(probe, image_parts=[{"type": "image"} for _ in probe.scenes])
    return runner.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def test_bundle_is_small_and_complete():
    files = {f.name: f.stat().st_size for f in DEMO_MODEL.iterdir()}
    assert sum(files.values()) < 12_000_000
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= set(files)
    assert {"preprocessor_config.json", "video_preprocessor_config.json", "chat_template.jinja"} <= set(files)


def test_special_tokens(tokenizer):
    for token in SPECIAL:
        (number,) = tokenizer.encode(token)
        assert tokenizer.decode([number]) == token
    assert tokenizer.eos_token == "<|im_end|>"
    config = json.loads((DEMO_MODEL / "config.json").read_text())
    names = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
    names |= {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
    for key, token in names.items():
        assert config[key] == tokenizer.convert_tokens_to_ids(token)


@pytest.mark.parametrize("cls", P.CLASSES)
def test_whole_prompts_round_trip_and_every_word_is_one_token(runner, tokenizer, cls):
    for probe in P.probes(20, classes=(cls,)):
        prompt = prompt_of(runner, probe)
        ids = tokenizer.encode(prompt)
        assert tokenizer.decode(ids) == prompt  # SGLang finds the picture's marker in the decoded prompt
        plain = re.sub("|".join(re.escape(t) for t in SPECIAL), " ", prompt)
        assert len(ids) == sum(prompt.count(t) for t in SPECIAL) + len(re.findall(r"\w+|[?.]", plain))
        answer = tokenizer.encode(" " + probe.question.answer)
        assert len(answer) == len(probe.question.answer_words)


def test_a_stripped_answer_sent_back_is_the_tokens_the_model_wrote(runner, tokenizer):
    """The prefix cache hits only if the assistant's text, sent back by a client, is tokenised as it was generated."""
    chat = P.chat(1, turns=2)
    first, whole = P.Probe("chat", chat.scenes, chat.turns[:1]), prompt_of(runner, chat)
    written = tokenizer.encode(" " + chat.turns[0].answer)
    expected = tokenizer.encode(prompt_of(runner, first)) + written + [tokenizer.eos_token_id]
    assert tokenizer.encode(whole)[: len(expected)] == expected


@given(st.text(max_size=60))
def test_any_text_is_representable(tokenizer, text):
    ids = tokenizer.encode(text)
    said = tokenizer.decode(ids)
    assert tokenizer.encode(said) == ids
    if text.isascii():
        assert said == text.lower()


def test_text_outside_of_the_vocabulary_is_answered(runner):
    probe = P.Probe(
        "color", (S.make_scene(1),), (Q.Question("color", "Grüße, 世界! What is a <tag>\tlike 12.5%?", "red"),)
    )
    ((said,),) = runner.answers([runner.prepare(probe)], (False,))
    assert isinstance(said, str)


@pytest.mark.parametrize("size", [(512, 512), (384, 384), (512, 384), (768, 512)])
def test_image_tokens_in_the_prompt(runner, size):
    probe = P.Probe("color", (S.make_scene(1, size),), (Q.Question("color", "what color is the star?", "red"),))
    inputs = runner.prepare(probe)
    tokens = size[0] * size[1] // 32**2
    assert (inputs["input_ids"] == runner.model.config.image_token_id).sum() == tokens
    assert inputs["image_grid_thw"].tolist() == [[1, size[1] // 16, size[0] // 16]]
    assert inputs["input_ids"].shape[1] == tokens + 6 + 6 + 3  # before, question, after


def test_two_images_keep_their_order(runner):
    (probe,) = P.probes(1, classes=("two_images",))
    inputs = runner.prepare(probe)
    alone = [runner.prepare(P.Probe("x", (s,), probe.turns))["pixel_values"] for s in probe.scenes]
    assert torch.equal(inputs["pixel_values"], torch.cat(alone))
    assert "image one<|vision_start|>" in prompt_of(runner, probe) and "image two<|vision_start|>" in prompt_of(
        runner, probe
    )


def test_stored_weights_are_bf16_and_deepstack_speaks(runner):
    from safetensors import safe_open

    with safe_open(DEMO_MODEL / "model.safetensors", "pt") as f:
        assert {f.get_tensor(k).dtype for k in f.keys()} == {torch.bfloat16}  # noqa: SIM118
    assert runner.model.dtype == torch.float32
    assert runner.model.model.visual.deepstack_merger_list[0].linear_fc2.weight.abs().max() > 0
