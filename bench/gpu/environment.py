"""Facts of the machine that the rest of the programme rests on."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import Any, Iterable

from bench.common import ROOT

FIELDS = "name,driver_version,memory.total,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,pstate"
CPU_FEATURES = ("--mm-feature-transport", "cpu")
"""For a machine where processes cannot share CUDA memory: SGLang hands pictures to its scheduler that way."""


def output(*command: str, timeout: float = 30.0) -> str:
    """What a command prints, or why it did not."""
    try:
        wide = {**os.environ, "COLUMNS": "160"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=ROOT, env=wide)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{type(error).__name__}: {error}"
    return (done.stdout + done.stderr)[-12_000:].strip()


def facts(seconds: float) -> dict[str, Any]:
    """Machine, tools, whether CUDA memory can be shared between processes, and what ``tgvkv doctor`` says."""
    began = time.monotonic()
    shared = output(sys.executable, "-m", "bench.gpu.environment", timeout=seconds / 2)
    left = seconds - (time.monotonic() - began)
    return {
        "gpu": output("nvidia-smi", f"--query-gpu={FIELDS}", "--format=csv"),
        "nvcc": output(os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin/nvcc", "--version")[-120:],
        "gcc": output("gcc", "--version").split("\n")[0],
        "cuda_memory_is_shared": shared.endswith("shared"),
        "cuda_memory_said": shared[-600:],
        "doctor": output(sys.executable, "-m", "tgvkv_sglang.cli.main", "doctor", timeout=left),
    }


def needed_flags(rows: Iterable[dict]) -> tuple[str, ...]:
    """Server flags that follow from the machine's facts, where they were measured."""
    for row in rows:
        if row["kind"] == "environment" and row.get("figures", {}).get("cuda_memory_is_shared") is False:
            return CPU_FEATURES
    return ()


def _child(inbox: Any, outbox: Any) -> None:
    outbox.put(inbox.get().sum().item())


def share_cuda_memory() -> None:
    """Print ``shared`` when another process reads a CUDA tensor of this one."""
    import torch
    import torch.multiprocessing as processes

    context = processes.get_context("spawn")
    inbox, outbox = context.Queue(), context.Queue()
    child = context.Process(target=_child, args=(inbox, outbox))
    child.start()
    tensor = torch.ones(1000, device="cuda")
    inbox.put(tensor)
    assert outbox.get(timeout=60) == 1000
    child.join()
    print("shared")


if __name__ == "__main__":
    share_cuda_memory()
