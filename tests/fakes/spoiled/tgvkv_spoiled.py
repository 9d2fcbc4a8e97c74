"""SGLang plugin for tests: scores of requests whose id says so are not finite, as after an overflow on a GPU.

Found like ``gpu_like`` (:func:`tests.fakes.spoiled_env`). Scores leave a grounding through its sum over tensor-parallel
ranks, which is where they are spoiled; keys, values and answers are what they are. Per layer it sums the text weights
``[T]``, then the scores ``[V]`` with the mass behind them.
"""

from __future__ import annotations

import math
from itertools import count
from typing import Any, Callable

import torch

SPOILED_LAYER = 1


def _reducer(rid: str, reduce: Callable | None) -> Callable | None:
    """What a grounding sums with, for a request id ``spoiled-WHAT-...``: nan or inf in a score, or a bad mass."""
    if not rid.startswith("spoiled-"):
        return reduce
    what, calls = rid.split("-")[1], count()

    def spoil(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor if reduce is None else reduce(tensor)
        if next(calls) == 2 * SPOILED_LAYER + 1:
            tensor = tensor.clone()
            tensor[-1 if what == "mass" else 0] = math.inf if what == "inf" else math.nan
        return tensor

    return spoil


def activate() -> None:
    """Called by SGLang in every process."""
    from tgvkv_sglang.attention.state import RequestState

    original = RequestState.begin_grounding

    def begin_grounding(self: RequestState, layers: int, heads: int, reduce: Callable | None) -> Any:
        return original(self, layers, heads, _reducer(self.rid, reduce))

    RequestState.begin_grounding = begin_grounding
