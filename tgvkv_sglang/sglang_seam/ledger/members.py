"""Names of SGLang's classes that we read, assign or override, besides the functions in :mod:`.hooks`."""

from __future__ import annotations

from .rows import SRT, Members

FLASHINFER_ROWS = "FlashInferAttnBackend takes index rows from a subclass"
INTERFACE = "never: this is the interface"
POOL_CLASS = "the pool class can be registered"
REQUEST_STATE = "SGLang carries per-request plugin state"

MEMBERS: tuple[Members, ...] = (
    # -- registries ----------------------------------------------------------------------------------------------
    Members(
        f"{SRT}plugins.hook_registry.HookRegistry", "ATTRIBUTE", ("register",), "plugin",
        how="called for every AFTER and AROUND row", why="SGLang applies the hooks", remove_when=INTERFACE,
    ),
    Members(
        f"{SRT}plugins.hook_registry.HookType", "ATTRIBUTE", (), "plugin",
        how="imported; a hook's kind is looked up by its name", why="SGLang applies the hooks", remove_when=INTERFACE,
    ),
    Members(
        f"{SRT}layers.attention.attention_registry",
        "ATTRIBUTE", ("ATTENTION_BACKENDS", "register_attention_backend"), "plugin",
        how="imported, read, called", why="the attention backend `tgvkv`", remove_when=INTERFACE,
    ),
    Members(
        f"{SRT}server_args", "ATTRIBUTE", ("ATTENTION_BACKEND_CHOICES", "add_attention_backend_choices"), "plugin",
        how="imported, read, called", why="the attention backend `tgvkv` on the command line", remove_when=INTERFACE,
    ),
    Members(
        f"{SRT}mem_cache.registry", "ATTRIBUTE", ("get_radix_cache_factory", "register_radix_cache_backend"), "plugin",
        how="imported, called", why="the radix cache `tgvkv`", remove_when=INTERFACE,
    ),
    # -- requests and batches ------------------------------------------------------------------------------------
    Members(
        f"{SRT}managers.schedule_batch.Req",
        "ATTRIBUTE",
        ("cache_protected_len", "extend_range", "extra_key", "full_untruncated_fill_ids", "get_fill_ids", "last_node",
         "multimodal_inputs", "origin_input_ids", "output_ids", "positional_embed_overrides", "prefix_indices",
         "req_pool_idx", "rid", "sampling_params"),
        "radix_cache,requests,selection",
        how="read; `cache_protected_len`, `last_node`, `prefix_indices` assigned as stock's cache does; token ids are "
            "`array('q')`; our state is one more attribute",
        why="which tokens a request has, which slots it holds, what it asked for",
        remove_when=REQUEST_STATE,
    ),
    Members(
        f"{SRT}sampling.sampling_params.SamplingParams", "ATTRIBUTE", ("custom_params",), "requests",
        how="read", why="a request's own options", remove_when=REQUEST_STATE,
    ),
    Members(
        f"{SRT}managers.schedule_batch.Range", "ATTRIBUTE", ("end",), "radix_cache",
        how="read off `Req.extend_range`", why="where a chunk ends", remove_when=INTERFACE,
    ),
    Members(
        f"{SRT}managers.io_struct.GenerateReqInput", "ATTRIBUTE", ("sampling_params",), "requests",
        how="read where it is one dictionary", why="options are validated before the request is tokenized",
        remove_when="SGLang lets plugins validate requests",
    ),
    Members(
        f"{SRT}managers.io_struct.GenerateReqInput", "OPTIONAL", ("session_params",), "requests",
        how="read with a default: embedding requests have none", why="sessions are refused",
        remove_when="SGLang lets plugins validate requests",
    ),
    Members(
        f"{SRT}managers.io_struct.TokenizedGenerateReqInput", "ATTRIBUTE", ("extra_key",), "requests",
        how="assigned", why="another retention gets its own radix namespace",
        remove_when="SGLang lets plugins validate requests",
    ),
    Members(
        f"{SRT}managers.tokenizer_manager.TokenizerManager", "ATTRIBUTE", ("server_args",), "requests",
        how="read", why="the server's configuration hangs on its ServerArgs", remove_when=REQUEST_STATE,
    ),
    Members(
        f"{SRT}managers.schedule_batch.MultimodalInputs", "ATTRIBUTE", ("mm_items",), "requests",
        how="read", why="where audio lies in a prompt, and the grids of its images", remove_when=INTERFACE,
    ),
    Members(
        f"{SRT}managers.schedule_batch.MultimodalDataItem", "ATTRIBUTE", ("is_audio", "offsets"), "requests",
        how="read; offsets are inclusive (start, end) pairs", why="audio is no vision", remove_when=INTERFACE,
    ),
    Members(
        f"{SRT}managers.schedule_batch.MultimodalDataItem", "OPTIONAL", ("image_grid_thw", "video_grid_thw"),
        "requests",
        how="read with a default: a model's processor may set them", why="traces are drawn over the picture",
        remove_when=INTERFACE,
    ),
    Members(
        f"{SRT}managers.schedule_batch.ScheduleBatch", "ATTRIBUTE", ("forward_mode", "reqs"), "batches",
        how="read", why="the requests of a batch", remove_when=REQUEST_STATE,
    ),
    Members(
        f"{SRT}managers.scheduler.Scheduler", "ATTRIBUTE", ("result_queue", "server_args"), "batches",
        how="read; `result_queue[0][0]` is the oldest launched batch, a copy that keeps its mode",
        why="whether a prefill with vision waits to be processed",
        remove_when="selection on the forward stream is the default",
    ),
    Members(
        f"{SRT}managers.scheduler_components.invariant_checker.SchedulerInvariantChecker",
        "ATTRIBUTE", ("tree_cache",), "radix_cache",
        how="read", why="our idle check finds our cache", remove_when="the cache interface has an idle check",
    ),
    Members(
        f"{SRT}model_executor.forward_batch_info.ForwardBatch",
        "ATTRIBUTE",
        ("batch_size", "extend_prefix_lens", "extend_prefix_lens_cpu", "extend_seq_lens", "extend_seq_lens_cpu",
         "forward_mode", "out_cache_loc", "req_pool_indices", "seq_lens"),
        "backend,batches,cuda_graphs,flashinfer_backend",
        how="read; the `_cpu` lists are on the host", why="what a forward computes", remove_when=INTERFACE,
    ),
    Members(
        f"{SRT}model_executor.forward_batch_info.ForwardMode",
        "ATTRIBUTE", ("is_decode", "is_extend", "is_idle"), "backend,batches,cuda_graphs,flashinfer_backend",
        how="called", why="prefill, decode, or a batch of nothing", remove_when=INTERFACE,
    ),
    # -- the radix cache -----------------------------------------------------------------------------------------
    Members(
        f"{SRT}mem_cache.base_prefix_cache.BasePrefixCache",
        "OVERRIDE",
        ("cache_finished_req", "cache_unfinished_req", "dec_lock_ref", "evict", "evictable_size",
         "full_evictable_size", "full_protected_size", "inc_lock_ref", "match_prefix", "pretty_print",
         "protected_size", "reset", "total_size"),
        "radix_cache:TgvRadixCache",
        how="SGLang's interface of prefix caches; sizes count slots", why="the span tree behind it",
        remove_when=INTERFACE,
    ),
    Members(
        f"{SRT}mem_cache.base_prefix_cache.BasePrefixCache",
        "ATTRIBUTE",
        ("disable", "init_metrics_collector", "page_size", "req_to_token_pool", "token_to_kv_pool_allocator",
         "update_eviction_metrics"),
        "radix_cache",
        how="attributes assigned (stock reads them of any cache), methods called", why="SGLang's own metrics and sizes",
        remove_when=INTERFACE,
    ),
    Members(
        f"{SRT}mem_cache.registry.TreeCacheBuildContext",
        "ATTRIBUTE", ("disable_radix_cache", "params", "server_args"), "radix_cache",
        how="read", why="what our cache is built from", remove_when=INTERFACE,
    ),
    Members(
        f"{SRT}mem_cache.cache_init_params.CacheInitParams",
        "ATTRIBUTE",
        ("disable", "disable_finished_insert", "enable_metrics", "page_size", "req_to_token_pool",
         "token_to_kv_pool_allocator"),
        "radix_cache",
        how="read", why="what our cache is built from", remove_when=INTERFACE,
    ),
    Members(
        f"{SRT}mem_cache.base_prefix_cache.MatchPrefixParams", "ATTRIBUTE", ("key", "req"), "radix_cache",
        how="read; `req` may be None", why="a match plans the request's prefill", remove_when=INTERFACE,
    ),
    Members(
        f"{SRT}mem_cache.radix_cache.RadixKey", "ATTRIBUTE", ("extra_key", "limit", "token_ids"), "radix_cache",
        how="read; `limit` None is all tokens", why="what is matched, in which namespace", remove_when=INTERFACE,
    ),
    Members(
        f"{SRT}mem_cache.base_prefix_cache.EvictParams", "ATTRIBUTE", ("num_tokens",), "radix_cache",
        how="read", why="how many slots SGLang needs", remove_when=INTERFACE,
    ),
    Members(
        f"{SRT}mem_cache.base_prefix_cache",
        "ATTRIBUTE", ("DecLockRefResult", "EvictResult", "IncLockRefResult", "MatchResult"), "radix_cache",
        how="imported; made with named fields", why="what SGLang's interface of prefix caches returns",
        remove_when=INTERFACE,
    ),
    # -- slots and the KV pool -----------------------------------------------------------------------------------
    Members(
        f"{SRT}mem_cache.memory_pool.MHATokenToKVPool", "OVERRIDE", ("_create_buffers_normal",), "pool:TgvKVPool",
        how="makes one tensor for all layers, and the list of its slices", why="a unit has one flat id in all layers",
        remove_when=POOL_CLASS,
    ),
    Members(
        f"{SRT}mem_cache.memory_pool.MHATokenToKVPool",
        "ATTRIBUTE",
        ("custom_mem_pool", "device", "enable_custom_mem_pool", "k_buffer", "kv_cache_layout", "layer_num",
         "memory_saver_adapter", "store_dtype", "use_hnd", "v_buffer"),
        "pool",
        how="read where the buffers are made; `k_buffer`, `v_buffer` (lists of layers) assigned",
        why="our buffers are made as stock makes its own", remove_when=POOL_CLASS,
    ),
    Members(
        f"{SRT}mem_cache.memory_pool.MHATokenToKVPool",
        "ATTRIBUTE",
        ("get_key_buffer", "get_kv_buffer", "get_value_buffer", "set_kv_buffer", "start_layer"),
        "backend,flashinfer_backend",
        how="called as stock backends do; `layer_id - start_layer` is a layer's index in our tensors",
        why="stock attention and the writing of K and V", remove_when=INTERFACE,
    ),
    Members(
        f"{SRT}mem_cache.memory_pool", "ATTRIBUTE", ("KVWriteLoc",), "backend,flashinfer_backend",
        how="imported; made of `out_cache_loc` alone", why="K and V are written as stock writes them",
        remove_when=INTERFACE,
    ),
    Members(
        f"{SRT}constants", "ATTRIBUTE", ("GPU_MEMORY_TYPE_KV_CACHE",), "pool",
        how="imported", why="the pool can be released and resumed as stock's", remove_when=POOL_CLASS,
    ),
    Members(
        f"{SRT}utils.torch_memory_saver_adapter.TorchMemorySaverAdapter", "ATTRIBUTE", ("region",), "pool",
        how="called", why="the pool can be released and resumed as stock's", remove_when=POOL_CLASS,
    ),
    Members(
        f"{SRT}mem_cache.kv_cache_configurator.KVCacheConfigurator", "ATTRIBUTE", ("server_args",), "pool",
        how="read", why="whether the server runs on tgvkv", remove_when=POOL_CLASS,
    ),
    Members(
        f"{SRT}mem_cache.memory_pool.ReqToTokenPool",
        "ATTRIBUTE", ("req_to_token", "write"), "backend,flashinfer_backend,radix_cache",
        how="`req_to_token` (int32, a request a row) read and written; a reclaimed position is 0",
        why="where a request's tokens lie", remove_when=INTERFACE,
    ),
    Members(
        f"{SRT}mem_cache.allocator.token.TokenToKVPoolAllocator",
        "ATTRIBUTE",
        ("available_size", "free", "free_pages", "get_kvcache", "release_pages", "size"),
        "radix_cache",
        how="`free` called; `free_pages` and `release_pages` read when idle: together they are the free list",
        why="slots back to SGLang; each has exactly one owner", remove_when="the allocator lists its free slots",
    ),
    Members(
        f"{SRT}mem_cache.allocator.token.TokenToKVPoolAllocator",
        "OVERRIDE", ("free",), "allocator:CpuSlotAllocator",
        how="refuses slot 0, then stock", why="slot 0 stands for evicted positions and belongs to nobody",
        remove_when="the allocator refuses slot 0",
    ),
    # -- the model and its attention -----------------------------------------------------------------------------
    Members(
        f"{SRT}server_args.ServerArgs",
        "ATTRIBUTE",
        ("attention_backend", "cuda_graph_config", "decode_attention_backend", "disable_radix_cache",
         "disaggregation_mode", "enable_dp_attention", "enable_flexkv", "enable_hierarchical_cache",
         "enable_hisparse", "enable_lmcache", "enable_mixed_chunk", "enable_pdmux", "enable_session_radix_cache",
         "enable_streaming_session", "enable_two_batch_overlap", "kv_cache_dtype", "kv_events_config", "page_size",
         "pp_size", "prefill_attention_backend", "radix_cache_backend", "speculative_algorithm"),
        "refusals,server_args",
        how="read once SGLang has resolved them", why="what tgvkv cannot run beside is refused at start-up",
        remove_when="the feature is supported, or refused by SGLang for backends that lack it",
    ),
    Members(
        f"{SRT}environ.envs", "ATTRIBUTE", ("SGLANG_ENABLE_POST_CAPTURE_KV_SIZING", "SGLANG_RUST_SERVER"), "refusals",
        how="read", why="what tgvkv cannot run beside is refused at start-up", remove_when="as the row above",
    ),
    Members(
        f"{SRT}model_executor.cuda_graph_config.CudaGraphConfig", "ATTRIBUTE", ("prefill",), "refusals",
        how="read", why="a prefill replayed from a graph cannot be scored",
        remove_when="backends can refuse prefill graphs",
    ),
    Members(
        f"{SRT}model_executor.cuda_graph_config.PhaseConfig", "ATTRIBUTE", ("backend",), "refusals",
        how="read", why="a prefill replayed from a graph cannot be scored",
        remove_when="backends can refuse prefill graphs",
    ),
    Members(
        f"{SRT}model_executor.cuda_graph_config.Backend", "ATTRIBUTE", ("DISABLED",), "refusals",
        how="read", why="a prefill replayed from a graph cannot be scored",
        remove_when="backends can refuse prefill graphs",
    ),
    Members(
        f"{SRT}configs.model_config.ModelConfig",
        "ATTRIBUTE",
        ("attention_arch", "hf_text_config", "is_hybrid_swa", "is_multimodal", "num_attention_heads"),
        "refusals,tensor_parallel",
        how="read; heads are the whole model's", why="models that cannot work are refused; scores are means over heads",
        remove_when=INTERFACE,
    ),
    Members(
        "transformers.PretrainedConfig", "OPTIONAL", ("attn_logit_softcapping", "layer_types"), "refusals",
        how="read off `ModelConfig.hf_text_config` with a default: most models have neither",
        why="models that cannot work are refused", remove_when="ModelConfig names both",
    ),
    Members(
        f"{SRT}configs.model_config.AttentionArch", "ATTRIBUTE", ("MLA",), "refusals",
        how="read", why="models that cannot work are refused", remove_when=INTERFACE,
    ),
    Members(
        f"{SRT}model_executor.model_runner.ModelRunner",
        "ATTRIBUTE",
        ("device", "forward_stream", "model_config", "server_args", "token_to_kv_pool"),
        "backend,batches,flashinfer_backend,refusals,tensor_parallel",
        how="read; packing moves KV on `forward_stream`", why="what a backend is built from", remove_when=INTERFACE,
    ),
    Members(
        f"{SRT}layers.radix_attention.RadixAttention",
        "ATTRIBUTE",
        ("attn_type", "head_dim", "is_cross_attention", "k_scale_float", "layer_id", "qk_head_dim", "scaling",
         "tp_k_head_num", "tp_q_head_num", "v_head_dim", "v_scale_float"),
        "backend,flashinfer_backend",
        how="read", why="one layer's attention", remove_when=INTERFACE,
    ),
    Members(
        f"{SRT}layers.radix_attention.AttentionType", "ATTRIBUTE", ("ENCODER_ONLY",), "backend,flashinfer_backend",
        how="read", why="only decoder self-attention is served", remove_when=INTERFACE,
    ),
    Members(
        f"{SRT}runtime_context", "ATTRIBUTE", ("get_parallel",), "tensor_parallel",
        how="imported, called", why="ranks of the attention tensor-parallel group", remove_when=INTERFACE,
    ),
    Members(
        f"{SRT}runtime_context.ParallelContext", "ATTRIBUTE", ("attn_tp_group", "attn_tp_rank"), "tensor_parallel",
        how="read", why="scores are summed over ranks; the first rank writes traces", remove_when=INTERFACE,
    ),
    Members(
        f"{SRT}distributed.parallel_state.GroupCoordinator",
        "ATTRIBUTE", ("device_group", "world_size"), "tensor_parallel",
        how="read", why="scores are summed over ranks", remove_when=INTERFACE,
    ),
    Members(
        f"{SRT}distributed.device_communicators.pynccl.PyNcclCommunicator",
        "ATTRIBUTE", ("available", "disabled", "group", "rank", "world_size"), "cpu",
        how="assigned in place of the stock constructor, without CUDA only", why="gloo is used instead",
        remove_when="SGLang builds the communicator for CUDA devices only",
    ),
    Members(
        f"{SRT}layers.attention.torch_native_backend.TorchNativeAttnBackend",
        "OVERRIDE", ("forward_decode", "forward_extend", "init_forward_metadata"), "backend:TgvTorchBackend",
        how="stock for a batch without vision", why="attention over dense slots and views on a CPU",
        remove_when=INTERFACE,
    ),
    Members(
        f"{SRT}layers.attention.torch_native_backend.TorchNativeAttnBackend",
        "ATTRIBUTE", ("req_to_token_pool", "token_to_kv_pool"), "backend",
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
