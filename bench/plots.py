"""Plots of load runs."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

PANELS = (
    ("time to first token, p50 and p99 (ms)", ("ttft_p50_ms", "ttft_p99_ms")),
    ("inter-token latency, p50 and p99 (ms)", ("itl_p50_ms", "itl_p99_ms")),
    ("answer tokens per second", ("answer_tokens_per_s",)),
    ("goodput under the SLO (requests/s)", ("goodput_per_s",)),
    ("prompt tokens from the cache (share)", ("cached_share",)),
    ("conversations resident at the end", ("resident",)),
)


def plot_load(rows: list[dict], path: Path) -> None:
    """A panel a figure, a colour a server, one group of bars a load; p99 is drawn pale behind p50."""
    loads = list(dict.fromkeys(row["load"] for row in rows))
    servers = list(dict.fromkeys(row["server"] for row in rows))
    width = 0.8 / len(servers)
    figure, axes = plt.subplots(2, 3, figsize=(13, 7))
    for axis, (title, names) in zip(axes.flat, PANELS, strict=True):
        for i, server in enumerate(servers):
            mine = {row["load"]: row for row in rows if row["server"] == server}
            places = [j + (i - (len(servers) - 1) / 2) * width for j, load in enumerate(loads) if load in mine]
            for name in reversed(names):
                heights = [mine[load][name] or 0 for load in loads if load in mine]
                axis.bar(places, heights, width, color=f"C{i}", alpha=1.0 if name == names[0] else 0.3,
                         label=server if name == names[0] else None)  # fmt: skip
        axis.set_title(title, fontsize=10)
        axis.set_xticks(range(len(loads)), loads, rotation=20)
    axes.flat[0].legend()
    measured = rows[0]["measured"]["machine"]
    pools = ", ".join(sorted({str(row["pool"]) for row in rows}))
    figure.suptitle(f"CPU: {measured['processor']}, {measured['cores']} cores; pool of {pools} slots", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
