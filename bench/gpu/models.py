"""Model directories for the GPU programme, made on the spot: real shapes without weights, and models with weights.

The shapes have a configuration, a tokenizer and an image processor and are served with ``--load-format dummy``: speed
does not depend on what the weights are, and no machine without a network has any.
"""

from __future__ import annotations

from itertools import islice, product
from pathlib import Path
from string import ascii_lowercase
from typing import TYPE_CHECKING, Any, Iterator, Sequence

from tgvkv_sglang.demo.bundle import DEMO_MODEL
from tgvkv_sglang.demo.checkpoint import byte_tokenizer, new_directory
from tgvkv_sglang.demo.qwen3_vl import make_config, write_checkpoint
from tgvkv_sglang.demo.tiny_model import make_tiny_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Qwen3VLConfig

MAX_VISION_TOKENS = 4096
MAX_LENGTH = 262144

TEXT = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "head_dim", "vocab_size", "rope_theta")  # fmt: skip
VISION = ("depth", "hidden_size", "intermediate_size", "num_heads", "out_hidden_size", "deepstack_visual_indexes")


def _shape(text: Sequence[float], vision: Sequence[Any]) -> dict[str, dict[str, Any]]:
    vision_config = dict(zip(VISION, vision, strict=True), num_position_embeddings=2304)
    return {"text": dict(zip(TEXT, text, strict=True)), "vision": vision_config}


SHAPES = {
    # Qwen/Qwen3-VL-8B-Instruct: the shape in its published configuration.
    "qwen3-vl-8b": _shape((4096, 12288, 36, 32, 8, 128, 151936, 5e6), (27, 1152, 4304, 16, 4096, [8, 16, 24])),
    # For trying all of this on a CPU.
    "small": _shape((128, 256, 2, 4, 2, 128, 151936, 5e6), (2, 64, 128, 2, 128, [0])),
}
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
    for letters in islice(product(ascii_lowercase, repeat=4), count):
        yield "Ġ" + "".join(letters)


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
