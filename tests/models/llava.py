"""LLaVA in Hugging Face's format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.models.family import Family, by_processor, text_config
from tests.models.plain import write_weights

SPECIAL = ("<image>",)
CLIP = {
    "model_type": "clip_vision_model", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 2, "image_size": 112, "patch_size": 14, "projection_dim": 64, "dtype": "float32",
}  # fmt: skip
SIGLIP = {
    "model_type": "siglip_vision_model", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 2, "image_size": 112, "patch_size": 14, "dtype": "float32", "vision_use_head": False,
}  # fmt: skip
SIDE = {"height": 112, "width": 112}
PINPOINTS = [[112, 224], [224, 112]]
PATCH = 28  # of the tiled ones, so that prompts stay short: 16 patches a tile
TILED = ((224, 112), (112, 224))


def _shared(tokenizer: Any) -> dict[str, Any]:
    image = tokenizer.convert_tokens_to_ids("<image>")
    return {"image_token_index": image, "tie_word_embeddings": False, "dtype": "float32"}


def _clip_processor(cls: type, **more: Any) -> Any:
    return cls(size={"shortest_edge": 112}, crop_size=SIDE, **more)


def write_llava(directory: Path, tokenizer: Any) -> None:
    from transformers import CLIPImageProcessor, LlavaConfig, LlavaProcessor

    text = text_config(tokenizer, model_type="llama", architectures=["LlamaForCausalLM"], head_dim=32)
    config = LlavaConfig(
        architectures=["LlavaForConditionalGeneration"], text_config=text, vision_config=CLIP, image_seq_length=64,
        **_shared(tokenizer),
    )  # fmt: skip
    write_weights(directory, config)
    images = _clip_processor(CLIPImageProcessor)
    LlavaProcessor(
        images, tokenizer, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1,
    ).save_pretrained(directory)  # fmt: skip


def write_llava_next(directory: Path, tokenizer: Any) -> None:
    from transformers import LlavaNextConfig, LlavaNextImageProcessor, LlavaNextProcessor

    text = text_config(tokenizer, model_type="mistral", architectures=["MistralForCausalLM"], head_dim=32,
                       sliding_window=None)  # fmt: skip
    config = LlavaNextConfig(
        architectures=["LlavaNextForConditionalGeneration"], text_config=text,
        vision_config=CLIP | {"patch_size": PATCH},
        image_grid_pinpoints=PINPOINTS, image_seq_length=16, **_shared(tokenizer),
    )  # fmt: skip
    write_weights(directory, config)
    images = _clip_processor(LlavaNextImageProcessor, image_grid_pinpoints=PINPOINTS)
    LlavaNextProcessor(
        images, tokenizer, patch_size=PATCH, vision_feature_select_strategy="default", num_additional_image_tokens=1,
    ).save_pretrained(directory)  # fmt: skip


def write_onevision(directory: Path, tokenizer: Any) -> None:
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionImageProcessor,
        LlavaOnevisionProcessor,
        LlavaOnevisionVideoProcessor,
    )

    text = text_config(tokenizer, model_type="qwen2", architectures=["Qwen2ForCausalLM"])
    config = LlavaOnevisionConfig(
        architectures=["LlavaOnevisionForConditionalGeneration"], text_config=text,
        vision_config=SIGLIP | {"patch_size": PATCH},
        image_grid_pinpoints=PINPOINTS, vision_feature_select_strategy="full", vision_feature_layer=-1,
        video_token_index=tokenizer.convert_tokens_to_ids("<|video_pad|>"), **_shared(tokenizer),
    )  # fmt: skip
    write_weights(directory, config)
    images = LlavaOnevisionImageProcessor(size=SIDE, image_grid_pinpoints=PINPOINTS)
    LlavaOnevisionProcessor(
        images, tokenizer, LlavaOnevisionVideoProcessor(size=SIDE), num_image_tokens=16,
        vision_feature_select_strategy="full", video_token="<|video_pad|>",
    ).save_pretrained(directory)  # fmt: skip


NOTE = "stock SGLang serves it without radix cache; compared with plain transformers"
FAMILIES = (
    Family("LLaVA-1.5", "LlavaForConditionalGeneration", write_llava, "<image>", SPECIAL, by_processor("<image>"),
           weights=True, note=NOTE),
    Family("LLaVA-NeXT", "LlavaNextForConditionalGeneration", write_llava_next, "<image>", SPECIAL,
           by_processor("<image>"), weights=True, note=NOTE, sizes=TILED),
    Family("LLaVA-OneVision", "LlavaOnevisionForConditionalGeneration", write_onevision, "<image>", SPECIAL,
           by_processor("<image>"), weights=True, note=NOTE, sizes=TILED, flags=("--chunked-prefill-size", "40")),
)  # fmt: skip
