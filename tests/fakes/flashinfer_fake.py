"""FlashInfer 0.6.15.post1's paged and ragged wrappers in plain torch, for CPU tests of code that plans and runs them.

Signatures are those of the installed FlashInfer (:mod:`tests.fakes.binding`), values are computed in float64. Stricter
than the real one where that corrupts memory or ignores an argument without a word:

* ``run()`` raises :class:`StalePlanError` if the device indptr is not the one that the host planned with;
* ``fast_decode_plan`` in CUDA-graph mode raises if it is given other tensors than the wrapper's own buffers;
* page indices and indptr outside their bounds, and int64 ones, raise;
* a soft cap or window that ``plan()`` was not told of raises (the compiled kernel would ignore it);
* more heads than planned raise.

As on a GPU, indptr and page indices are read when ``run()`` is called, from the fixed buffers in CUDA-graph mode and
from the tensors given to ``plan()`` otherwise (same device: the real one makes no copy either). Any head dimension is
accepted; the real kernels want 64, 128 or 256.
"""

from __future__ import annotations

from typing import Tuple

import torch

from tests.fakes.decode_wrapper import BatchDecodeWithPagedKVCacheWrapper, fast_decode_plan
from tests.fakes.planned_attention import EMPTY_LSE, StalePlanError
from tests.fakes.prefill_wrappers import BatchPrefillWithPagedKVCacheWrapper, BatchPrefillWithRaggedKVCacheWrapper

__all__ = [
    "EMPTY_LSE",
    "BatchDecodeWithPagedKVCacheWrapper",
    "BatchPrefillWithPagedKVCacheWrapper",
    "BatchPrefillWithRaggedKVCacheWrapper",
    "StalePlanError",
    "fast_decode_plan",
    "merge_state",
]


def merge_state(
    v_a: torch.Tensor, s_a: torch.Tensor, v_b: torch.Tensor, s_b: torch.Tensor
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Merge two attention states ``[tokens, heads, head_dim]`` with base-2 log-sum-exps ``[tokens, heads]``."""
    s_a, s_b = s_a.float(), s_b.float()
    highest = torch.maximum(s_a, s_b)
    a, b = torch.exp2(s_a - highest), torch.exp2(s_b - highest)
    merged = (a / (a + b))[..., None] * v_a.float() + (b / (a + b))[..., None] * v_b.float()
    return merged.to(v_a.dtype), torch.log2(a + b) + highest
