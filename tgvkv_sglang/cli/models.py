"""``tgvkv doctor --models``: which architectures are accepted, and which families of them were tried."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

STYLES = {"accepted": "green", "refused": "red", "not in SGLang": "dim"}


def support() -> dict[str, Any]:
    """The table that docs/support.md is made from: ``sglang``, the version, and ``rows``."""
    return json.loads((files("tgvkv_sglang") / "data" / "support.json").read_text(encoding="utf-8"))


def show_models(console: Console | None = None) -> int:
    """Print the table; returns 0."""
    console, data = console or Console(), support()
    table = Table(title=f"multimodal architectures of SGLang {data['sglang']}")
    for name in ("architecture", "tgvkv", "why", "tried on a CPU", "on a GPU", "test"):
        table.add_column(name, overflow="fold")
    for row in data["rows"]:
        accepted = row["verdict"] == "accepted"
        name = f"{row['architecture']} {row['variant']}".strip()
        verdict = f"[{STYLES[row['verdict']]}]{row['verdict']}[/]"
        cpu = ", ".join(row["cpu"]) or ("no" if accepted else "")
        gpu = row["gpu"] or ("no" if accepted else "")
        why = row["why"].replace("`", "")
        table.add_row(escape(name), verdict, escape(why), escape(cpu), escape(gpu), escape(row["test"]))
    console.print(table)
    return 0
