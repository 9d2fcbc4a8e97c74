"""LLaVA in Hugging Face's format, which SGLang 0.5.17 serves through transformers' own classes, without radix cache.

Such a class is given whole prompts with whole pictures, wherefore SGLang turns radix cache and chunked prefill off. Its
own models go another way: pad ids over a picture's tokens, and a routine that embeds what a prefill computes of the
pictures. The stock class has all the functions that this way asks for; here it takes it, and cache and chunks stay on.
"""

from __future__ import annotations

from typing import Any, Iterable

import torch
from sglang.srt.runtime_context import get_server_args

from .server_args import config_of

ARCHITECTURES = (
    "LlavaForConditionalGeneration",
    "LlavaNextForConditionalGeneration",
    "LlavaOnevisionForConditionalGeneration",
)
"""What these make of a picture are embeddings and nothing else; of other classes that is not known."""


def load_weights(original: Any, self: Any, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
    """Published checkpoints name a level of the CLIP tower that the newest transformers leaves out."""
    tower = getattr(self.model, "vision_tower", None)
    if _serves(get_server_args(), self.config) and not hasattr(tower, "vision_model"):
        weights = ((name.replace("vision_tower.vision_model.", "vision_tower."), weight) for name, weight in weights)
    return original(self, weights)


def _serves(server_args: Any, config: Any) -> bool:
    return config_of(server_args) is not None and config.architectures[0] in ARCHITECTURES


def build_kv_cache(original: Any, **kwargs: Any) -> Any:
    """Radix cache and chunked prefill, as for a model of SGLang's own: pictures are embedded in the same way."""
    from sglang.srt.configs.model_config import ModelImpl

    model_config = kwargs["model_config"]
    if _serves(kwargs["server_args"], model_config.hf_config):
        model_config._resolved_model_impl = ModelImpl.SGLANG
    return original(**kwargs)


def build_mm_items(result: list[Any], self: Any, *args: Any, **kwargs: Any) -> list[Any]:
    """An item a picture, as SGLang's own processors make them: what came before a new picture is found again."""
    from sglang.srt.managers.mm_utils import get_new_expanded_mm_items

    return get_new_expanded_mm_items(result) if _serves(self.server_args, self.hf_config) else result


def embed_pictures(model: Any, architecture: str) -> None:
    """Give a loaded model (``nn.Module``) the embeddings of its prompts' pictures; others stay as they are."""
    from sglang.srt.managers.mm_utils import MultiModalityDataPaddingPatternMultimodalTokens
    from sglang.srt.models.transformers import MultiModalMixin

    if architecture in ARCHITECTURES and isinstance(model, MultiModalMixin):
        model._forward_hidden_states = _Embedding(model)
        model.pad_input_ids = MultiModalityDataPaddingPatternMultimodalTokens().pad_input_tokens


class _Embedding:
    """In the place of the model's ``_forward_hidden_states``; SGLang's routine takes it for a language model."""

    def __init__(self, model: Any):
        self.model, self.stock = model, model._forward_hidden_states

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.model.model.get_input_embeddings()

    def __call__(
        self, input_ids: torch.Tensor | None, positions: torch.Tensor, forward_batch: Any,
        input_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        from sglang.srt.managers.mm_utils import general_mm_embed_routine

        if input_embeds is not None:
            return self.stock(input_ids, positions, forward_batch, input_embeds)
        return general_mm_embed_routine(input_ids, forward_batch, self, self.model, positions=positions)
