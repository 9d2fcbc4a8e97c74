"""What a trace says about one selection: kept vision tokens by layer, and their bytes."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

from ..trace import file_stem, read_trace

BARS = " ▁▂▃▄▅▆▇█"
ELEMENT_BYTES = 4  # the CPU server runs in float32


@dataclass(frozen=True)
class Kept:
    """``per_layer`` kept vision tokens of ``vision`` ones; ``fresh`` is False for a view of an earlier turn."""

    per_layer: tuple[int, ...]
    vision: int
    fresh: bool = True

    @property
    def units(self) -> int:
        return sum(self.per_layer)

    @property
    def full_units(self) -> int:
        return self.vision * len(self.per_layer)

    @property
    def share(self) -> float:
        return self.units / self.full_units


def read_kept(directory: Path | None, rid: str, patience_s: float) -> Kept | None:
    """The selection that request ``rid`` made; None when it made none (or its trace never appears)."""
    if directory is None:
        return None
    path = directory / f"{file_stem(rid)}.0.npz"
    deadline = time.monotonic() + patience_s
    while not path.exists():
        if time.monotonic() > deadline:
            return None
        time.sleep(0.05)
    arrays, _ = read_trace(path)
    kept = arrays["kept"]
    return Kept(tuple(int(n) for n in kept.sum(1)), kept.shape[1])


def kv_unit_bytes(model: Path) -> int:
    """Bytes of one token's K and V in one layer, from the model's own configuration."""
    config = json.loads((model / "config.json").read_text())
    text = config.get("text_config", config)
    heads = text.get("num_key_value_heads", text["num_attention_heads"])
    head_dim = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
    return 2 * heads * head_dim * ELEMENT_BYTES


def bar(count: int, most: int) -> str:
    """One character high; anything kept at all shows."""
    if count == 0 or most == 0:
        return BARS[0]
    return BARS[max(1, round(count / most * (len(BARS) - 1)))]


def human_bytes(count: int) -> str:
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
