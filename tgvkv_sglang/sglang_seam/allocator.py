"""The slot allocator of the CPU platform: SGLang's token allocator, with the guard that slot 0 is never freed."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator

from ..errors import IntegrityError, UnsupportedServerError


class CpuSlotAllocator(TokenToKVPoolAllocator):
    """Row entries of evicted positions are 0; freeing one would hand the dummy slot to a request.

    On CUDA the same check would synchronise the device, so that there only the cache's own code keeps the rule.
    """

    def __init__(self, size: int, page_size: int, dtype: torch.dtype, device: str, kvcache: Any, need_sort: bool):
        if page_size != 1:
            raise UnsupportedServerError(f"tgvkv: --page-size {page_size} is not supported: use --page-size 1.")
        super().__init__(size, dtype, device, kvcache, need_sort)

    def free(self, free_index: torch.Tensor) -> None:
        if free_index.numel() and not bool(free_index.all()):
            raise IntegrityError(f"slot 0 was freed among {free_index.numel()} slots; it belongs to nobody")
        super().free(free_index)
