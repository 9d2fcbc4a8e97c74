"""Which picture a prompt's multimodal tokens belong to: by its whole hash, not by SGLang's 30-bit pad id.

SGLang writes ``1_000_000 + hash % 2**30`` over a picture's tokens and matches prefixes by that. Two pictures whose pad
ids collide would be one to the radix tree, so the tree gets other ids: the picture's 64-bit hash stands in the place of
each of its tokens (:func:`tgvkv_sglang.spans.picture_symbol`).
"""

from __future__ import annotations

import hashlib
from typing import Any, Iterator

import numpy as np
from sglang.srt.managers.schedule_batch import MultimodalDataItem, MultimodalInputs
from sglang.srt.runtime_context import get_server_args

from ..spans import PictureRun, picture_symbol, vision_runs
from .server_args import config_of

# Features are hashed flat, so that two shapes with the same patches have one hash; these say how the patches lie.
SHAPES = ("image_grid_thw", "video_grid_thw", "image_grid_hws", "img_grid_thw", "image_sizes", "tgt_size")


def picture_runs(inputs: MultimodalInputs | None, ids: np.ndarray) -> tuple[PictureRun, ...]:
    """Runs of multimodal tokens with their pictures' symbols, ascending.

    Args:
        inputs: a request's multimodal inputs, or None.
        ids: ``[n]`` int64 its prompt with SGLang's pad ids.
    """
    if inputs is None:
        return ()
    located = sorted(_located(inputs.mm_items, len(ids)))
    taken = np.zeros(len(ids), bool)
    for run in located:
        taken[run.start : run.end] = True
    by_pad = {item.pad_value: item.hash for item in inputs.mm_items if item.hash is not None}
    rest = (
        PictureRun(start, end, picture_symbol(by_pad[int(ids[start])]))
        for start, end in vision_runs(np.where(taken, 0, ids))
        if int(ids[start]) in by_pad
    )
    return tuple(sorted([*located, *rest]))


def _located(items: list[MultimodalDataItem], length: int) -> Iterator[PictureRun]:
    """Runs of the items whose processor said where they lie (inclusive offsets); models without go by pad id."""
    for item in items:
        if item.hash is None:
            continue
        for start, end in item.offsets or []:
            if 0 <= start <= end < length:
                yield PictureRun(int(start), int(end) + 1, picture_symbol(item.hash))


def set_pad_value(original: Any, self: MultimodalDataItem) -> None:
    """Let a picture's hash cover how its patches lie, before SGLang derives the pad id from it."""
    computed = self.pad_value is None and self.hash is None
    original(self)
    shapes = [(name, _plain(self.model_specific_data[name])) for name in SHAPES if name in self.model_specific_data]
    if computed and shapes and config_of(get_server_args()) is not None:
        digest = hashlib.sha256(repr((self.hash, shapes)).encode()).digest()
        self.set_hash(int.from_bytes(digest[:8], "big"))


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value
