"""Model directories for the GPU programme, made on the spot: real shapes without weights, and models with weights.

The shapes have a configuration, a tokenizer and an image processor and are served with ``--load-format dummy``: speed
does not depend on what the weights are, and no machine without a network has any.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Iterator

from tgvkv_sglang.demo.bundle import DEMO_MODEL
from tgvkv_sglang.demo.checkpoint import byte_tokenizer, new_directory
from tgvkv_sglang.demo.qwen3_vl import make_config, write_checkpoint
from tgvkv_sglang.demo.tiny_model import make_tiny_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Qwen3VLConfig

MAX_VISION_TOKENS = 4096
MAX_LENGTH = 262144

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
        return make_tiny_model(target, size=WITH_WEIGHTS[name])
    if name not in SHAPES:
        known = ", ".join(["demo", *WITH_WEIGHTS, *SHAPES])
        raise ValueError(f"no model {name!r}; there are {known}")
    write_shape(SHAPES[name], target)
    return target


def is_dummy(name: str) -> bool:
    """Whether the model has no weights and must be served with ``--load-format dummy``."""
    return name in SHAPES


def configuration(shape: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> Qwen3VLConfig:
    """The configuration of a shape, served in bfloat16."""
    text = {name: value for name, value in shape["text"].items() if name != "rope_theta"}
    text["max_position_embeddings"] = MAX_LENGTH
    theta = shape["text"]["rope_theta"]
    return make_config(tokenizer, text=text, vision=shape["vision"], rope_theta=theta, dtype="bfloat16")


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
    rest = shape["text"]["vocab_size"] - len(byte_tokenizer())
    tokenizer = byte_tokenizer(fillers(rest), max_length=MAX_LENGTH)
    with new_directory(target) as staging:
        config = configuration(shape, tokenizer)
        write_checkpoint(staging, tokenizer, config, image_tokens=(4, MAX_VISION_TOKENS))
