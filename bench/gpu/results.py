"""The results of the GPU programme: one file, rewritten whole after every cell, and the same again where it is kept."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any, Iterable

from bench.common import write_json
from bench.gpu.programme import Cell, Part

FILE = "gpu-results.json"
FILES = (FILE, "gpu-kernels.json", "gpu-kernels-all.json", "gpu-log.txt")
"""All that may come back from the GPU machine, which takes at most 8 files."""


def settings(part: Part, cell: Cell) -> dict[str, Any]:
    """What a row says about how it was measured."""
    server = asdict(part.server(cell.server)) if cell.server else None
    load = {**asdict(cell.load), "vision_tokens": cell.load.vision_tokens} if cell.load else None
    return {"server": server, "load": load, "planned_seconds": cell.seconds}


class Results:
    """``directory/gpu-results.json``. A row is keyed by what was measured, so that a second run knows what is done."""

    def __init__(self, directory: Path):
        self.path = directory / FILE
        self.content = read(self.path)

    def _write(self) -> None:
        write_json(self.path, self.content)

    def add(self, key: str, row: dict[str, Any]) -> None:
        self.content["cells"][key] = row
        self.content["dropped"].pop(f"{row['part']}/{row['cell']}", None)
        self._write()

    def drop(self, name: str, why: str) -> None:
        self.content["dropped"][name] = why
        self._write()

    def part(self, name: str, facts: dict[str, Any]) -> None:
        self.content["parts"].setdefault(name, []).append(facts)
        self._write()

    def note(self, name: str, value: Any) -> None:
        self.content[name] = value
        self._write()

    @property
    def done(self) -> set[str]:
        """Keys of the cells that have figures; one that failed is measured again."""
        return {key for key, row in self.content["cells"].items() if "figures" in row}

    @property
    def rows(self) -> list[dict[str, Any]]:
        return list(self.content["cells"].values())


def read(path: Path) -> dict[str, Any]:
    """The content of a results file, empty when there is none.

    Raises:
        SystemExit: the file is no result of this programme.
    """
    empty: dict[str, Any] = {"cells": {}, "parts": {}, "dropped": {}, "spent_s": 0.0}
    if not path.exists():
        return empty
    try:
        content = json.loads(path.read_text())
        if not isinstance(content["cells"], dict):
            raise TypeError("cells is no object")
    except (ValueError, KeyError, TypeError) as error:
        raise SystemExit(
            f"{path} is no result of bench.gpu.run_all ({error}); move it away or give another --out"
        ) from error
    return {**empty, **content}


def copy_results(source: Path, target: Path, names: Iterable[str] = FILES) -> None:
    """Copy what there is of ``names`` (each whole or not at all)."""
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        if (source / name).is_file():
            staging = target / (name + ".part")
            shutil.copyfile(source / name, staging)
            staging.replace(target / name)
