"""Entry point of the ``sglang.srt.platforms`` group: a plain CPU platform for machines with no accelerator.

It steps aside wherever SGLang has something of its own to run on, and wherever another platform plugin is installed.
"""

from __future__ import annotations

import os
from importlib.metadata import entry_points

NAME = "tgvkv_cpu"


def _accelerator() -> bool:
    import torch

    return torch.cuda.is_available() or torch.xpu.is_available() or hasattr(torch, "npu") or hasattr(torch, "musa")


def activate() -> str | None:
    """The platform class to use, or None to step aside."""
    asked = os.environ.get("SGLANG_PLATFORM") == NAME
    others = [ep for ep in entry_points(group="sglang.srt.platforms") if ep.name != NAME]
    cpu_engine = os.environ.get("SGLANG_USE_CPU_ENGINE", "0") == "1"
    if not asked and (others or cpu_engine or _accelerator()):
        return None
    return "tgvkv_sglang.sglang_seam.cpu_platform.TgvCpuPlatform"
