"""Every place where SGLang is touched, one row a hook: target, kind, handler, why, and when it can go.

``tgvkv doctor`` and start-up check each row against the installed SGLang: the target must exist and its parameters
must be the ones this version of the plugin was written for.
"""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass

SGLANG_VERSION = "0.5.17"


@dataclass(frozen=True)
class Hook:
    """One row. ``handler`` is ``module:function`` inside this package; ``parameters`` are the target's, in order.

    Kinds: those of SGLang's HookRegistry, and OVERRIDE for a method that a subclass of ours replaces and that is not
    part of a documented interface (nothing is registered for it, but it is checked like the others).
    """

    target: str
    kind: str
    handler: str
    parameters: tuple[str, ...]
    why: str
    remove_when: str


SRT = "sglang.srt."
LEDGER = (
    Hook(
        f"{SRT}server_args.ServerArgs.add_cli_args",
        "AFTER",
        "server_args:add_cli_args",
        ("parser",),
        "the --tgvkv-* flags on every way to launch a server",
        "SGLang lets plugins declare flags",
    ),
    Hook(
        f"{SRT}server_args.ServerArgs.from_cli_args",
        "AROUND",
        "server_args:from_cli_args",
        ("args",),
        "carries the parsed --tgvkv-* values to ServerArgs, which drops attributes it does not declare",
        "SGLang lets plugins declare flags",
    ),
    Hook(
        f"{SRT}server_args.ServerArgs.__init__",
        "AROUND",
        "server_args:init",
        (),
        "takes tgvkv_* keywords of sglang.Engine, selects our radix cache, refuses what cannot work",
        "SGLang lets plugins declare flags",
    ),
    Hook(
        f"{SRT}server_args.ServerArgs.get_model_config",
        "AFTER",
        "server_args:get_model_config",
        ("self",),
        "a model that cannot be served is refused by name, before anything else looks at it and before weights load",
        "SGLang asks a backend whether it can serve a model",
    ),
    Hook(
        f"{SRT}utils.common.support_triton",
        "AROUND",
        "cpu:support_triton",
        ("backend",),
        "the gate goes by backend name and would run Triton on a machine without a GPU",
        "support_triton asks the platform (0.5.23)",
    ),
    Hook(
        f"{SRT}distributed.device_communicators.pynccl.PyNcclCommunicator.__init__",
        "AROUND",
        "cpu:pynccl_init",
        ("self", "group", "device", "library_path", "is_symmetric_memory_enabled"),
        "tensor parallelism on a machine without a GPU: the NCCL library is there, but there is nothing to bind it to",
        "SGLang builds the communicator for CUDA devices only",
    ),
    Hook(
        f"{SRT}mem_cache.kv_cache_configurator.KVCacheConfigurator._build_mha_kv_pool",
        "AROUND",
        "pool:build_mha_kv_pool",
        ("self", "max_total_num_tokens", "mha_pool_class", "quant_method"),
        "one tensor for K and one for V, so that a unit has one flat id in all layers",
        "the pool class can be registered",
    ),
    Hook(
        f"{SRT}model_executor.forward_batch_info.ForwardBatch.init_new",
        "AFTER",
        "batches:after_init_new",
        ("batch", "model_runner", "capture_hidden_mode", "return_hidden_states_before_norm"),
        "the last place where a batch's requests are known; spans and views are handed to the backend",
        "ForwardBatch carries per-request plugin state",
    ),
    Hook(
        f"{SRT}managers.scheduler.Scheduler.is_disable_overlap_for_batch",
        "AROUND",
        "batches:is_disable_overlap_for_batch",
        ("self", "batch", "last_batch"),
        "the first decode step of a request must see its selection, made when the prefill's result is processed",
        "selection on the forward stream is the default",
    ),
    Hook(
        f"{SRT}model_executor.runner.decode_cuda_graph_runner.DecodeCudaGraphRunner.capture_one_shape",
        "AROUND",
        "cuda_graphs:capture_one_shape",
        ("self", "size", "forward", "stream_idx", "variant_label"),
        "captures each decode batch size a second time, for batches with views",
        "backends can name graph variants",
    ),
    Hook(
        f"{SRT}model_executor.runner.decode_cuda_graph_runner.DecodeCudaGraphRunner._resolve_lora_variant",
        "AROUND",
        "cuda_graphs:resolve_variant",
        ("self", "forward_batch"),
        "picks the graph with or without views for a batch",
        "backends can name graph variants",
    ),
    Hook(
        f"{SRT}model_executor.runner.decode_cuda_graph_runner.DecodeCudaGraphRunner.can_run_graph",
        "AROUND",
        "cuda_graphs:can_run_graph",
        ("self", "forward_batch"),
        "a batch whose views outgrow the captured graphs' tables runs without a graph",
        "backends can refuse a graph",
    ),
    Hook(
        f"{SRT}layers.attention.flashinfer_backend.FlashInferAttnBackend._prepare_dequant_workspace_metadata_for_extend",
        "OVERRIDE",
        "flashinfer_backend:TgvFlashInferBackend",
        ("self", "forward_batch", "use_ragged"),
        "stock planning of a prefill takes index rows of our own (without viewed positions) from here",
        "FlashInferAttnBackend takes index rows from a subclass",
    ),
    Hook(
        f"{SRT}layers.attention.flashinfer_backend.FlashInferIndicesUpdaterDecode.update",
        "OVERRIDE",
        "flashinfer_backend:TgvFlashInferBackend",
        ("self", "req_pool_indices", "seq_lens", "seq_lens_cpu", "seq_lens_sum", "decode_wrappers", "encoder_lens",
         "spec_info", "fixed_split_size", "disable_split_kv"),
        "stock planning of a decode step is given index rows of our own",
        "FlashInferAttnBackend takes index rows from a subclass",
    ),
    Hook(
        f"{SRT}managers.scheduler_components.invariant_checker.SchedulerInvariantChecker._check_req_pool",
        "AFTER",
        "radix_cache:check_when_idle",
        ("self",),
        "SGLang's own idle check counts slots; ours, where its strict checks are on, finds each one's only owner",
        "the cache interface has an idle check",
    ),
    Hook(
        f"{SRT}managers.tokenizer_manager.TokenizerManager._create_tokenized_object",
        "AROUND",
        "requests:create_tokenized_object",
        ("self", "obj", "input_text", "input_ids", "input_embeds", "mm_inputs", "token_type_ids"),
        "what a client may not say becomes HTTP 400: bad options, keys that pose as others, what would end the "
        "scheduler",
        "SGLang lets plugins validate requests",
    ),
    Hook(
        f"{SRT}managers.tokenizer_manager.TokenizerManager._tokenize_one_request",
        "AROUND",
        "requests:tokenize_one_request",
        ("self", "obj"),
        "hashes of pictures that a client claims, and token ids outside the vocabulary, become HTTP 400 before "
        "anything is read or cached under them",
        "SGLang hashes what it is sent",
    ),
    Hook(
        f"{SRT}entrypoints.openai.serving_base.OpenAIServingBase._compute_extra_key",
        "AROUND",
        "requests:compute_extra_key",
        ("self", "request"),
        "keeps cache_salt and extra_key apart; written one behind the other, ('a', 'bc') is ('ab', 'c')",
        "SGLang hands the salt on by itself (RadixKey.cache_salt, 0.5.23)",
    ),
    Hook(
        f"{SRT}managers.schedule_batch.MultimodalDataItem.set_pad_value",
        "AROUND",
        "pictures:set_pad_value",
        ("self",),
        "a picture's hash covers how its patches lie, not only what is in them",
        "SGLang hashes the grid too",
    ),
)


def resolve(target: str) -> object:
    """Import the longest module prefix of ``target`` and follow the rest as attributes.

    Raises:
        AttributeError, ImportError: the target is not there.
    """
    parts = target.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError as error:
            if error.name and ".".join(parts[:cut]).startswith(error.name):
                continue
            raise
        for name in parts[cut:]:
            found = getattr(found, name)
        return found
    raise ImportError(f"no module of {target!r} can be imported")


def handler(hook: Hook) -> object:
    module, name = hook.handler.split(":")
    return getattr(importlib.import_module(f"{__package__}.{module}"), name)


def problems(hook: Hook) -> list[str]:
    """What is wrong with one row on the installed SGLang; empty when it holds."""
    try:
        found = resolve(hook.target)
    except (AttributeError, ImportError) as error:
        return [f"{hook.target} is not there ({error}); this plugin is written for SGLang {SGLANG_VERSION}"]
    out = []
    if hook.parameters:
        signature = inspect.signature(inspect.unwrap(found))
        # Bound classmethods hide their first parameter.
        names = tuple(name for name in signature.parameters if name not in ("cls",))
        if names != hook.parameters:
            out.append(f"{hook.target} takes {names}, expected {hook.parameters} (SGLang {SGLANG_VERSION})")
    try:
        handler(hook)
    except (AttributeError, ImportError) as error:
        out.append(f"the handler {hook.handler} of {hook.target} is missing ({error})")
    return out


def version_problem() -> list[str]:
    from importlib.metadata import version

    installed = version("sglang")
    if installed != SGLANG_VERSION:
        return [f"SGLang {installed} is installed; install sglang=={SGLANG_VERSION}"]
    return []


def check_ledger() -> list[str]:
    """All problems of all rows, the SGLang version first."""
    return version_problem() + [problem for hook in LEDGER for problem in problems(hook)]
