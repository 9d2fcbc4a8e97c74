"""Small Qwen3-VL checkpoints: configuration, image and video processor, and how they are written.

The random stand-in (:mod:`.tiny_model`), the bundled demo model and the shapes without weights that benchmarks serve
differ in sizes, tokenizers and weights; everything else about their directories is here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checkpoint import greedy

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Qwen3VLConfig, Qwen3VLForConditionalGeneration

PATCH_SIZE = 16
MERGE_SIZE = 2
PIXELS_PER_TOKEN = (PATCH_SIZE * MERGE_SIZE) ** 2


def mrope_section(head_dim: int) -> list[int]:
    """How many rotary frequencies turn with time, height and width, in Qwen3-VL's proportions (24, 20, 20 of 64)."""
    half = head_dim // 2
    side = half * 5 // 16
    return [half - 2 * side, side, side]


def make_config(
    tokenizer: PreTrainedTokenizerBase,
    *,
    text: dict[str, Any],
    vision: dict[str, Any],
    rope_theta: float = 10000.0,
    tied: bool = False,
    dtype: str = "float32",
    **more: Any,
) -> Qwen3VLConfig:
    """A configuration whose special tokens are ``tokenizer``'s.

    Args:
        text: sizes and further fields of the text model, ``head_dim`` and ``hidden_size`` among them.
        vision: sizes and further fields of the vision tower.
        tied: whether the output layer is the embedding.
        more: further fields of the whole.
    """
    from transformers import Qwen3VLConfig

    ids = tokenizer.convert_tokens_to_ids
    rope = {"rope_type": "default", "rope_theta": rope_theta, "mrope_interleaved": True}
    rope["mrope_section"] = mrope_section(text["head_dim"])
    shared = {"tie_word_embeddings": tied, "dtype": dtype}
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    patches = {"patch_size": PATCH_SIZE, "spatial_merge_size": MERGE_SIZE, "out_hidden_size": text["hidden_size"]}
    return Qwen3VLConfig(
        architectures=["Qwen3VLForConditionalGeneration"],
        text_config={**shared, **special, "rope_parameters": rope, **text},
        vision_config={**patches, **vision},
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
        **shared,
        **more,
    )


def write_checkpoint(
    directory: Path,
    tokenizer: PreTrainedTokenizerBase,
    model: Qwen3VLForConditionalGeneration | Qwen3VLConfig,
    *,
    image_tokens: tuple[int, int] = (4, 1024),
) -> None:
    """Write all that transformers and SGLang need into ``directory``, which exists; files of the same name go.

    Args:
        model: the model, in the dtype to store; or its configuration alone, to be served with random weights.
        image_tokens: fewest and most vision tokens of an image; others, and sides that are no multiple of 32 px, are
            resized.
    """
    tokenizer.save_pretrained(directory)
    model.save_pretrained(directory)
    greedy(tokenizer).save_pretrained(directory)
    fewest, most = (PIXELS_PER_TOKEN * tokens for tokens in image_tokens)
    shared = {
        "size": {"shortest_edge": fewest, "longest_edge": most},
        "patch_size": PATCH_SIZE,
        "temporal_patch_size": 2,
        "merge_size": MERGE_SIZE,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "Qwen3VLProcessor",
    }
    types = {
        "preprocessor_config.json": {"image_processor_type": "Qwen2VLImageProcessorFast"},
        "video_preprocessor_config.json": {"video_processor_type": "Qwen3VLVideoProcessor"},
    }
    for name, type_ in types.items():
        (directory / name).write_text(json.dumps(shared | type_, indent=2) + "\n")
