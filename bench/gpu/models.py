"""Model directories for the GPU programme, made on the spot: real shapes without weights, and models with weights.

The shapes have a configuration, a tokenizer and an image processor and are served with ``--load-format dummy``: speed
does not depend on what the weights are, and no machine without a network has any.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Iterator

from tgvkv_sglang.demo import tiny_model
from tgvkv_sglang.demo.bundle import DEMO_MODEL

MAX_VISION_TOKENS = 4096

# Qwen/Qwen3-VL-8B-Instruct: the shape in its published configuration.
QWEN3_VL_8B: dict[str, Any] = {
    "text": {
        "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "rope_theta": 5_000_000.0,
    },
    "vision": {
        "depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "out_hidden_size": 4096,
        "num_position_embeddings": 2304, "deepstack_visual_indexes": [8, 16, 24],
    },
}  # fmt: skip

# LLaVA-NeXT-Mistral-7B's language shape (Mistral-7B) and a ViT-L in the Qwen3-VL architecture: SGLang 0.5.17's LLaVA
# classes fetch their tower when they load, or send no image offsets. So this is not LLaVA's code, nor its image tokens.
MISTRAL_7B: dict[str, Any] = {
    "text": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 32064, "rope_theta": 1_000_000.0,
    },
    "vision": {
        "depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16, "out_hidden_size": 4096,
        "num_position_embeddings": 2304, "deepstack_visual_indexes": [8, 16, 23],
    },
}  # fmt: skip

# For trying all of this on a CPU.
SMALL: dict[str, Any] = {
    "text": {
        "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 128, "vocab_size": 151936, "rope_theta": 5_000_000.0,
    },
    "vision": {
        "depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "out_hidden_size": 128,
        "num_position_embeddings": 2304, "deepstack_visual_indexes": [0],
    },
}  # fmt: skip

SHAPES = {"qwen3-vl-8b": QWEN3_VL_8B, "mistral-7b": MISTRAL_7B, "small": SMALL}
WHAT = {
    "qwen3-vl-8b": "Qwen3-VL-8B's shape, no weights",
    "mistral-7b": "Mistral-7B's language shape and a ViT-L in the Qwen3-VL architecture, no weights: not LLaVA's code",
}
"""What a result file says of the shapes."""
WITH_WEIGHTS = {"stand-in": "wide"}
"""Randomly initialised models of ``tgvkv_sglang.demo.tiny_model``, by their size there."""


def model_directory(name: str, under: Path) -> Path:
    """The directory of a model, made under ``under`` unless it is there or ships with the package.

    Raises:
        ValueError: no such model.
    """
    if name == "demo":
        return DEMO_MODEL
    target = under / name
    if (target / "config.json").is_file():
        return target
    if name in WITH_WEIGHTS:
        return tiny_model.make_tiny_model(target, size=WITH_WEIGHTS[name])
    if name not in SHAPES:
        known = ", ".join(["demo", *WITH_WEIGHTS, *SHAPES])
        raise ValueError(f"no model {name!r}; there are {known}")
    write_shape(SHAPES[name], target)
    return target


def is_dummy(name: str) -> bool:
    """Whether the model has no weights and must be served with ``--load-format dummy``."""
    return name in SHAPES


def configuration(shape: dict[str, Any], special: dict[str, int]) -> dict[str, Any]:
    """``config.json`` of a shape; ``special`` are the token ids of the special tokens."""
    text = {
        "model_type": "qwen3_vl_text", "hidden_act": "silu", "max_position_embeddings": 262144, "rms_norm_eps": 1e-6,
        "attention_bias": False, "attention_dropout": 0.0, "initializer_range": 0.02, "use_cache": True,
        "tie_word_embeddings": False, "dtype": "bfloat16", "eos_token_id": special[tiny_model.EOS_TOKEN],
        **{name: value for name, value in shape["text"].items() if name != "rope_theta"},
        "rope_parameters": {
            "rope_type": "default", "rope_theta": shape["text"]["rope_theta"],
            "mrope_section": [24, 20, 20], "mrope_interleaved": True,
        },
    }  # fmt: skip
    vision = {
        "model_type": "qwen3_vl", "hidden_act": "gelu_pytorch_tanh", "in_channels": 3, "initializer_range": 0.02,
        "patch_size": tiny_model.PATCH_SIZE, "spatial_merge_size": tiny_model.MERGE_SIZE, "temporal_patch_size": 2,
        **shape["vision"],
    }  # fmt: skip
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"], "model_type": "qwen3_vl", "dtype": "bfloat16",
        "tie_word_embeddings": False, "text_config": text, "vision_config": vision,
        "image_token_id": special["<|image_pad|>"], "video_token_id": special["<|video_pad|>"],
        "vision_start_token_id": special["<|vision_start|>"], "vision_end_token_id": special["<|vision_end|>"],
    }  # fmt: skip


def fillers(count: int) -> Iterator[str]:
    """``count`` different words of four letters, a space before each, in a byte-level vocabulary's spelling."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    for i in range(count):
        word = ""
        for _ in range(4):
            i, letter = divmod(i, 26)
            word += letters[letter]
        yield "Ġ" + word


def write_shape(shape: dict[str, Any], target: Path) -> None:
    """Configuration, processor and a tokenizer with one token for every row of the vocabulary.

    Prompts are encoded a byte a token (there are no merges), so their lengths are known; whatever token the model
    picks decodes to something, as a real tokenizer's would.
    """
    from transformers import Qwen2Tokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    vocab = {char: byte for byte, char in bytes_to_unicode().items()}
    special = {token: len(vocab) + i for i, token in enumerate(tiny_model.SPECIAL_TOKENS)}
    vocab |= special
    rest = shape["text"]["vocab_size"] - len(vocab)
    vocab |= {word: len(vocab) + i for i, word in enumerate(fillers(rest))}
    tokenizer = Qwen2Tokenizer(
        vocab=vocab, merges=[], unk_token=tiny_model.PAD_TOKEN, eos_token=tiny_model.EOS_TOKEN,
        pad_token=tiny_model.PAD_TOKEN, additional_special_tokens=list(tiny_model.SPECIAL_TOKENS),
        chat_template=tiny_model.CHAT_TEMPLATE, model_max_length=262144, clean_up_tokenization_spaces=False,
    )  # fmt: skip
    target.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(target)
    tiny_model._write_processor_files(target)
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        content = json.loads((target / name).read_text())
        content["size"]["longest_edge"] = MAX_VISION_TOKENS * tiny_model.PIXELS_PER_TOKEN
        (target / name).write_text(json.dumps(content, indent=2) + "\n")
    generation = {"eos_token_id": special[tiny_model.EOS_TOKEN], "pad_token_id": special[tiny_model.PAD_TOKEN]}
    (target / "generation_config.json").write_text(json.dumps(generation) + "\n")
    (target / "config.json").write_text(json.dumps(configuration(shape, special), indent=1) + "\n")
