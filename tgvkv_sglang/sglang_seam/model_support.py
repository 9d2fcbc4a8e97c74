"""Which models tgvkv can serve: plain causal attention of every layer over one pool of K and V per head.

The configuration is judged with SGLang's own predicates, before weights are loaded; the layers of the loaded model are
judged once more, because a model may do what its configuration does not say.
"""

from __future__ import annotations

import logging
from typing import Any, Callable

logger = logging.getLogger(__name__)
FULL = ("full_attention", "attention")
WINDOWED = ("sliding_attention", "chunked_attention")


def _layer_types(config: Any) -> set[str]:
    return set(getattr(config.hf_text_config, "layer_types", None) or ())


def _windowed(config: Any) -> bool:
    # Not config.is_hybrid_swa: --disable-hybrid-swa-memory hides it, and the layers keep their windows all the same.
    from sglang.srt.configs.model_config import is_hybrid_swa_model

    by_name = is_hybrid_swa_model(config.hf_config.architectures, config.hf_text_config)
    return by_name or config.attention_chunk_size is not None or bool(_layer_types(config) & set(WINDOWED))


def _sparse(config: Any) -> bool:
    from sglang.srt.configs.model_config import is_deepseek_dsa, is_deepseek_v4, is_minimax_sparse

    return any(test(config.hf_config) for test in (is_deepseek_dsa, is_deepseek_v4, is_minimax_sparse))


def _mla(config: Any) -> bool:
    from sglang.srt.configs.model_config import AttentionArch

    return config.attention_arch == AttentionArch.MLA


def _recurrent(config: Any) -> bool:
    from sglang.srt.configs.hybrid_arch import mambaish_config

    return mambaish_config(config) is not None or not _layer_types(config) <= {*FULL, *WINDOWED}


def _soft_capped(config: Any) -> bool:
    return bool(getattr(config.hf_text_config, "attn_logit_softcapping", None))


# In this order: windows come before recurrent layers, since SGLang's own test of the latter asks one windowed model
# (Inkling) for what is known only once the server runs.
REASONS: tuple[tuple[Callable[[Any], bool], str], ...] = (
    (lambda config: not config.is_generation, "is served as an embedding model, which decodes nothing"),
    (lambda config: config.is_encoder_decoder, "attends to an encoder by cross-attention"),
    (_windowed, "has layers with sliding-window or chunked attention"),
    (_sparse, "selects KV by itself (sparse attention)"),
    (_mla, "keeps compressed KV (MLA) instead of K and V per head"),
    (_recurrent, "has linear-attention, state-space or convolution layers"),
    (lambda config: getattr(config.hf_config, "dual_chunk_attention_config", None) is not None,
     "uses dual-chunk attention"),
    (_soft_capped, "has soft-capped attention logits"),
    (lambda config: config.has_attention_sinks, "has attention sinks"),
)  # fmt: skip


def unsupported(config: Any) -> str | None:
    """Why a model cannot be served, as the end of a sentence about it; None when it can be.

    Args:
        config: SGLang's ModelConfig.
    """
    return next((reason for test, reason in REASONS if test(config)), None)


def unsupported_layer(model: Any) -> str | None:
    """The same for a loaded model (``nn.Module``), judged by its attention layers."""
    from sglang.srt.layers.radix_attention import AttentionType, RadixAttention

    for layer in model.modules():
        if not isinstance(layer, RadixAttention):
            continue
        for found, reason in (
            (layer.is_cross_attention, "cross-attention"),
            (layer.sliding_window_size > -1, f"a sliding window of {layer.sliding_window_size}"),
            (layer.attn_type != AttentionType.DECODER, f"{layer.attn_type.value} attention"),
            (layer.logit_cap > 0, f"attention logits soft-capped at {layer.logit_cap}"),
            (layer.pos_encoding_mode != "NONE", f"positions encoded in attention ({layer.pos_encoding_mode})"),
            (layer.xai_temperature_len > 0, "an attention temperature that depends on the position"),
        ):
            if found:
                return f"has {reason} in layer {layer.layer_id}"
    return None


def ask_for_transformers(server_args: Any, model_config: Any) -> None:
    """``--model-impl transformers`` for LLaVA-1.5, whose CLIP tower SGLang's own class cannot load.

    A user's own choice stays.
    """
    from sglang.srt.configs.model_config import ModelImpl

    config = model_config.hf_config
    tower = getattr(getattr(config, "vision_config", None), "model_type", None)
    clip = config.architectures[0] == "LlavaForConditionalGeneration" and tower == "clip_vision_model"
    if clip and model_config.model_impl == ModelImpl.AUTO:
        logger.info("tgvkv: --model-impl transformers is set: SGLang's own class cannot load the model's CLIP tower")
        server_args.model_impl = "transformers"
        model_config.model_impl = ModelImpl.TRANSFORMERS
