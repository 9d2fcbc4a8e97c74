"""The CPU platform: native torch ops, gloo, SGLang's own classes where ours are not needed."""

from __future__ import annotations

from typing import Any

from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import SRTPlatform


class TgvCpuPlatform(CpuDeviceMixin, SRTPlatform):
    """Out-of-tree, so that SGLang's ops fall back to their native torch form instead of AMX kernels."""

    _enum = PlatformEnum.OOT
    device_name = "cpu"

    def is_pin_memory_available(self, device: Any = None) -> bool:
        return False

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def get_mha_kv_pool_cls(self) -> type:
        from .pool import TgvKVPool

        return TgvKVPool

    def get_paged_allocator_cls(self) -> type:
        from .allocator import CpuSlotAllocator

        return CpuSlotAllocator

    def get_compile_backend(self, mode: str | None = None) -> str:
        return "eager"

    def get_dispatch_key_name(self) -> str:
        return "native"
