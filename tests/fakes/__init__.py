"""Stand-ins for what only a GPU has: FlashInfer in plain torch, and a plugin that gives it to a CPU server."""

from __future__ import annotations

import os
from pathlib import Path

HERE = Path(__file__).resolve().parent


def gpu_like_env() -> dict[str, str]:
    """Environment of a server process in which SGLang finds the ``gpu_like`` plugin and the fakes it installs."""
    paths = [HERE / "gpu_like", HERE.parents[1], os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(str(path) for path in paths if str(path))}
