"""``tgvkv inspect``: what a selection kept, as numbers and as heat maps over the image."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from ..errors import ConfigError
from ..trace import read_trace

WIDTH = 24


def inspect_trace(args: argparse.Namespace) -> int:
    """Print a summary of each trace; draw the one trace of a call with -o."""
    if args.image and not args.out:
        raise ConfigError("--image needs -o FILE.png to draw to")
    if args.out and len(args.traces) > 1:
        raise ConfigError(f"-o draws one trace, {len(args.traces)} were given; call it once for each")
    console = Console()
    for path in args.traces:
        arrays, meta = _read(path)
        console.print(summary(arrays, meta))
    if args.out:
        draw(arrays, meta, [Path(image) for image in args.image], Path(args.out))
        console.print(f"wrote {args.out}")
    return 0


def _read(path: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    try:
        arrays, meta = read_trace(path)
    except (OSError, KeyError, ValueError) as error:
        raise ConfigError(f"{path} is no readable trace ({error}); give a .npz of --tgvkv-trace-dir") from error
    missing = {"kept", "budget", "layer_mass", "vision_positions", "grounding_positions", "spans"} - set(arrays)
    if missing:
        raise ConfigError(f"{path} is no trace of tgvkv: it has no array {sorted(missing)[0]!r}")
    return arrays, meta


def summary(arrays: dict[str, np.ndarray], meta: dict[str, Any]) -> Table:
    """A row a layer: share of the text's attention on vision, budget, kept."""
    kept, vision = arrays["kept"], len(arrays["vision_positions"])
    mass = arrays["layer_mass"].astype(float)
    share = mass / mass.sum() if mass.sum() else mass
    title = (
        f"{meta.get('rid', '?')}: {len(arrays['token_ids'])} tokens, {vision} of vision in "
        f"{int((arrays['spans'][:, 0] == 1).sum())} span(s), grounded in {len(arrays['grounding_positions'])}; "
        f"retention {meta.get('retention')}, scope {meta.get('scope')}, policy {meta.get('policy')}; "
        f"kept {kept.sum()} of {kept.size} units ({kept.mean():.2%})"
    )
    table = Table(title=title, title_justify="left")
    for name in ("layer", "share of vision attention", "budget", "kept", ""):
        table.add_column(name, justify="left" if not name else "right")
    most = max(1, int(kept.sum(1).max()))
    for layer in range(len(kept)):
        count = int(kept[layer].sum())
        table.add_row(
            str(layer), f"{share[layer]:.1%}", str(int(arrays["budget"][layer])), f"{count} ({count / vision:.1%})",
            "█" * round(WIDTH * count / most),
        )  # fmt: skip
    return table


def span_grids(arrays: dict[str, np.ndarray], meta: dict[str, Any]) -> list[tuple[slice, tuple[int, int]]]:
    """For each selected vision span its part of the vision axis and its (rows, columns) of tokens.

    A model that gives no patch grid, or one that does not fit, yields one row. Frames of a video lie below each other.
    """
    positions, out, at = arrays["vision_positions"], [], 0
    grids = list(meta.get("grids") or [])
    for index, (_, start, end) in enumerate(s for s in arrays["spans"] if s[0] == 1):
        length = int(((positions >= start) & (positions < end)).sum())
        if not length:
            continue
        grid = grids[index] if index < len(grids) else None
        out.append((slice(at, at + length), _token_grid(grid, length)))
        at += length
    return out


def _token_grid(grid: list[int] | None, length: int) -> tuple[int, int]:
    if grid is not None:
        t, h, w = grid
        merge = math.isqrt(max(1, t * h * w // length))
        if t * (h // merge) * (w // merge) == length:
            return t * (h // merge), w // merge
    return 1, length


def draw(arrays: dict[str, np.ndarray], meta: dict[str, Any], images: list[Path], out: Path) -> None:
    """Write one map a layer and span: scores as colour, kept tokens as white frames, over the image if given."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Rectangle
    except ImportError as error:
        raise ConfigError("drawing needs matplotlib: pip install 'tgvkv-sglang[bench]'") from error
    from PIL import Image

    spans, layers = span_grids(arrays, meta), len(arrays["kept"])
    if len(images) > len(spans):
        raise ConfigError(f"{len(images)} images were given, the trace has {len(spans)} selected span(s)")
    columns = min(layers, 6)
    rows = math.ceil(layers / columns)
    figure = Figure(figsize=(2.6 * columns, 2.8 * rows * len(spans)), layout="constrained")
    axes = figure.subplots(rows * len(spans), columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for number, (part, (height, width)) in enumerate(spans):
        for layer in range(layers):
            axis = axes[number * rows + layer // columns][layer % columns]
            kept = arrays["kept"][layer, part].reshape(height, width)
            scores = arrays["scores"][layer, part].reshape(height, width)
            if number < len(images):
                with Image.open(images[number]) as image:
                    axis.imshow(image.convert("RGB"), extent=(-0.5, width - 0.5, height - 0.5, -0.5), aspect="auto")
            axis.imshow(scores, cmap="viridis", alpha=0.55 if number < len(images) else 1.0, aspect="auto")
            for y, x in np.argwhere(kept):
                axis.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor="white", linewidth=1.2))
            axis.set_title(f"layer {layer}: {int(kept.sum())} kept", fontsize=8)
    figure.suptitle(f"scores (colour) and kept tokens (frames), retention {meta.get('retention')}", fontsize=9)
    figure.savefig(out, dpi=120)
