"""SGLang plugin for tests: scores of requests whose id says so are not finite, as after an overflow on a GPU.

Found like ``gpu_like`` (:func:`tests.fakes.spoiled_env`). The paper's policy is spoiled as its kernels would be: a mass
is not finite where a score is not. Keys, values and answers are what they are.
"""

from __future__ import annotations

import math

SPOILED_LAYER = 1


def _spoil(name: str, scores, mass, first: int) -> None:
    """A request named ``spoiled-WHAT-...`` has nan or inf in a score (``WHAT`` of mass: in the mass alone)."""
    layer = SPOILED_LAYER - first
    if not name.startswith("spoiled-") or not 0 <= layer < len(scores):
        return
    what = name.split("-")[1]
    if what != "mass":
        scores[layer, 0] = math.inf if what == "inf" else math.nan
    mass[layer] = math.nan


def activate() -> None:
    """Called by SGLang in every process."""
    from tgvkv_sglang.selection.tgv import Tgv

    original = Tgv.score

    def score(self, block):
        result = original(self, block)
        for i, (request, part) in enumerate(zip(block.requests, block.vision_parts, strict=True)):
            _spoil(request.name, result.scores[:, part], result.mass[:, i], block.first)
        return result

    Tgv.score = score
