"""Write docs/features.md from tgvkv_sglang/data/features.json: python docs/make_features.py"""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "tgvkv_sglang" / "data" / "features.json"
PAGE = Path(__file__).with_name("features.md")
STATES = ("tested", "refused", "not tried")
HEAD = """# Beside SGLang's other features

Written by `python docs/make_features.py` from `tgvkv_sglang/data/features.json`; do not edit.

*Tested*: the tests named show it, on a CPU, those under `tests/server` on a live server. *Refused*: at start-up with a
sentence that names the flag, or with HTTP 400. *Not tried*: nothing is known to stand in the way, and nothing shows
that it works.

| feature | flag or field | state | how | tests |
|---|---|---|---|---|
"""


def rows() -> list[dict]:
    """Of each feature: ``feature``, ``asked_by``, ``state`` (one of :data:`STATES`), ``how``, ``tests``."""
    return json.loads(DATA.read_text(encoding="utf-8"))


def page() -> str:
    """The whole of docs/features.md."""
    lines = []
    for row in sorted(rows(), key=lambda row: STATES.index(row["state"])):
        asked, tests = ("<br>".join(f"`{name}`" for name in row[key]) for key in ("asked_by", "tests"))
        lines.append(f"| {row['feature']} | {asked} | {row['state']} | {row['how']} | {tests} |\n")
    return HEAD + "".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
