"""Start-up refusals: one sentence each, naming the flag and the way out."""

from __future__ import annotations

from typing import Any, Callable

from ..errors import UnsupportedServerError
from ..flags import BACKEND

Check = tuple[Callable[[Any], bool], str]


def _flag(name: str, value: Any = True) -> Callable[[Any], bool]:
    return lambda args: getattr(args, name, None) == value


def _backends_differ(args: Any) -> bool:
    return {args.prefill_attention_backend or args.attention_backend, args.decode_attention_backend
            or args.attention_backend} != {BACKEND}  # fmt: skip


def _bad_kv_dtype(args: Any) -> bool:
    return args.kv_cache_dtype not in ("auto", "bfloat16", "bf16", "float16", "float32")


CHECKS: tuple[Check, ...] = (
    (_backends_differ, "tgvkv must serve prefill and decode: pass --attention-backend tgvkv alone, without "
                       "--prefill-attention-backend or --decode-attention-backend."),
    (lambda a: a.radix_cache_backend != BACKEND, "--radix-cache-backend {a.radix_cache_backend} cannot hold views: "
                                                 "leave the flag out, tgvkv brings its own radix cache."),
    (lambda a: a.page_size not in (None, 1), "--page-size {a.page_size} is not supported: use --page-size 1."),
    (lambda a: a.speculative_algorithm is not None, "--speculative-algorithm {a.speculative_algorithm} is not "
                                                    "supported: leave speculative decoding off."),
    (_flag("enable_mixed_chunk"), "--enable-mixed-chunk is not supported: leave it out."),
    (_flag("enable_hierarchical_cache"), "--enable-hierarchical-cache (HiCache) is not supported: leave it out."),
    (_flag("enable_hisparse"), "--enable-hisparse is not supported: leave it out."),
    (_flag("enable_lmcache"), "--enable-lmcache is not supported: leave it out."),
    (_flag("enable_flexkv"), "--enable-flexkv is not supported: leave it out."),
    (lambda a: a.disaggregation_mode != "null", "--disaggregation-mode {a.disaggregation_mode} is not supported: "
                                                "serve prefill and decode in one server."),
    (lambda a: a.pp_size > 1, "--pp-size {a.pp_size} is not supported: use --tp-size instead."),
    (_flag("enable_dp_attention"), "--enable-dp-attention is not supported: use --dp-size without it."),
    (_flag("enable_streaming_session"), "--enable-streaming-session is not supported: leave it out."),
    (_flag("enable_session_radix_cache"), "--enable-session-radix-cache is not supported: leave it out."),
    (_bad_kv_dtype, "--kv-cache-dtype {a.kv_cache_dtype} is not supported: use auto, bfloat16 or float16."),
    (lambda a: a.kv_events_config is not None, "--kv-events-config is not supported: leave it out."),
    (_flag("enable_pdmux"), "--enable-pdmux is not supported: leave it out."),
    (_flag("enable_two_batch_overlap"), "--enable-two-batch-overlap is not supported: leave it out."),
    (_flag("disable_radix_cache"), "--disable-radix-cache is not supported: tgvkv is built on the radix cache."),
)  # fmt: skip


def refuse(args: Any) -> None:
    """Raise UnsupportedServerError for the first combination that tgvkv cannot run beside.

    Args:
        args: resolved ServerArgs.
    """
    for check, message in CHECKS:
        if check(args):
            raise UnsupportedServerError("tgvkv: " + message.format(a=args))
    _refuse_environment()


def _refuse_environment() -> None:
    from sglang.srt.environ import envs

    if envs.SGLANG_RUST_SERVER.get():
        raise UnsupportedServerError("tgvkv: SGLANG_RUST_SERVER=1 bypasses request validation: unset it.")
    if envs.SGLANG_ENABLE_POST_CAPTURE_KV_SIZING.get():
        raise UnsupportedServerError(
            "tgvkv: SGLANG_ENABLE_POST_CAPTURE_KV_SIZING=1 allocates KV by layer: unset it."
        )


def refuse_model(model_config: Any) -> None:
    """Raise UnsupportedServerError for models whose attention is not plain causal over one MHA pool."""
    from sglang.srt.configs.model_config import AttentionArch

    if model_config.attention_arch == AttentionArch.MLA:
        raise UnsupportedServerError(
            "tgvkv: models with MLA keep no per-head KV: serve this model without --attention-backend tgvkv."
        )
    if model_config.is_hybrid_swa or getattr(model_config.hf_text_config, "layer_types", None) and any(
        kind not in ("full_attention", "attention") for kind in model_config.hf_text_config.layer_types
    ):
        raise UnsupportedServerError(
            "tgvkv: models with sliding-window, linear or hybrid layers are not supported: serve this model without "
            "--attention-backend tgvkv."
        )
    if getattr(model_config.hf_text_config, "attn_logit_softcapping", None):
        raise UnsupportedServerError(
            "tgvkv: models with soft-capped attention logits are not supported: serve this model without "
            "--attention-backend tgvkv."
        )


def refuse_prefill_graph(model_runner: Any) -> None:
    """Raise UnsupportedServerError where an image's prefill would be replayed from a graph, which cannot score it.

    SGLang captures none for multimodal models but a few; a text-only model may keep its own.
    """
    from sglang.srt.model_executor.cuda_graph_config import Backend

    config = model_runner.server_args.cuda_graph_config
    if model_runner.model_config.is_multimodal and config is not None and config.prefill.backend != Backend.DISABLED:
        raise UnsupportedServerError(
            f"tgvkv: prefill CUDA graphs ({config.prefill.backend}) cannot score images: add "
            "--disable-prefill-cuda-graph."
        )
