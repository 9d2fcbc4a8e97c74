"""Stand-ins for what only a GPU has: FlashInfer in plain torch, and a plugin that gives it to a CPU server."""

from __future__ import annotations

import os
from pathlib import Path

HERE = Path(__file__).resolve().parent


def gpu_like_env(graphs: bool = False) -> dict[str, str]:
    """Environment of a server process in which SGLang finds the ``gpu_like`` plugin and the fakes it installs.

    Args:
        graphs: decode is captured and replayed (:mod:`tests.fakes.graphs`).
    """
    env = _with_plugins("gpu_like")
    return {**env, "GPU_LIKE_GRAPHS": "1"} if graphs else env


def spoiled_env(graphs: bool = False) -> dict[str, str]:
    """Environment of a server process that computes bad scores for requests named ``spoiled-nan-...`` and the like.

    Args:
        graphs: on the ``gpu_like`` backend too, with decode graphs.
    """
    env = _with_plugins("spoiled", *["gpu_like"] * graphs)
    return {**env, "GPU_LIKE_GRAPHS": "1"} if graphs else env


def _with_plugins(*names: str) -> dict[str, str]:
    paths = [*(HERE / name for name in names), HERE.parents[1], os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(str(path) for path in paths if str(path))}
