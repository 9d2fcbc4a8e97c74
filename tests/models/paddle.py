"""Baidu's families."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.models.family import Family, by_processor, text_config
from tests.models.qwen import ROPE

START, PLACEHOLDER, END = "<|IMAGE_START|>", "<|IMAGE_PLACEHOLDER|>", "<|IMAGE_END|>"
VIDEO = "<|VIDEO_PLACEHOLDER|>"


def write_paddleocr(directory: Path, tokenizer: Any) -> None:
    from transformers import PaddleOCRVLConfig, PaddleOCRVLImageProcessor, PaddleOCRVLProcessor

    ids = tokenizer.convert_tokens_to_ids
    vision = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": 224, "patch_size": 14, "tokens_per_second": 2, "dtype": "float32",
    }  # fmt: skip
    PaddleOCRVLConfig(
        architectures=["PaddleOCRVLForConditionalGeneration"], vision_config=vision, dtype="float32",
        text_config=text_config(tokenizer, head_dim=32, rope_parameters=ROPE, use_bias=False, hidden_act="silu"),
        image_token_id=ids(PLACEHOLDER), video_token_id=ids(VIDEO), vision_start_token_id=ids(START),
        vision_end_token_id=ids(END), tie_word_embeddings=False,
    ).save_pretrained(directory)  # fmt: skip
    size = {"shortest_edge": 28 * 28 * 4, "longest_edge": 28 * 28 * 256}
    PaddleOCRVLProcessor(PaddleOCRVLImageProcessor(size=size), tokenizer).save_pretrained(directory)


FAMILIES = (
    Family("PaddleOCR-VL", "PaddleOCRVLForConditionalGeneration", write_paddleocr, START + PLACEHOLDER + END,
           (START, PLACEHOLDER, END, VIDEO), by_processor(PLACEHOLDER), {"image_token": PLACEHOLDER}, small=(56, 56)),
)  # fmt: skip
