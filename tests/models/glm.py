"""GLM-4.1V and GLM-4.5V."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.models.family import Family, by_processor, text_config

SPECIAL = (
    "<|image|>", "<|video|>", "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>",
)  # fmt: skip
VISION = {
    "depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "out_hidden_size": 128,
    "image_size": 224, "dtype": "float32",
}  # fmt: skip
SIZE = {"shortest_edge": 112 * 112, "longest_edge": 28 * 28 * 2 * 256}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3], "partial_rotary_factor": 0.5}


def _ids(tokenizer: Any) -> dict[str, int]:
    ids = tokenizer.convert_tokens_to_ids
    return {
        "image_token_id": ids("<|image|>"),
        "video_token_id": ids("<|video|>"),
        "image_start_token_id": ids("<|begin_of_image|>"),
        "image_end_token_id": ids("<|end_of_image|>"),
        "video_start_token_id": ids("<|begin_of_video|>"),
        "video_end_token_id": ids("<|end_of_video|>"),
        "dtype": "float32",
        "tie_word_embeddings": False,
    }


def _write_processor(directory: Path, tokenizer: Any) -> None:
    from transformers import Glm4vImageProcessor, Glm4vProcessor, Glm4vVideoProcessor

    images, videos = Glm4vImageProcessor(size=SIZE), Glm4vVideoProcessor(size=SIZE)
    Glm4vProcessor(images, tokenizer, videos).save_pretrained(directory)


def write_glm4v(directory: Path, tokenizer: Any) -> None:
    from transformers import Glm4vConfig

    text = text_config(tokenizer, rope_parameters=ROPE)
    Glm4vConfig(
        architectures=["Glm4vForConditionalGeneration"], text_config=text, vision_config=VISION, **_ids(tokenizer)
    ).save_pretrained(directory)
    _write_processor(directory, tokenizer)


def write_glm4v_moe(directory: Path, tokenizer: Any) -> None:
    from transformers import Glm4vMoeConfig

    text = text_config(
        tokenizer, head_dim=32, rope_parameters=ROPE, n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1,
        moe_intermediate_size=64, first_k_dense_replace=1, use_qk_norm=True,
    )  # fmt: skip
    Glm4vMoeConfig(
        architectures=["Glm4vMoeForConditionalGeneration"], text_config=text, vision_config=VISION, **_ids(tokenizer)
    ).save_pretrained(directory)
    _write_processor(directory, tokenizer)


IMAGE = "<|begin_of_image|><|image|><|end_of_image|>"
FAMILIES = (
    Family(
        "GLM-4.1V",
        "Glm4vForConditionalGeneration",
        write_glm4v,
        IMAGE,
        SPECIAL,
        by_processor("<|image|>"),
        small=(112, 112),
    ),
    Family(
        "GLM-4.5V",
        "Glm4vMoeForConditionalGeneration",
        write_glm4v_moe,
        IMAGE,
        SPECIAL,
        by_processor("<|image|>"),
        small=(112, 112),
    ),
)
