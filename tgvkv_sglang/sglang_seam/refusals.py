"""Start-up refusals: one sentence each, naming the flag and the way out."""

from __future__ import annotations

from typing import Any, Callable

import torch
from tgvkv_kernels.common.checks import FP8

from ..errors import UnsupportedServerError
from ..flags import BACKEND
from .model_support import unsupported, unsupported_layer

Check = tuple[Callable[[Any], bool], str]


def _flag(name: str, value: Any = True) -> Callable[[Any], bool]:
    return lambda args: getattr(args, name) == value


def _set(name: str, default: Any = None) -> Callable[[Any], bool]:
    return lambda args: getattr(args, name) != default


def _above_one(name: str) -> Callable[[Any], bool]:
    return lambda args: getattr(args, name) > 1


def _backends_differ(args: Any) -> bool:
    return {args.prefill_attention_backend or args.attention_backend, args.decode_attention_backend
            or args.attention_backend} != {BACKEND}  # fmt: skip


def _kv_dtype_unknown(args: Any) -> bool:
    """Our kernels read KV in the dtype of the model or in 8 bits; ``auto`` takes the model's, or what it asks for."""
    if args.kv_cache_dtype in ("auto", "fp8_e4m3", "fp8_e5m2"):
        return False
    return args.kv_cache_dtype not in ("bf16", "bfloat16") or args.get_model_config().dtype != torch.bfloat16


def _graph_backend(phase: str) -> Callable[[Any], str]:
    return lambda args: getattr(args.cuda_graph_config, phase).backend


def _prefill_graph(args: Any) -> bool:
    """An image's prefill replayed from a graph runs no Python, so nothing would be scored."""
    return _graph_backend("prefill")(args) != "disabled" and args.get_model_config().is_multimodal


CHECKS: tuple[Check, ...] = (
    (_set("dllm_algorithm"), "--dllm-algorithm {a.dllm_algorithm} is not supported: diffusion models decode without "
                             "causal attention, serve this model without --attention-backend tgvkv."),
    (_backends_differ, "tgvkv must serve prefill and decode: pass --attention-backend tgvkv alone, without "
                       "--prefill-attention-backend or --decode-attention-backend (SGLang resolved them to "
                       "{a.attention_backend}, {a.prefill_attention_backend} and {a.decode_attention_backend})."),
    (_set("radix_cache_backend", BACKEND), "--radix-cache-backend {a.radix_cache_backend} cannot hold views: "
                                           "leave the flag out, tgvkv brings its own radix cache."),
    (lambda a: a.page_size not in (None, 1), "--page-size {a.page_size} is not supported: use --page-size 1."),
    (_set("radix_eviction_policy", "lru"), "--radix-eviction-policy {a.radix_eviction_policy} is not supported: leave "
                                           "it out, the least recently used goes first."),
    (_set("speculative_algorithm"), "--speculative-algorithm {a.speculative_algorithm} is not supported: leave "
                                    "speculative decoding off."),
    (_set("decoupled_spec_role", "null"), "--decoupled-spec-role {a.decoupled_spec_role} is not supported: leave "
                                          "speculative decoding off."),
    (_flag("enable_mixed_chunk"), "--enable-mixed-chunk is not supported: leave it out."),
    (_flag("enable_torch_compile"), "--enable-torch-compile is not supported, since views are not compiled: leave it "
                                    "out."),
    (lambda a: _graph_backend("decode")(a) not in ("full", "disabled"),
     "--cuda-graph-backend-decode with breakable or tc_piecewise graphs is not supported: use full or disabled."),
    (_flag("debug_cuda_graph"), "--debug-cuda-graph breaks the decode graphs up: leave it out."),
    (_prefill_graph, "prefill CUDA graphs ({a.cuda_graph_config.prefill.backend}) cannot score images: add "
                     "--disable-prefill-cuda-graph."),
    (_flag("enable_hierarchical_cache"), "--enable-hierarchical-cache (HiCache) is not supported: leave it out."),
    (_flag("enable_hisparse"), "--enable-hisparse is not supported: leave it out."),
    (_flag("enable_lmcache"), "--enable-lmcache is not supported: leave it out."),
    (_flag("enable_flexkv"), "--enable-flexkv is not supported: leave it out."),
    (_set("disaggregation_mode", "null"), "--disaggregation-mode {a.disaggregation_mode} is not supported: "
                                          "serve prefill and decode in one server."),
    (_above_one("pp_size"), "--pp-size {a.pp_size} is not supported: use --tp-size instead."),
    (_above_one("dcp_size"), "--dcp-size {a.dcp_size} spreads a request's KV over ranks: use --tp-size instead."),
    (lambda a: a.attn_cp_size > 1 or a.enable_prefill_cp, "context parallelism (--attn-cp-size {a.attn_cp_size}, "
                                                          "--enable-prefill-cp) is not supported: use --tp-size "
                                                          "instead."),
    (_flag("enable_dp_attention"), "--enable-dp-attention is not supported: use --dp-size without it."),
    (_set("elastic_ep_backend"), "--elastic-ep-backend rewrites the radix cache's namespaces: leave it out."),
    (_flag("enable_streaming_session"), "--enable-streaming-session is not supported: leave it out."),
    (_flag("enable_session_radix_cache"), "--enable-session-radix-cache is not supported: leave it out."),
    (_kv_dtype_unknown, "--kv-cache-dtype {a.kv_cache_dtype} is neither the model's dtype nor fp8: use auto, fp8_e4m3 "
                        "or fp8_e5m2, or set --dtype too."),
    (_set("kv_events_config"), "--kv-events-config is not supported: leave it out."),
    (_set("kv_canary", "none"), "--kv-canary {a.kv_canary} would report every evicted token: leave it out."),
    (_flag("enable_return_routed_experts"), "--enable-return-routed-experts looks tokens up by their KV slots, which "
                                            "eviction frees: leave it out."),
    (_above_one("tokenizer_worker_num"), "--tokenizer-worker-num {a.tokenizer_worker_num} starts processes that load "
                                         "no plugins and would not check requests: use --tokenizer-worker-num 1."),
    (_flag("smg_grpc_mode"), "--smg-grpc-mode bypasses request validation: serve HTTP."),
    (_flag("enable_pdmux"), "--enable-pdmux is not supported: leave it out."),
    (_flag("enable_two_batch_overlap"), "--enable-two-batch-overlap is not supported: leave it out."),
    (_flag("encoder_only"), "--encoder-only serves no answers and has no KV: start it without --attention-backend "
                            "tgvkv."),
    (_flag("language_only"), "--language-only takes pictures from encoders on other servers, which was never tried "
                             "with eviction: leave it out, pictures are encoded here."),
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
    if envs.SGLANG_RADIX_FORCE_MISS.get():
        raise UnsupportedServerError("tgvkv: SGLANG_RADIX_FORCE_MISS=1 discards what is planned on: unset it.")
    if envs.SGLANG_ENABLE_POST_CAPTURE_KV_SIZING.get():
        raise UnsupportedServerError(
            "tgvkv: SGLANG_ENABLE_POST_CAPTURE_KV_SIZING=1 allocates KV by layer: unset it."
        )


def refuse_model(model_config: Any) -> None:
    """Raise UnsupportedServerError for a model that tgvkv cannot serve (:mod:`.model_support`)."""
    _refuse_for(model_config, unsupported(model_config))


def refuse_loaded(model_runner: Any) -> None:
    """Raise UnsupportedServerError for what only the loaded weights tell: the layers, and KV in another dtype."""
    _refuse_for(model_runner.model_config, unsupported_layer(model_runner.model))
    kv_dtype = model_runner.kv_cache_dtype
    if kv_dtype not in (model_runner.dtype, *FP8):
        raise UnsupportedServerError(
            f"tgvkv: this checkpoint wants KV in {kv_dtype} beside a model in {model_runner.dtype}, which cannot be "
            "scored: add --dtype bfloat16 --kv-cache-dtype bfloat16."
        )
    if model_runner.device == "cuda" and kv_dtype == torch.float8_e4m3fn:
        capability = torch.cuda.get_device_capability()
        if capability < (8, 9):
            raise UnsupportedServerError(
                "tgvkv: KV in float8_e4m3fn needs a GPU of compute capability 8.9 or later, this one has "
                f"{'.'.join(map(str, capability))}: use --kv-cache-dtype fp8_e5m2, or bfloat16."
            )


def _refuse_for(model_config: Any, reason: str | None) -> None:
    if reason is not None:
        raise UnsupportedServerError(
            f"tgvkv: {model_config.hf_config.architectures[0]} {reason}: serve this model without "
            "--attention-backend tgvkv."
        )
