"""Qwen's families."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.models.family import Family, by_processor, text_config

PIXELS = {"shortest_edge": 28 * 28 * 4, "longest_edge": 28 * 28 * 256}


def _ids(tokenizer: Any) -> dict[str, int]:
    ids = tokenizer.convert_tokens_to_ids
    return {
        "image_token_id": ids("<|image_pad|>"),
        "video_token_id": ids("<|video_pad|>"),
        "vision_start_token_id": ids("<|vision_start|>"),
        "vision_end_token_id": ids("<|vision_end|>"),
        "tie_word_embeddings": False,
        "dtype": "float32",
    }


ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}


def write_qwen2_5_vl(directory: Path, tokenizer: Any) -> None:
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    vision = {
        "depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "out_hidden_size": 128,
        "window_size": 112, "fullatt_block_indexes": [1], "dtype": "float32",
    }  # fmt: skip
    config = Qwen2_5_VLConfig(
        architectures=["Qwen2_5_VLForConditionalGeneration"],
        text_config=text_config(tokenizer, rope_parameters=ROPE),
        vision_config=vision,
        **_ids(tokenizer),
    )
    config.save_pretrained(directory)
    images, videos = Qwen2VLImageProcessor(size=PIXELS), Qwen2VLVideoProcessor(size=PIXELS)
    Qwen2_5_VLProcessor(images, tokenizer, videos).save_pretrained(directory)


def write_qwen2_vl(directory: Path, tokenizer: Any) -> None:
    from transformers import Qwen2VLConfig, Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

    config = Qwen2VLConfig(
        architectures=["Qwen2VLForConditionalGeneration"],
        text_config=text_config(tokenizer, rope_parameters=ROPE),
        vision_config={"depth": 2, "embed_dim": 64, "num_heads": 2, "mlp_ratio": 2, "hidden_size": 128,
                       "in_chans": 3, "dtype": "float32"},
        **_ids(tokenizer),
    )  # fmt: skip
    config.save_pretrained(directory)
    images, videos = Qwen2VLImageProcessor(size=PIXELS), Qwen2VLVideoProcessor(size=PIXELS)
    Qwen2VLProcessor(images, tokenizer, videos).save_pretrained(directory)


DEEPSTACK = [0, 1, 2]
"""SGLang's mixture-of-experts classes take it for three layers whatever the configuration says."""
EXPERTS = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "decoder_sparse_step": 1,
    "norm_topk_prob": True, "mlp_only_layers": [],
}  # fmt: skip


def _write_qwen3_vl(config: type, architecture: str, directory: Path, tokenizer: Any, **more: Any) -> None:
    from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    vision = {
        "depth": 3, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "out_hidden_size": 128,
        "num_position_embeddings": 24 * 24, "deepstack_visual_indexes": DEEPSTACK, "dtype": "float32",
    }  # fmt: skip
    text = text_config(tokenizer, head_dim=32, rope_parameters={**ROPE, "mrope_interleaved": True}, **more)
    config(architectures=[architecture], text_config=text, vision_config=vision, **_ids(tokenizer)).save_pretrained(
        directory
    )
    patches = {"patch_size": 16, "size": {"shortest_edge": 32 * 32 * 4, "longest_edge": 32 * 32 * 256}}
    images, videos = Qwen2VLImageProcessor(**patches), Qwen3VLVideoProcessor(**patches)
    Qwen3VLProcessor(images, tokenizer, videos).save_pretrained(directory)


def write_qwen3_vl(directory: Path, tokenizer: Any) -> None:
    from transformers import Qwen3VLConfig

    _write_qwen3_vl(Qwen3VLConfig, "Qwen3VLForConditionalGeneration", directory, tokenizer)


def write_qwen3_vl_moe(directory: Path, tokenizer: Any) -> None:
    from transformers import Qwen3VLMoeConfig

    _write_qwen3_vl(Qwen3VLMoeConfig, "Qwen3VLMoeForConditionalGeneration", directory, tokenizer, **EXPERTS)


FAMILIES = (
    Family("Qwen3-VL", "Qwen3VLForConditionalGeneration", write_qwen3_vl, layout=by_processor("<|image_pad|>"),
           sizes=((256, 192), (192, 192)), small=(64, 64)),
    Family("Qwen2.5-VL", "Qwen2_5_VLForConditionalGeneration", write_qwen2_5_vl, layout=by_processor("<|image_pad|>"),
           small=(56, 56)),
    Family("Qwen2-VL", "Qwen2VLForConditionalGeneration", write_qwen2_vl, layout=by_processor("<|image_pad|>"),
           small=(56, 56)),
    Family("Qwen3-VL-MoE", "Qwen3VLMoeForConditionalGeneration", write_qwen3_vl_moe,
           layout=by_processor("<|image_pad|>"), sizes=((256, 192), (192, 192)), small=(64, 64)),
)  # fmt: skip
