"""The KV pool: SGLang's MHA pool with all layers in one tensor for K and one for V."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from sglang.srt.constants import GPU_MEMORY_TYPE_KV_CACHE
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

from ..errors import UnsupportedServerError
from ..kv.store import UnitStore
from . import active
from .server_args import config_of


class TgvKVPool(MHATokenToKVPool):
    """Layer ``l`` of slot ``s`` is row ``l * slots + s`` of one flat tensor; ``k_buffer[l]`` is a contiguous slice.

    Stock kernels, copies and reports go through the list of slices and do not see the difference.
    """

    def _create_buffers_normal(self) -> None:
        if self.use_hnd or getattr(self, "kv_cache_layout", None) == "vectorized_5d":
            raise UnsupportedServerError(
                f"tgvkv: KV layout {'hnd' if self.use_hnd else self.kv_cache_layout} is not supported, KV is kept as "
                "[slots, heads, dim]: unset SGLANG_USE_HND_KVCACHE."
            )
        k_shape, v_shape = self._kv_buffer_shapes()
        pool = torch.cuda.use_mem_pool(self.custom_mem_pool) if self.enable_custom_mem_pool else nullcontext()
        with self.memory_saver_adapter.region(GPU_MEMORY_TYPE_KV_CACHE), pool:
            self.k_all = torch.zeros((self.layer_num, *k_shape), dtype=self.store_dtype, device=self.device)
            self.v_all = torch.zeros((self.layer_num, *v_shape), dtype=self.store_dtype, device=self.device)
        self.k_buffer = list(self.k_all.unbind(0))
        self.v_buffer = list(self.v_all.unbind(0))

    @property
    def store(self) -> UnitStore:
        if getattr(self, "_store", None) is None:  # of 8-bit KV, stock keeps bytes
            self._store = UnitStore(self.k_all.view(self.dtype), self.v_all.view(self.dtype))
        return self._store


def build_mha_kv_pool(original: Any, self: Any, **kwargs: Any) -> Any:
    """On CUDA: swap in our pool class when the server runs on tgvkv."""
    if config_of(self.server_args) is not None:
        active.require("the KV pool")
        kwargs["mha_pool_class"] = TgvKVPool
    return original(self, **kwargs)
