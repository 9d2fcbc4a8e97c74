"""What every benchmark shares: servers to compare, the header that dates a result, and the file that keeps results."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, Iterator

from tgvkv_sglang.demo.tiny_model import make_tiny_model
from tgvkv_sglang.testing.server import Server, launch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("tgvkv-sglang", "sglang", "flashinfer-python", "torch", "transformers", "triton")
# The harness's servers check their memory after every batch; a server whose speed is measured must not.
UNCHECKED = {"SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "0", "SGLANG_CHECK_KV_PAGE_INVARIANTS": "0"}


@dataclass(frozen=True)
class Arm:
    """One server of a comparison: its name in tables, and its flags beyond those that all arms share."""

    name: str
    flags: tuple[str, ...]


STOCK = Arm("stock", ("--attention-backend", "torch_native"))


def ours(retention: float, *flags: str) -> Arm:
    """tgvkv at a server-wide ``retention``, reclaiming under pressure unless ``flags`` say otherwise."""
    return Arm(f"tgvkv-{retention:g}", ("--attention-backend", "tgvkv", "--tgvkv-retention", f"{retention:g}", *flags))


@contextmanager
def stand_in_model(given: Path | None) -> Iterator[Path]:
    """``given``, or a randomly initialised Qwen3-VL made for the occasion."""
    if given is not None:
        if not (given / "config.json").is_file():
            raise SystemExit(f"--model {given} has no config.json; give a Hugging Face checkpoint directory")
        yield given
        return
    with tempfile.TemporaryDirectory(prefix="tgvkv-bench-") as directory:
        yield make_tiny_model(Path(directory) / "tiny", seed=0)


@contextmanager
def serve(
    arm: Arm, model: Path, tokens: int, *, checked: bool = False, env: dict[str, str] | None = None
) -> Iterator[Server]:
    """A live CPU server with a pool of ``tokens`` slots, stopped with its whole process group at the end.

    Args:
        checked: check the memory after every batch (slower; a lost slot kills the server).

    Raises:
        ServerFailedError: the server did not come up, or died while it was used; with the end of its log. The log is
            kept whenever an exception leaves the block.
    """
    extra = {**({} if checked else UNCHECKED), **(env or {})}
    directory = Path(tempfile.mkdtemp(prefix="tgvkv-bench-"))
    try:
        with launch(model, directory, *arm.flags, tokens=tokens, env=extra) as server:
            yield server
    except BaseException:
        print(f"{arm.name}: the server's log is in {directory}", file=sys.stderr)
        raise
    shutil.rmtree(directory, ignore_errors=True)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:  # a machine without git
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def header() -> dict[str, Any]:
    """Machine, versions and commit. ``uncommitted`` lists changed tracked files: the commit is not all there is.

    ``load_average_1m`` says how busy the machine was with everything, this benchmark included: speeds measured under a
    load above ``cores`` are lower than the machine's own.
    """
    changed = git("diff", "--name-only", "HEAD", "--", "tgvkv_sglang", "triton_kernels", "bench")
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": git("rev-parse", "HEAD"),
        "uncommitted": sorted((changed or "").splitlines()),
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "system": platform.system(),
            "architecture": platform.machine(),
            "load_average_1m": round(os.getloadavg()[0], 1),
        },
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in PACKAGES},
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write ``content`` whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(path.name + ".part")
    staging.write_text(json.dumps(content, indent=1) + "\n")
    staging.replace(path)


def key_of(settings: dict[str, Any]) -> str:
    """The same settings give the same key in every process."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


class Store:
    """A JSON file of finished runs by the key of their settings, rewritten whole after each: what is in it is not
    repeated, and a run that was stopped goes on where it was.

    Args:
        path: of the file; made when something is added.
        fresh: forget what is there.

    Raises:
        SystemExit: the file is no such result.
    """

    def __init__(self, path: Path, fresh: bool = False):
        self.path = path
        self.content: dict[str, Any] = {"runs": {}}
        if path.exists() and not fresh:
            try:
                self.content = json.loads(path.read_text())
                self.runs.items()
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                trouble = f"{path} is no result of this benchmark ({type(error).__name__}: {error})"
                raise SystemExit(f"{trouble}; move it away or give another --out") from error

    @property
    def runs(self) -> dict[str, dict[str, Any]]:
        return self.content["runs"]

    @property
    def done(self) -> set[str]:
        """Keys of the runs that need no repetition; one that failed does."""
        return {key for key, row in self.runs.items() if "error" not in row}

    def add(self, key: str, row: dict[str, Any]) -> None:
        self.runs[key] = row
        write_json(self.path, self.content)

    def note(self, **facts: Any) -> None:
        """Facts of the whole, beside the runs."""
        self.content.update(facts)
        write_json(self.path, self.content)
