"""Stand-ins for what only a GPU has: FlashInfer in plain torch, and a plugin that gives it to a CPU server."""

from __future__ import annotations

import os
import re
from pathlib import Path

HERE = Path(__file__).resolve().parent


def plugin_env(*names: str) -> dict[str, str]:
    """Environment of a server process in which SGLang finds the test plugins in the folders of these names here."""
    paths = [*(HERE / name for name in names), HERE.parents[1], os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(str(path) for path in paths if str(path))}


def gpu_like_env(graphs: bool = False) -> dict[str, str]:
    """Environment of a server process in which SGLang finds the ``gpu_like`` plugin and the fakes it installs.

    Args:
        graphs: decode is captured and replayed (:mod:`tests.fakes.graphs`).
    """
    env = plugin_env("gpu_like")
    return {**env, "GPU_LIKE_GRAPHS": "1"} if graphs else env


def interpreted_env() -> dict[str, str]:
    """Environment of a ``gpu_like`` server process in which Triton's interpreter runs our kernels."""
    return {**gpu_like_env(), "TRITON_INTERPRET": "1"}


def interpreted_kernels(log: str) -> set[str]:
    """Kernels that a server's interpreter ran, as :mod:`tests.fakes.interpreted` says in its log."""
    return set(re.findall(r"the interpreter runs (\w+)", log))


def spoiled_env(graphs: bool = False) -> dict[str, str]:
    """Environment of a server process that computes bad scores for requests named ``spoiled-nan-...`` and the like.

    Args:
        graphs: on the ``gpu_like`` backend too, with decode graphs.
    """
    return {**gpu_like_env(graphs=True), **plugin_env("spoiled", "gpu_like")} if graphs else plugin_env("spoiled")


def steps_without_graph(log: str) -> list[int]:
    """Sizes of the decode steps that a server with graphs ran without one, as :mod:`tests.fakes.graphs` says."""
    return [int(size) for size in re.findall(r"decode step of (\d+) without a graph", log)]


def observed_env(directory: Path) -> dict[str, str]:
    """Environment of a server process that draws its weights and records attention in ``directory``, which exists."""
    return {**plugin_env("observed"), "OBSERVED_DIR": str(directory)}


def replayed_variants(log: str) -> set[str]:
    """Which variants of a server's decode graphs were replayed, as :mod:`tests.fakes.graphs` says in its log."""
    return set(re.findall(r"first replay of graph size=\d+ variant=(\w+)", log))
