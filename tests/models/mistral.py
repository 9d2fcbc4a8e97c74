"""Pixtral's tower: rows of patches with a token after each row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.models.family import Family, by_processor, text_config

SPECIAL = ("[IMG]", "[IMG_BREAK]", "[IMG_END]", "<pad>")
VISION = {
    "model_type": "pixtral", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 2, "head_dim": 32, "image_size": 336, "patch_size": 14, "hidden_act": "gelu",
    "dtype": "float32",
}  # fmt: skip


def _write_processor(directory: Path, tokenizer: Any, merge: int) -> None:
    from transformers import PixtralImageProcessor, PixtralProcessor

    images = PixtralImageProcessor(size={"longest_edge": 336}, patch_size={"height": 14 * merge, "width": 14 * merge})
    PixtralProcessor(images, tokenizer, patch_size=14, spatial_merge_size=merge).save_pretrained(directory)


def _text(tokenizer: Any) -> dict[str, Any]:
    return text_config(tokenizer, model_type="mistral", architectures=["MistralForCausalLM"], head_dim=32,
                       sliding_window=None)  # fmt: skip


def write_mistral3(directory: Path, tokenizer: Any) -> None:
    from transformers import Mistral3Config

    Mistral3Config(
        architectures=["Mistral3ForConditionalGeneration"], text_config=_text(tokenizer), vision_config=VISION,
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"), spatial_merge_size=2, vision_feature_layer=-1,
        multimodal_projector_bias=False, tie_word_embeddings=False, dtype="float32",
    ).save_pretrained(directory)  # fmt: skip
    _write_processor(directory, tokenizer, 2)


def write_pixtral(directory: Path, tokenizer: Any) -> None:
    from transformers import LlavaConfig

    LlavaConfig(
        architectures=["LlavaForConditionalGeneration"], text_config=_text(tokenizer), vision_config=VISION,
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"), vision_feature_layer=-1,
        vision_feature_select_strategy="full", image_seq_length=1, tie_word_embeddings=False, dtype="float32",
    ).save_pretrained(directory)  # fmt: skip
    _write_processor(directory, tokenizer, 1)


FAMILIES = (
    Family("Mistral Small 3.x", "Mistral3ForConditionalGeneration", write_mistral3, "[IMG]", SPECIAL,
           by_processor("[IMG]"), small=(56, 56), note="a span a row of patches, a token after each"),
    Family("Pixtral (HF format)", "LlavaForConditionalGeneration", write_pixtral, "[IMG]", SPECIAL,
           by_processor("[IMG]"), sizes=((126, 98), (98, 98)), small=(56, 56),
           note="a span a row of patches, a token after each"),
)  # fmt: skip
