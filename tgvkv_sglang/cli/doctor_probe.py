"""The checks of ``tgvkv doctor``. Run as a module it prints them as one line of JSON. Imports SGLang."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from importlib import metadata
from pathlib import Path

from .. import __version__
from ..demo.bundle import DEMO_MODEL
from ..errors import NotActiveError
from .serve import cuda_usable

Row = dict[str, str]
PLUGIN_GROUPS = {"sglang.srt.plugins": "tgvkv", "sglang.srt.platforms": "tgvkv_cpu"}
REINSTALL = "pip install -c constraints.txt -e . (in the repository), or pip install --force-reinstall tgvkv-sglang"
# Remove when bench/gpu has run.
CUDA_NOTE = "the GPU path has been tested against a stand-in for FlashInfer only: check answers before you rely on it"


def row(level: str, check: str, found: str, remedy: str = "") -> Row:
    return {"level": level, "check": check, "found": found, "remedy": remedy}


def version_of(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def python_row() -> Row:
    found = ".".join(map(str, sys.version_info[:3]))
    fits = (3, 11) <= sys.version_info[:2] <= (3, 12)
    return row("ok" if fits else "bad", "Python", found, "" if fits else "use Python 3.11 or 3.12")


def version_rows() -> list[Row]:
    from ..sglang_seam.ledger import SGLANG_VERSION

    rows = [row("ok", "tgvkv-sglang", __version__)]
    found = version_of("sglang")
    fits = found == SGLANG_VERSION
    rows.append(
        row("ok" if fits else "bad", "SGLang", found or "not installed",
            "" if fits else f"pip install sglang=={SGLANG_VERSION}")
    )  # fmt: skip
    for name in ("torch", "transformers"):
        found = version_of(name)
        rows.append(row("ok" if found else "bad", name, found or "not installed", "" if found else REINSTALL))
    return rows


def entry_point_rows() -> list[Row]:
    rows = []
    for group, name in PLUGIN_GROUPS.items():
        found = [point.value for point in metadata.entry_points(group=group) if point.name == name]
        if len(set(found)) == 1:
            rows.append(row("ok", f"entry point {name}", found[0]))
        else:
            rows.append(row("bad", f"entry point {name}", f"{len(found)} in group {group}", REINSTALL))
    wanted = os.environ.get("SGLANG_PLUGINS")
    if wanted is not None and "tgvkv" not in [part.strip() for part in wanted.split(",")]:
        rows.append(row("bad", "SGLANG_PLUGINS", repr(wanted), "add tgvkv to it, or unset it"))
    return rows


def ledger_rows() -> list[Row]:
    from ..sglang_seam import active, plugin
    from ..sglang_seam.ledger.check import check_ledger

    rows, hold = [], 0
    remedy = "install the pinned SGLang; if it is, please report this line"
    for entry, found in check_ledger():
        short = entry.target.removeprefix("sglang.srt.")
        if not found:
            hold += 1
        elif entry.target.startswith("flashinfer.") and not cuda_usable():
            rows.append(row("note", short, "; ".join(found), "not needed on the CPU"))
        else:
            rows.append(row("bad", short, "; ".join(found), remedy))
    rows.append(row("ok", "hooks and names", f"{hold} rows of docs/hooks.md hold"))
    try:
        plugin.activate()
        active.require("tgvkv")
        rows.append(row("ok", "plugin", "registers all of its hooks and classes"))
    except NotActiveError as error:
        rows.append(row("bad", "plugin", str(error), "see the rows above"))
    except Exception as error:  # whatever SGLang or an import raises is the finding
        rows.append(row("bad", "plugin", f"{type(error).__name__}: {error}", "see the rows above; else " + REINSTALL))
    return rows


def importable(module: str) -> str | None:
    """None when it can be imported, else why not."""
    try:
        importlib.import_module(module)
    except Exception as error:  # native libraries raise what they like
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def device_rows() -> list[Row]:
    import torch

    cuda = torch.cuda.is_available()
    rows = []
    if cuda:
        rows.append(row("note", "CUDA", f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}", CUDA_NOTE))
    elif cuda_usable():
        rows.append(
            row("bad", "CUDA", f"the driver sees a GPU, torch {torch.__version__} does not",
                "install a torch built for your driver, or serve with --device cpu")
        )  # fmt: skip
    else:
        rows.append(row("note", "CUDA", "no device: serving runs on the CPU", "nothing, if that is what you want"))
    for module, distribution in (("triton", "triton"), ("flashinfer", "flashinfer-python")):
        problem = importable(module)
        level = "ok" if problem is None else "bad" if cuda else "note"
        found = version_of(distribution) or "not installed"
        if problem:
            rows.append(row(level, distribution, problem, REINSTALL if cuda else "not needed on the CPU"))
        else:
            rows.append(row(level, distribution, found + ("" if cuda else " (not used on the CPU)")))
    return rows


def bytecode_rows(package: str = "sglang") -> list[Row]:
    """A row if every start would compile the package's source files anew."""
    spec = importlib.util.find_spec(package)
    if not sys.dont_write_bytecode or spec is None or spec.origin is None:
        return []
    if Path(importlib.util.cache_from_source(spec.origin)).exists():
        return []
    folder = Path(spec.origin).parents[1]
    found = f"set, and {package} has no compiled files: each process of a server compiles thousands of files first"
    return [row("note", "PYTHONDONTWRITEBYTECODE", found, f"{sys.executable} -m compileall -q {folder}")]


def environment_rows() -> list[Row]:
    rows = bytecode_rows()
    for name, remedy in (
        ("SGLANG_USE_CPU_ENGINE", "unset it: it needs kernels that no registry has"),
        ("SGLANG_RUST_SERVER", "unset it: it bypasses request validation"),
    ):
        if os.environ.get(name, "0").lower() in ("1", "true", "yes"):
            rows.append(row("bad", name, os.environ[name], remedy))
    weights = (DEMO_MODEL / "model.safetensors").is_file()
    rows.append(
        row("ok", "bundled demo model", "there") if weights
        else row("note", "bundled demo model", "no weights", "tgvkv demo will use a random model")
    )  # fmt: skip
    return rows


def probe() -> list[Row]:
    rows = [python_row(), *version_rows(), *entry_point_rows(), *environment_rows()]
    if any(r["level"] == "bad" and r["check"] in ("SGLang", "torch") and "not installed" in r["found"] for r in rows):
        return rows
    return rows + device_rows() + ledger_rows()


if __name__ == "__main__":
    print(json.dumps(probe()))
