"""Qwen3-Omni: pictures and audio in one prompt; audio is text to us."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.models.family import Family, by_processor, text_config
from tests.models.qwen import DEEPSTACK, EXPERTS, ROPE

AUDIO = "<|audio_start|><|audio_pad|><|audio_end|>"
SPECIAL = ("<|audio_start|>", "<|audio_pad|>", "<|audio_end|>")
NAMED = {
    "image_token": "<|image_pad|>", "audio_token": "<|audio_pad|>", "video_token": "<|video_pad|>",
    "vision_bos_token": "<|vision_start|>", "vision_eos_token": "<|vision_end|>",
    "audio_bos_token": "<|audio_start|>", "audio_eos_token": "<|audio_end|>",
}  # fmt: skip


def write(directory: Path, tokenizer: Any) -> None:
    from transformers import (
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
        Qwen3OmniMoeConfig,
        Qwen3OmniMoeProcessor,
        WhisperFeatureExtractor,
    )

    ids = tokenizer.convert_tokens_to_ids
    vision = {
        "depth": 3, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "out_hidden_size": 128,
        "num_position_embeddings": 24 * 24, "deepstack_visual_indexes": DEEPSTACK, "dtype": "float32",
    }  # fmt: skip
    audio = {
        "num_mel_bins": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 64, "d_model": 64,
        "output_dim": 128, "downsample_hidden_size": 16, "dtype": "float32",
    }  # fmt: skip
    text = text_config(
        tokenizer, head_dim=32, rope_parameters={**ROPE, "mrope_interleaved": True}, shared_expert_intermediate_size=0,
        **EXPERTS,
    )  # fmt: skip
    thinker = {
        "audio_config": audio, "vision_config": vision, "text_config": text, "dtype": "float32",
        "audio_token_id": ids("<|audio_pad|>"), "image_token_id": ids("<|image_pad|>"),
        "video_token_id": ids("<|video_pad|>"), "audio_start_token_id": ids("<|audio_start|>"),
        "vision_start_token_id": ids("<|vision_start|>"), "vision_end_token_id": ids("<|vision_end|>"),
        "audio_end_token_id": ids("<|audio_end|>"), "user_token_id": ord("u"),
    }  # fmt: skip
    Qwen3OmniMoeConfig(
        architectures=["Qwen3OmniMoeForConditionalGeneration"], thinker_config=thinker, enable_audio_output=False,
        dtype="float32",
    ).save_pretrained(directory)  # fmt: skip
    patches = {"patch_size": 16, "size": {"shortest_edge": 32 * 32 * 4, "longest_edge": 32 * 32 * 256}}
    Qwen3OmniMoeProcessor(
        Qwen2VLImageProcessor(**patches), Qwen2VLVideoProcessor(**patches),
        WhisperFeatureExtractor(feature_size=32, return_attention_mask=True), tokenizer,
    ).save_pretrained(directory)  # fmt: skip


FAMILIES = (
    Family("Qwen3-Omni", "Qwen3OmniMoeForConditionalGeneration", write, special=SPECIAL,
           layout=by_processor("<|image_pad|>"), named=NAMED, sizes=((256, 192), (192, 192)), small=(64, 64),
           note="the thinker; audio is text to us"),
)  # fmt: skip
