"""Hooks on SGLang's decode graphs: each batch size is captured twice, for batches without views and with views.

The graph without views is the stock graph, so that traffic without images launches no kernel of ours.
"""

from __future__ import annotations

import logging
from typing import Any

from .batches import states_of
from .tensor_parallel import is_first_rank

LABEL = "tgvkv"
logger = logging.getLogger(__name__)


class StepsWithoutGraph:
    """Decode steps that ran without a graph because their views outgrew its tables; logged each time they doubled.

    Attributes:
        count: how many so far.
    """

    def __init__(self) -> None:
        self.count = 0

    def add(self, requests: int, needed: int, held: int) -> None:
        """One more, of so many requests, whose views have ``needed`` units where tables hold ``held``."""
        self.count += 1
        if self.count & (self.count - 1) == 0 and is_first_rank():
            logger.warning(
                "tgvkv: a decode step of %d requests ran without a CUDA graph, which is slower: their views have %d "
                "units, the graphs' tables hold %d. Such steps so far: %d (this line comes each time they doubled). "
                "Serve with a lower --tgvkv-retention or --max-running-requests, or a larger KV pool.",
                requests, needed, held, self.count,
            )  # fmt: skip


def _ours(runner: Any) -> bool:
    """Whether a graph runner's backend captures views; others are left alone."""
    return hasattr(runner.attn_backend, "capture_views")


def _with_views(label: str | None) -> str:
    return LABEL if label is None else f"{label}+{LABEL}"


def capture_one_shape(
    original: Any, self: Any, size: int, forward: Any, stream_idx: int | None = None, variant_label: str | None = None
) -> None:
    """Hook: capture the decode graph of one batch size, and for our backend a second one through views.

    Args:
        original: SGLang's method. self: its DecodeCudaGraphRunner. size: requests in the batch.
        forward: the model's forward, captured. stream_idx: SGLang's, passed on.
        variant_label: SGLang's name of the variant (its LoRA variants), None for the only one.
    """
    original(self, size, forward, stream_idx, variant_label)
    if _ours(self):
        with self.attn_backend.capture_views():
            original(self, size, forward, stream_idx, _with_views(variant_label))


def resolve_variant(original: Any, self: Any, forward_batch: Any) -> str | None:
    """Hook: the label of the graph that a decode batch is replayed through; stock's where no request has a view."""
    label = original(self, forward_batch)
    if _ours(self) and self.attn_backend.views_in(_decode_states(forward_batch)):
        return _with_views(label)
    return label


def can_run_graph(original: Any, self: Any, forward_batch: Any) -> bool:
    """Hook: False for a batch whose views outgrow the graphs' tables (it runs without a graph), else stock's answer."""
    if _ours(self) and not self.attn_backend.graph_fits(_decode_states(forward_batch)):
        return False
    return original(self, forward_batch)


def _decode_states(forward_batch: Any) -> list:
    """States of a decode batch's requests, row by row; empty for other batches and where no request has one."""
    return (states_of(forward_batch) or []) if forward_batch.forward_mode.is_decode() else []
