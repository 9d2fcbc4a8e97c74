"""SGLang plugin for tests: scores of requests whose id says so are not finite, as after an overflow on a GPU.

Found like ``gpu_like`` (:func:`tests.fakes.spoiled_env`). Scores leave a grounding through its sum over tensor-parallel
ranks, which is where they are spoiled; keys, values and answers are what they are. Per layer it sums the text weights
``[T]``, then the scores ``[V]`` with the mass behind them.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import count

import torch

SPOILED_LAYER = 1


def _spoiled(rid: str, model):
    """The model that a request named ``spoiled-WHAT-...`` is scored with: nan or inf in a score, or a bad mass."""
    if not rid.startswith("spoiled-"):
        return model
    what, calls = rid.split("-")[1], count()

    def spoil(tensor: torch.Tensor) -> torch.Tensor:
        tensor = model.reduce(tensor)
        if next(calls) == 2 * SPOILED_LAYER + 1:
            tensor = tensor.clone()
            tensor[-1 if what == "mass" else 0] = math.inf if what == "inf" else math.nan
        return tensor

    return replace(model, reduce=spoil)


def activate() -> None:
    """Called by SGLang in every process."""
    from tgvkv_sglang.request.state import RequestState

    original = RequestState.begin_chunk

    def begin_chunk(self: RequestState, start: int, model):
        return original(self, start, model if self.grounding is not None else _spoiled(self.rid, model))

    RequestState.begin_chunk = begin_chunk
