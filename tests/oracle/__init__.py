"""What the plugin must compute, worked out independently: transformers, eager attention, float64, plain loops."""

from tests.oracle.attention import single_threaded
from tests.oracle.oracle import Oracle, Prefill, Prompt, State, Turn, load
from tests.oracle.selection import (
    TEXT,
    VIEWED,
    VISION,
    Selection,
    ambiguous,
    as_fraction,
    check_kept,
    largest_remainder,
    select,
    total_quotas,
    vision_quotas,
)

__all__ = [
    "TEXT",
    "VIEWED",
    "VISION",
    "Oracle",
    "Prefill",
    "Prompt",
    "Selection",
    "State",
    "Turn",
    "ambiguous",
    "as_fraction",
    "check_kept",
    "largest_remainder",
    "load",
    "select",
    "single_threaded",
    "total_quotas",
    "vision_quotas",
]
