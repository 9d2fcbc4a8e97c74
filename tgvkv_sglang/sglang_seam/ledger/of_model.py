"""Names of SGLang's configuration, model, attention and platforms that we read, assign or override."""

from __future__ import annotations

from .rows import SRT, Members

FLASHINFER_ROWS = "FlashInferAttnBackend takes index rows from a subclass"
INTERFACE = "never: this is the interface"


OF_MODEL: tuple[Members, ...] = (
    # -- the model and its attention -----------------------------------------------------------------------------
    Members(
        f"{SRT}server_args.ServerArgs",
        "ATTRIBUTE",
        ("attention_backend", "attn_cp_size", "cuda_graph_config", "dcp_size", "debug_cuda_graph",
         "decode_attention_backend", "decoupled_spec_role", "disable_overlap_schedule", "disable_radix_cache",
         "disaggregation_mode", "dllm_algorithm", "elastic_ep_backend", "enable_dp_attention", "enable_flexkv",
         "enable_hierarchical_cache", "enable_hisparse", "enable_lmcache", "enable_mixed_chunk", "enable_pdmux",
         "enable_prefill_cp", "enable_return_routed_experts", "enable_session_radix_cache",
         "enable_streaming_session", "enable_torch_compile", "enable_two_batch_overlap", "encoder_only",
         "get_model_config", "kv_cache_dtype", "kv_canary", "kv_events_config", "language_only", "page_size", "pp_size",
         "prefill_attention_backend", "radix_cache_backend", "radix_eviction_policy", "smg_grpc_mode",
         "speculative_algorithm", "tokenizer_worker_num"),
        "flashinfer_backend,refusals,server_args",
        how="read once SGLang has resolved them", why="what tgvkv cannot run beside is refused at start-up",
        remove_when="the feature is supported, or refused by SGLang for backends that lack it",
    ),
    Members(
        f"{SRT}server_args.ServerArgs", "ATTRIBUTE", ("device", "grammar_backend"), "request_checks",
        how="read", why="a grammar on a CPU would end the scheduler", remove_when="SGLang refuses it",
    ),
    Members(
        f"{SRT}environ.envs",
        "ATTRIBUTE",
        ("SGLANG_ENABLE_POST_CAPTURE_KV_SIZING", "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY",
         "SGLANG_RADIX_FORCE_MISS", "SGLANG_RUST_SERVER"),
        "radix_cache,refusals,selections",
        how="read", why="what tgvkv cannot run beside is refused at start-up; our strict checks go with SGLang's",
        remove_when="as the row above",
    ),
    Members(
        f"{SRT}model_executor.cuda_graph_config.CudaGraphConfig", "ATTRIBUTE", ("decode", "prefill"), "refusals",
        how="read", why="a prefill replayed from a graph cannot be scored; views want whole decode graphs",
        remove_when="backends can refuse graphs",
    ),
    Members(
        f"{SRT}model_executor.cuda_graph_config.PhaseConfig", "ATTRIBUTE", ("backend",), "refusals",
        how="read, compared with names", why="a prefill replayed from a graph cannot be scored",
        remove_when="backends can refuse graphs",
    ),
    Members(
        f"{SRT}configs.model_config.ModelConfig",
        "ATTRIBUTE",
        ("attention_arch", "attention_chunk_size", "dtype", "has_attention_sinks", "head_dim", "hf_config",
         "hf_text_config", "is_encoder_decoder", "is_generation", "is_multimodal", "model_impl", "num_attention_heads",
         "num_hidden_layers", "vocab_size"),
        "backend,llava,model_support,refusals,requests,server_args,tensor_parallel",
        how="read; heads are the whole model's", why="models that cannot work are refused; scores are means over heads",
        remove_when=INTERFACE,
    ),
    Members(
        "transformers.PretrainedConfig",
        "OPTIONAL", ("architectures", "attn_logit_softcapping", "dual_chunk_attention_config", "layer_types"),
        "model_support,refusals",
        how="read off `ModelConfig.hf_config` and `hf_text_config`, all but the first with a default",
        why="models that cannot work are refused", remove_when="ModelConfig names them",
    ),
    Members(
        "transformers.PretrainedConfig", "OPTIONAL", ("model_type", "vision_config"), "model_support",
        how="read off `ModelConfig.hf_config`", why="tells LLaVA with a CLIP tower from Pixtral, which has no CLIP",
        remove_when="SGLang's own LLaVA class loads CLIP",
    ),
    Members(
        f"{SRT}configs.model_config.ModelConfig", "OPTIONAL", ("_resolved_model_impl",), "llava",
        how="assigned before SGLang's pools and cache are made; without effect, SGLang hands our cache factory a "
            "disabled cache, which is refused",
        why="SGLang turns radix cache and chunked prefill off where transformers embeds the pictures; here it does not",
        remove_when="SGLang's transformers backend embeds pictures by SGLang's own routine",
    ),
    Members(
        f"{SRT}configs.model_config", "ATTRIBUTE", ("ModelImpl",), "llava,model_support",
        how="imported", why="as the row below", remove_when="SGLang's own LLaVA class loads CLIP",
    ),
    Members(
        f"{SRT}configs.model_config.ModelImpl", "ATTRIBUTE", ("AUTO", "SGLANG", "TRANSFORMERS"), "llava,model_support",
        how="assigned to `ModelConfig.model_impl` and `ModelConfig._resolved_model_impl`",
        why="LLaVA-1.5 loads with transformers' class only", remove_when="SGLang's own LLaVA class loads CLIP",
    ),
    Members(
        f"{SRT}server_args.ServerArgs", "ATTRIBUTE", ("model_impl",), "model_support",
        how="assigned in `get_model_config`", why="the other processes read the model's implementation there",
        remove_when="SGLang's own LLaVA class loads CLIP",
    ),
    Members(
        f"{SRT}managers.mm_utils.MultiModalityDataPaddingPatternMultimodalTokens", "ATTRIBUTE", ("pad_input_tokens",),
        "llava",
        how="assigned as the model's `pad_input_ids`", why="the embedding routine finds pictures by their pad ids",
        remove_when="SGLang's transformers backend embeds pictures by SGLang's own routine",
    ),
    Members(
        f"{SRT}models.transformers.MultiModalMixin", "ATTRIBUTE", ("pad_input_ids",), "llava",
        how="replaced on a loaded LLaVA", why="as the row above",
        remove_when="SGLang's transformers backend embeds pictures by SGLang's own routine",
    ),
    Members(
        f"{SRT}multimodal.processors.transformers_auto.TransformersAutoMultimodalProcessor", "ATTRIBUTE",
        ("hf_config", "server_args"), "llava",
        how="read", why="other models and stock servers are left alone", remove_when="as the hook on it",
    ),
    Members(
        f"{SRT}models.transformers.TransformersBase", "OPTIONAL", ("vision_model", "vision_tower"), "llava",
        how="asked of its `model` while weights are loaded",
        why="published checkpoints name a level of the CLIP tower that the newest transformers leaves out",
        remove_when="SGLang's transformers backend renames weights as transformers does",
    ),
    Members(
        f"{SRT}models.transformers", "ATTRIBUTE", ("MultiModalMixin",), "llava",
        how="imported; a loaded model may be one", why="transformers' classes in SGLang",
        remove_when="SGLang's transformers backend embeds pictures by SGLang's own routine",
    ),
    Members(
        f"{SRT}managers.mm_utils",
        "ATTRIBUTE",
        ("MultiModalityDataPaddingPatternMultimodalTokens", "general_mm_embed_routine", "get_new_expanded_mm_items"),
        "llava",
        how="imported, called as SGLang's own models and processors do",
        why="embeddings of pictures, an item each, for LLaVA in transformers' classes",
        remove_when="SGLang's transformers backend embeds pictures by SGLang's own routine",
    ),
    Members(
        f"{SRT}configs.model_config",
        "ATTRIBUTE", ("is_deepseek_dsa", "is_deepseek_v4", "is_hybrid_swa_model", "is_minimax_sparse"),
        "model_support",
        how="imported, called", why="models that cannot work are refused", remove_when=INTERFACE,
    ),
    Members(
        f"{SRT}configs.hybrid_arch", "ATTRIBUTE", ("mambaish_config",), "model_support",
        how="imported, called", why="models that cannot work are refused", remove_when=INTERFACE,
    ),
    Members(
        f"{SRT}configs.model_config.AttentionArch", "ATTRIBUTE", ("MLA",), "model_support",
        how="read", why="models that cannot work are refused", remove_when=INTERFACE,
    ),
    Members(
        f"{SRT}model_executor.model_runner.ModelRunner",
        "ATTRIBUTE",
        ("device", "dtype", "forward_stream", "kv_cache_dtype", "model", "model_config", "server_args",
         "token_to_kv_pool"),
        "backend,batches,flashinfer_backend,refusals,tensor_parallel,torch_backend",
        how="read; packing moves KV on `forward_stream`", why="what a backend is built from", remove_when=INTERFACE,
    ),
    Members(
        f"{SRT}layers.attention.base_attn_backend", "ATTRIBUTE", ("AttentionBackend",), "backend",
        how="imported", why="what our factory returns", remove_when=INTERFACE,
    ),
    Members(
        f"{SRT}layers.radix_attention.RadixAttention",
        "ATTRIBUTE",
        ("attn_type", "head_dim", "is_cross_attention", "k_scale_float", "layer_id", "logit_cap", "pos_encoding_mode",
         "qk_head_dim", "scaling", "sliding_window_size", "tp_k_head_num", "tp_q_head_num", "v_head_dim",
         "v_scale_float", "xai_temperature_len"),
        "flashinfer_backend,model_support,torch_backend",
        how="read", why="one layer's attention", remove_when=INTERFACE,
    ),
    Members(
        f"{SRT}layers.radix_attention.AttentionType", "ATTRIBUTE", ("DECODER", "ENCODER_ONLY"),
        "flashinfer_backend,model_support,torch_backend",
        how="read", why="only decoder self-attention is served", remove_when=INTERFACE,
    ),
    Members(
        f"{SRT}runtime_context", "ATTRIBUTE", ("get_parallel", "get_server_args"), "pictures,tensor_parallel",
        how="imported, called", why="ranks of the attention tensor-parallel group; whether the server runs on tgvkv",
        remove_when=INTERFACE,
    ),
    Members(
        f"{SRT}runtime_context.ParallelContext", "ATTRIBUTE", ("attn_tp_group", "attn_tp_rank"),
        "tensor_parallel",
        how="read", why="scores are summed over ranks; the first rank writes traces", remove_when=INTERFACE,
    ),
    Members(
        f"{SRT}distributed.parallel_state.GroupCoordinator",
        "ATTRIBUTE", ("all_reduce", "device_group", "world_size"), "tensor_parallel",
        how="read; `all_reduce` called", why="scores are reduced over ranks", remove_when=INTERFACE,
    ),
    Members(
        f"{SRT}distributed.device_communicators.pynccl.PyNcclCommunicator",
        "ATTRIBUTE", ("available", "disabled", "group", "rank", "world_size"), "cpu",
        how="assigned in place of the stock constructor, without CUDA only", why="gloo is used instead",
        remove_when="SGLang builds the communicator for CUDA devices only",
    ),
    Members(
        f"{SRT}layers.attention.torch_native_backend.TorchNativeAttnBackend",
        "OVERRIDE", ("forward_decode", "forward_extend", "init_forward_metadata"), "torch_backend:TgvTorchBackend",
        how="stock for a batch without vision", why="attention over dense slots and views on a CPU",
        remove_when=INTERFACE,
    ),
    Members(
        f"{SRT}layers.attention.torch_native_backend.TorchNativeAttnBackend",
        "ATTRIBUTE", ("req_to_token_pool", "token_to_kv_pool"), "torch_backend",
        how="read", why="where K and V lie", remove_when=INTERFACE,
    ),
    # -- FlashInfer ----------------------------------------------------------------------------------------------
    Members(
        f"{SRT}layers.attention.flashinfer_backend.FlashInferAttnBackend",
        "OVERRIDE",
        ("_prepare_dequant_workspace_metadata_for_extend", "forward_decode", "forward_extend",
         "init_cuda_graph_state", "init_forward_metadata", "init_forward_metadata_out_graph"),
        "flashinfer_backend:TgvFlashInferBackend",
        how="stock for a batch without vision; stock planning of a prefill takes its index rows from what "
            "`_prepare_dequant_workspace_metadata_for_extend` leaves",
        why="dense part by stock, without viewed positions; views by our kernels", remove_when=FLASHINFER_ROWS,
    ),
    Members(
        f"{SRT}layers.attention.flashinfer_backend.FlashInferAttnBackend",
        "ATTRIBUTE",
        ("decode_cuda_graph_metadata", "dq_page_table", "dq_paged_kernel_lens", "forward_metadata",
         "indices_updater_decode", "kv_indptr", "req_to_token_pool", "token_to_kv_pool"),
        "flashinfer_backend",
        how="read; the two `dq_` names and `decode_cuda_graph_metadata` (wrappers by batch size) assigned",
        why="index rows without holes; one set of graph wrappers without views and one with",
        remove_when=FLASHINFER_ROWS,
    ),
    Members(
        f"{SRT}layers.attention.flashinfer_backend.PrefillMetadata",
        "ATTRIBUTE", ("prefill_wrappers",), "flashinfer_backend",
        how="the first is called", why="the planned wrapper, asked for the LSE", remove_when=FLASHINFER_ROWS,
    ),
    Members(
        f"{SRT}layers.attention.flashinfer_backend.DecodeMetadata",
        "ATTRIBUTE", ("decode_wrappers",), "flashinfer_backend",
        how="the first is called", why="the planned wrapper, asked for the LSE", remove_when=FLASHINFER_ROWS,
    ),
    Members(
        "flashinfer.BatchDecodeWithPagedKVCacheWrapper",
        "ATTRIBUTE", ("_paged_kv_indices_buf", "forward_return_lse", "is_cuda_graph_enabled"), "flashinfer_backend",
        how="under a graph the index rows are written into `_paged_kv_indices_buf`, as stock does",
        why="dense attention with its LSE (base 2)", remove_when=FLASHINFER_ROWS,
    ),
    Members(
        "flashinfer.BatchPrefillWithPagedKVCacheWrapper",
        "ATTRIBUTE", ("forward_return_lse",), "flashinfer_backend",
        how="called", why="dense attention with its LSE (base 2)", remove_when=FLASHINFER_ROWS,
    ),
    Members(
        f"{SRT}model_executor.runner.decode_cuda_graph_runner.DecodeCudaGraphRunner",
        "ATTRIBUTE", ("attn_backend",), "cuda_graphs",
        how="read", why="whether it is ours, and which batch fits which graph",
        remove_when="backends can name graph variants",
    ),
    # -- the CPU platform ----------------------------------------------------------------------------------------
    Members(
        f"{SRT}platforms.interface.SRTPlatform",
        "OVERRIDE",
        ("get_compile_backend", "get_default_attention_backend", "get_dispatch_key_name", "get_mha_kv_pool_cls",
         "get_paged_allocator_cls", "is_pin_memory_available"),
        "cpu_platform:TgvCpuPlatform",
        how="SGLang's interface of platform plugins", why="native torch ops, our pool and allocator",
        remove_when="SGLang's CPU platform runs without its own kernels",
    ),
    Members(
        f"{SRT}platforms.cpu.CpuDeviceMixin", "ATTRIBUTE", ("_enum", "device_name"), "cpu_platform",
        how="assigned: an out-of-tree platform on the device `cpu`",
        why="SGLang's ops fall back to their native torch form instead of AMX kernels",
        remove_when="SGLang's CPU platform runs without its own kernels",
    ),
    Members(
        f"{SRT}platforms.device_mixin.PlatformEnum", "ATTRIBUTE", ("OOT",), "cpu_platform",
        how="read", why="SGLang's ops fall back to their native torch form instead of AMX kernels",
        remove_when="SGLang's CPU platform runs without its own kernels",
    ),
)  # fmt: skip
