"""SGLang plugin for tests: a CPU server whose FlashInfer backend runs on :mod:`tests.fakes.flashinfer_fake`.

SGLang finds it through this directory's ``.dist-info`` and calls :func:`activate` in every process, but only if the
directory is on ``PYTHONPATH`` (:func:`tests.fakes.gpu_like_env`). It changes one module,
``sglang.srt.layers.attention.flashinfer_backend``, and SGLang's gate for Triton kernels; a process where that fails
exits instead of serving something else.
"""

from __future__ import annotations

import os
import sys
import traceback
from functools import partial
from typing import Any, Callable

import torch

ACTIVE = "gpu_like: FlashInfer is a fake in process"


class TorchOnCpu:
    """``torch`` for one module: its literal ``device="cuda"`` allocations land on the CPU."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def _on_cpu(allocate: Callable, *size: Any, device: Any = None, **options: Any) -> torch.Tensor:
        return allocate(*size, device="cpu" if device == "cuda" else device, **options)

    def empty(self, *size: Any, **options: Any) -> torch.Tensor:
        return self._on_cpu(torch.empty, *size, **options)

    def zeros(self, *size: Any, **options: Any) -> torch.Tensor:
        return self._on_cpu(torch.zeros, *size, **options)


def create_kv_indices(
    grid: tuple[int],
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    page_kernel_lens: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_start_idx: torch.Tensor | None,
    kv_indices: torch.Tensor,
    stride: int,
) -> None:
    """SGLang's ``create_flashinfer_kv_indices_triton``: slots ``[start, start + length)`` of each request, packed."""
    assert stride == req_to_token.shape[1]
    for i in range(grid[0]):
        start = 0 if kv_start_idx is None else int(kv_start_idx[i])
        at, length = int(kv_indptr[i]), int(page_kernel_lens[i])
        kv_indices[at : at + length] = req_to_token[int(req_pool_indices[i]), start : start + length]


class TorchKernel:
    """Called like a Triton kernel, ``kernel[grid](...)``."""

    def __getitem__(self, grid: tuple[int]) -> Callable:
        return partial(create_kv_indices, grid)


def _no_triton(original: Callable, backend: str) -> bool:
    return False


def _flashinfer_backend(device: str) -> type:
    from tgvkv_sglang.sglang_seam.flashinfer_backend import TgvFlashInferBackend

    class Telling(TgvFlashInferBackend):
        def __init__(self, model_runner: Any) -> None:
            super().__init__(model_runner)
            cores = "with" if self.decode_use_tensor_cores else "without"
            print(f"gpu_like: decode {cores} tensor cores, KV in {self.flashinfer_kv_cache_dtype}", flush=True)

    return Telling


def _install() -> None:
    from sglang.srt.layers.attention import flashinfer_backend
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from tests.fakes import flashinfer_fake
    from tgvkv_sglang.sglang_seam import backend

    if torch.cuda.is_available():
        raise RuntimeError("gpu_like is for machines without a GPU")
    for name in (
        "BatchDecodeWithPagedKVCacheWrapper",
        "BatchPrefillWithPagedKVCacheWrapper",
        "BatchPrefillWithRaggedKVCacheWrapper",
        "fast_decode_plan",
        "merge_state",
    ):
        setattr(flashinfer_backend, name, getattr(flashinfer_fake, name))
    flashinfer_backend._safe_merge_state = flashinfer_fake.merge_state
    flashinfer_backend.create_flashinfer_kv_indices_triton = TorchKernel()
    flashinfer_backend.torch = TorchOnCpu()
    HookRegistry.register("sglang.srt.utils.common.support_triton", _no_triton, HookType.AROUND)
    backend.backend_class = _flashinfer_backend
    if os.environ.get("GPU_LIKE_GRAPHS") == "1":
        from tests.fakes import graphs

        graphs.install()
    if os.environ.get("TRITON_INTERPRET") == "1":
        from tests.fakes import interpreted

        interpreted.install()


def activate() -> None:
    """Called by SGLang in every process. SGLang goes on without a plugin that raises, hence the exit."""
    try:
        _install()
    except Exception as error:
        traceback.print_exc()
        raise SystemExit(f"gpu_like: {error}") from error
    print(f"{ACTIVE} {os.getpid()}", file=sys.stderr, flush=True)
