"""InternVL: tiles of a picture and its thumbnail, in one run of tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Sequence

import numpy as np
from PIL import Image

from tests.models.family import TEXT, Family, text_config

SPECIAL = ("<img>", "</img>", "<IMG_CONTEXT>", "<image>", "<video>")
# SGLang cuts tiles of 448 pixels whatever the configuration says; large patches keep prompts short.
TILE, PATCH = 448, 112
TOKENS_PER_TILE = (TILE // PATCH) ** 2 // 4
# Aspect ratios that one grid of at most 12 tiles fits, so that no rule for ties matters.
TILES = {(224, 168): 4 * 3, (280, 112): 5 * 2}


def write(directory: Path, tokenizer: Any, language: str) -> None:
    from sglang.srt.configs.internvl import InternVLChatConfig

    vision = {
        "architectures": ["InternVisionModel"], "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": TILE, "patch_size": PATCH, "drop_path_rate": 0.0,
        "qk_normalization": False, "norm_type": "layer_norm", "use_flash_attn": False,
    }  # fmt: skip
    llm = text_config(tokenizer, architectures=[language], rope_theta=10000.0)
    if language != "Qwen2ForCausalLM":
        llm["head_dim"] = TEXT["hidden_size"] // TEXT["num_attention_heads"]
    config = InternVLChatConfig(
        vision_config=vision, llm_config=llm, downsample_ratio=0.5, select_layer=-1, template="internvl2_5",
        dynamic_image_size=True, use_thumbnail=True, ps_version="v2", force_image_size=TILE, max_dynamic_patch=12,
        architectures=["InternVLChatModel"], dtype="float32",
    )  # fmt: skip
    config.save_pretrained(directory)


def layout(directory: Path, text: str, images: Sequence[Image.Image]) -> np.ndarray:
    """From InternVL's own description: tiles in the closest aspect ratio, and a thumbnail where there are several."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    for image in images:
        tokens = TOKENS_PER_TILE * (TILES[image.size] + 1)
        text = text.replace("<image>", "<img>" + "<IMG_CONTEXT>" * tokens + "</img>", 1)
    return np.array(tokenizer.encode(text)) == tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")


def _family(name: str, language: str) -> Family:
    return Family(
        name, "InternVLChatModel", lambda directory, tokenizer: write(directory, tokenizer, language),
        image="<image>", special=SPECIAL, layout=layout, sizes=tuple(TILES),
        note="tiles and a thumbnail in one span",
    )  # fmt: skip


FAMILIES = (_family("InternVL3", "Qwen2ForCausalLM"), _family("InternVL3.5", "Qwen3ForCausalLM"))
