"""Names of SGLang's requests, batches, radix cache and slots that we read, assign or override."""

from __future__ import annotations

from .rows import SRT, Members

INTERFACE = "never: this is the interface"
POOL_CLASS = "the pool class can be registered"
REQUEST_STATE = "SGLang carries per-request plugin state"


OF_SCHEDULER: tuple[Members, ...] = (
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
         "lora_id", "multimodal_inputs", "origin_input_ids", "output_ids", "positional_embed_overrides",
         "prefix_indices", "req_pool_idx", "rid", "sampling_params"),
        "held_request,radix_cache,requests,selections",
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
        f"{SRT}sampling.sampling_params.SamplingParams",
        "ATTRIBUTE",
        ("logit_bias", "min_new_tokens", "repetition_penalty", "sampling_seed", "stop_token_ids", "temperature",
         "top_k"),
        "request_checks",
        how="read after SGLang's own checks", why="values that its tensors cannot hold would end the scheduler",
        remove_when="SGLang refuses them",
    ),
    Members(
        f"{SRT}managers.io_struct", "ATTRIBUTE", ("TokenizedGenerateReqInput", "msgpack_decode", "msgpack_encode"),
        "request_checks",
        how="imported; a copy of the message, without its large fields, is encoded and decoded once",
        why="what the scheduler cannot decode would end it", remove_when="SGLang refuses it",
    ),
    Members(
        f"{SRT}managers.schedule_batch.Range", "ATTRIBUTE", ("end",), "radix_cache",
        how="read off `Req.extend_range`", why="where a chunk ends", remove_when=INTERFACE,
    ),
    Members(
        f"{SRT}managers.io_struct.GenerateReqInput",
        "ATTRIBUTE",
        ("audio_data", "extra_key", "image_data", "input_ids", "mm_hashes", "sampling_params", "session_params",
         "video_data"),
        "request_checks,requests",
        how="read with a default: embedding requests lack some",
        why="sessions, claimed hashes and keys that pose as others are refused",
        remove_when="SGLang lets plugins validate requests",
    ),
    Members(
        f"{SRT}managers.io_struct.TokenizedGenerateReqInput",
        "ATTRIBUTE",
        ("extra_key", "input_ids", "logprob_start_len", "sampling_params", "top_logprobs_num"),
        "request_checks,requests",
        how="`extra_key` assigned, options read", why="bad options are refused; whose prefixes a request may share",
        remove_when="SGLang lets plugins validate requests",
    ),
    Members(
        f"{SRT}entrypoints.openai.protocol.ChatCompletionRequest",
        "ATTRIBUTE", ("cache_salt", "extra_key"), "requests",
        how="read", why="whose prefixes a request may share", remove_when="SGLang hands the salt on by itself",
    ),
    Members(
        f"{SRT}entrypoints.openai.serving_base.OpenAIServingBase", "ATTRIBUTE", ("tokenizer_manager",), "requests",
        how="read", why="the server's configuration hangs on its ServerArgs", remove_when=REQUEST_STATE,
    ),
    Members(
        f"{SRT}managers.tokenizer_manager.TokenizerManager", "ATTRIBUTE", ("model_config", "server_args"), "requests",
        how="read", why="the server's configuration hangs on its ServerArgs; the size of the vocabulary",
        remove_when=REQUEST_STATE,
    ),
    Members(
        f"{SRT}managers.schedule_batch.MultimodalInputs", "ATTRIBUTE", ("mm_items",), "pictures,requests",
        how="read", why="where pictures and audio lie in a prompt, and the grids of its images",
        remove_when=INTERFACE,
    ),
    Members(
        f"{SRT}managers.schedule_batch.MultimodalDataItem",
        "ATTRIBUTE",
        ("hash", "is_audio", "model_specific_data", "offsets", "pad_value", "set_hash"),
        "pictures,requests",
        how="read; offsets are inclusive (start, end) pairs; `set_hash` called, which derives `pad_value`",
        why="which picture a token belongs to, by its whole hash; audio is no vision",
        remove_when="SGLang hashes the grid too, and matches prefixes by whole hashes",
    ),
    Members(
        f"{SRT}managers.schedule_batch.MultimodalDataItem", "OPTIONAL", ("image_grid_thw", "video_grid_thw"),
        "requests",
        how="read with a default: a model's processor may set them", why="traces are drawn over the picture",
        remove_when=INTERFACE,
    ),
    Members(
        f"{SRT}managers.schedule_batch.ScheduleBatch", "ATTRIBUTE", ("reqs",), "batches",
        how="read", why="the requests of a batch", remove_when=REQUEST_STATE,
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
        "batches,cuda_graphs,flashinfer_backend,torch_backend",
        how="read; the `_cpu` lists are on the host", why="what a forward computes", remove_when=INTERFACE,
    ),
    Members(
        f"{SRT}model_executor.forward_batch_info.ForwardMode",
        "ATTRIBUTE", ("is_decode", "is_idle"), "batches,cuda_graphs,flashinfer_backend,torch_backend",
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
        "flashinfer_backend,torch_backend",
        how="called as stock backends do; `layer_id - start_layer` is a layer's index in our tensors",
        why="stock attention and the writing of K and V", remove_when=INTERFACE,
    ),
    Members(
        f"{SRT}mem_cache.memory_pool", "ATTRIBUTE", ("KVWriteLoc",), "flashinfer_backend,torch_backend",
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
        "ATTRIBUTE", ("req_to_token",), "flashinfer_backend,held_request,torch_backend",
        how="`req_to_token` (int32, a request a row) read and written; a reclaimed position is 0",
        why="where a request's tokens lie", remove_when=INTERFACE,
    ),
    Members(
        f"{SRT}mem_cache.allocator.token.TokenToKVPoolAllocator",
        "ATTRIBUTE",
        ("alloc", "available_size", "free", "free_pages", "get_kvcache", "release_pages", "size"),
        "radix_cache",
        how="`alloc`, `free` called; `free_pages`, `release_pages` read when idle: together they are the free list",
        why="slots back to SGLang; each has exactly one owner", remove_when="the allocator lists its free slots",
    ),
    Members(
        f"{SRT}mem_cache.allocator.token.TokenToKVPoolAllocator",
        "OVERRIDE", ("free",), "allocator:CpuSlotAllocator",
        how="refuses slot 0, then stock", why="slot 0 stands for evicted positions and belongs to nobody",
        remove_when="the allocator refuses slot 0",
    ),
)  # fmt: skip
