"""The attention backend SGLang builds for ``--attention-backend tgvkv``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend

from ..errors import UnsupportedServerError
from . import active
from .ledger.check import require_rows
from .llava import embed_pictures
from .pool import TgvKVPool
from .refusals import refuse_loaded

if TYPE_CHECKING:  # every process imports this module, only one has a ModelRunner
    from sglang.srt.model_executor.model_runner import ModelRunner


def backend_class(device: str) -> type[AttentionBackend]:
    """FlashInfer where there is CUDA, torch elsewhere."""
    if torch.cuda.is_available() and device == "cuda":
        from .flashinfer_backend import TgvFlashInferBackend

        return TgvFlashInferBackend
    from .torch_backend import TgvTorchBackend

    return TgvTorchBackend


def create_backend(model_runner: ModelRunner) -> AttentionBackend:
    """Factory registered under the backend's name."""
    active.require("the attention backend")
    refuse_loaded(model_runner)
    if not isinstance(model_runner.token_to_kv_pool, TgvKVPool):
        raise UnsupportedServerError(
            f"tgvkv: the KV pool is {type(model_runner.token_to_kv_pool).__name__}, not ours; start the server with "
            "--attention-backend tgvkv and no other pool option."
        )
    made = backend_class(model_runner.device)
    require_rows()
    embed_pictures(model_runner.model, model_runner.model_config.hf_config.architectures[0])
    return made(model_runner)
