"""The stand-in checkpoint: stock classes load it, its tokenizer round-trips, and its numbers are well conditioned."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoProcessor, AutoTokenizer, Qwen3VLForConditionalGeneration

from tests.oracle import load, single_threaded
from tgvkv_sglang.demo.checkpoint import SPECIAL_TOKENS
from tgvkv_sglang.demo.tiny_model import SIZES, make_tiny_model
from tgvkv_sglang.testing.images import make_image


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    with single_threaded():
        yield


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def tokenizer(model_dir):
    return AutoTokenizer.from_pretrained(model_dir)


MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "Look: "},
            {"type": "image"},
            {"type": "image_url", "image_url": {"url": "data:"}},
            {"type": "text", "text": "Which one?\n"},
        ],
    },
    {"role": "assistant", "content": " the second "},
]


def test_stock_classes_load_it(model_dir):
    model, report = Qwen3VLForConditionalGeneration.from_pretrained(model_dir, output_loading_info=True)
    assert not any(report.values()), report
    config = AutoConfig.from_pretrained(model_dir)
    assert type(config).__name__ == "Qwen3VLConfig"
    assert model.generation_config.eos_token_id == config.eos_token_id
    processor = AutoProcessor.from_pretrained(model_dir)
    text = processor.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    inputs = processor(text=[text], images=[make_image(0, 96, 64), make_image(1, 64, 64)], return_tensors="pt")
    assert inputs["image_grid_thw"].tolist() == [[1, 4, 6], [1, 4, 4]]
    assert (inputs["input_ids"] == config.image_token_id).sum() == 6 + 4
    assert torch.isfinite(model(**inputs).logits).all()


def test_images_within_bounds_are_not_resized_and_others_are(model_dir):
    processor = AutoProcessor.from_pretrained(model_dir).image_processor
    for (width, height), tokens in {(1024, 1024): 1024, (992, 1056): 1023, (32, 32): 4, (2048, 2048): 1024}.items():
        grid = processor(images=[make_image(0, width, height)], return_tensors="pt")["image_grid_thw"]
        assert int(grid.prod()) // 4 == tokens


def test_chat_template(tokenizer):
    text = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        f"<|im_start|>user\nLook: {image}{image}Which one?\n<|im_end|>\n"
        "<|im_start|>assistant\n the second <|im_end|>\n"
        "<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    "text",
    [
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What  is it?<|im_end|>\n<|im_start|>assistant\n",
        "a<|image_pad|> <|video_pad|>b <|endoftext|>\n\n  it's 12,345 \t",
        "Größe: 3 µm — 图片 🦊",
        "".join(chr(c) for c in range(0x20, 0x7F)),
    ],
)
def test_decode_then_encode_is_exact(tokenizer, model_dir, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode(tokenizer.decode(ids)) == ids
    assert AutoProcessor.from_pretrained(model_dir).tokenizer.encode(text) == ids


def test_a_byte_is_a_token_and_specials_follow(tokenizer):
    assert tokenizer.encode("A\n") == [65, 10]
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(256, 256 + len(SPECIAL_TOKENS)))
    assert tokenizer.eos_token == "<|im_end|>"


@pytest.mark.parametrize("size", SIZES)
def test_conditioning(tmp_path, size):
    """float32 moves logits and scores far less than what separates the best from the second best."""
    directory = make_tiny_model(tmp_path / size, size=size)
    exact, rounded = load(directory), load(directory, dtype=torch.float32)
    assert exact.config.text_config.head_dim == SIZES[size].head_dim
    gaps, answers, shares = [], set(), []
    for seed, question in enumerate(["What is this?", "Which colour is at the top?", "Count."]):
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        prefill, other = (o.prefill(o.prepare(messages, [make_image(seed, 192, 160)])) for o in (exact, rounded))
        assert (prefill.logits - other.logits).abs().max() < 1e-4
        selection, twin = exact.select(prefill, 0.2), rounded.select(other, 0.2)
        np.testing.assert_allclose(selection.scores, twin.scores, rtol=1e-4)
        shares.append(selection.layer_mass / selection.layer_mass.sum())
        turns = [exact.decode(prefill, 12, s) for s in (None, selection)]
        answers |= {tuple(turn.token_ids) for turn in turns}
        gaps += [gap for turn in turns for gap in turn.gaps]
        text = exact.tokenizer.decode(turns[0].token_ids)
        assert exact.tokenizer.encode(text) == turns[0].token_ids
    assert len(answers) == 6, "image, question and eviction must all show in the answers"
    assert np.quantile(gaps, 0.05) > 0.01
    assert np.ptp(shares, axis=1).min() > 0.03, "layers must differ in how much they look at the image"


def test_seeds(tmp_path):
    def weights(name, seed):
        directory = make_tiny_model(tmp_path / name, seed=seed)
        return (directory / "model.safetensors").read_bytes()

    first = weights("a", 0)
    assert weights("b", 0) == first
    assert weights("c", 1) != first


def test_refusals(tmp_path, model_dir):
    with pytest.raises(ValueError, match="size must be one of tiny, small, wide, got 'huge'"):
        make_tiny_model(tmp_path / "x", size="huge")
    with pytest.raises(FileExistsError, match="not empty"):
        make_tiny_model(model_dir)
    (tmp_path / "empty").mkdir()
    assert json.loads((make_tiny_model(tmp_path / "empty") / "config.json").read_text())["model_type"] == "qwen3_vl"
    assert [p.name for p in tmp_path.iterdir()] == ["empty"]
