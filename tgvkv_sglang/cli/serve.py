"""``tgvkv serve``: ``sglang serve`` with tgvkv and the defaults that this machine needs."""

from __future__ import annotations

import ctypes
import os
import sys
from importlib import metadata
from typing import Mapping, Sequence

from ..demo.bundle import DEMO_MODEL
from ..flags import BACKEND, FLAGS

CPU_DEFAULTS: tuple[tuple[str, str | None], ...] = (
    ("--device", "cpu"),
    ("--dtype", "float32"),
    ("--page-size", "1"),
    ("--disable-cuda-graph", None),
    ("--disable-fast-image-processor", None),
)
CPU_FLAGS = tuple(word for flag in CPU_DEFAULTS for word in flag if word is not None)
"""The same as words of a command line."""
# A 3-million-parameter model would be given millions of slots; and its image positions must be interpolated exactly.
DEMO_DEFAULTS: tuple[tuple[str, str | None], ...] = (
    ("--max-total-tokens", "65536"),
    ("--enable-precise-embedding-interpolation", None),
)
SAME_FLAG = {"--model-path": ("--model",)}
LAUNCH = "from sglang.cli.main import main; main()"


def cuda_usable() -> bool:
    """Whether torch will find a CUDA device, without importing torch (seconds) to ask."""
    try:
        if "+cpu" in metadata.version("torch"):
            return False
        cuda = ctypes.CDLL("libcuda.so.1")
    except (OSError, metadata.PackageNotFoundError):
        return False
    count = ctypes.c_int(0)
    return cuda.cuInit(0) == 0 and cuda.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


def _value(argv: Sequence[str], flag: str) -> str | None:
    """The text given for ``flag`` (the last one wins), or None; "" for a switch."""
    names, found = (flag, *SAME_FLAG.get(flag, ())), None
    for i, argument in enumerate(argv):
        name, equals, value = argument.partition("=")
        if name in names:
            following = argv[i + 1] if i + 1 < len(argv) and not argv[i + 1].startswith("-") else ""
            found = value if equals else following
    return found


def complete(argv: Sequence[str], cuda: bool) -> list[str]:
    """Arguments for ``sglang serve``: ``argv`` with every default that it leaves open.

    A flag that is given is never touched. ``--device`` decides between CPU and GPU defaults before ``cuda`` does.
    """
    out = list(argv)
    positional = bool(out) and not out[0].startswith("-")
    config = _value(out, "--config") is not None

    def fill(defaults: Sequence[tuple[str, str | None]]) -> None:
        for flag, value in defaults:
            if _value(out, flag) is None:
                out.extend([flag] if value is None else [flag, value])

    bundled = not positional and not config and _value(out, "--model-path") is None
    if bundled:
        out.extend(["--model-path", str(DEMO_MODEL)])
    fill([("--attention-backend", BACKEND)])
    device = _value(out, "--device")
    if device == "cpu" or (device is None and not cuda):
        fill(CPU_DEFAULTS)
    if bundled:
        fill(DEMO_DEFAULTS)
    return out


def server_environment(argv: Sequence[str], environ: Mapping[str, str]) -> dict[str, str]:
    """The environment for the completed arguments ``argv``."""
    env = dict(environ)
    if _value(argv, "--device") == "cpu":
        # Spares a 40 s C++ compile in the first image request, for one small function.
        env.setdefault("TORCH_COMPILE_DISABLE", "1")
    return env


def server_command(argv: Sequence[str]) -> list[str]:
    return [sys.executable, "-c", LAUNCH, "serve", *argv]


def help_text() -> str:
    lines = [
        "usage: tgvkv serve [FLAGS OF 'sglang serve']",
        "",
        f"Runs 'sglang serve --attention-backend {BACKEND}'. Every flag goes through ('sglang serve --help').",
        "Filled in where you leave them open:",
        "  --model-path            the bundled demo model (it answers about its own kind of picture)",
        "  on a machine without CUDA: " + " ".join(f if v is None else f"{f} {v}" for f, v in CPU_DEFAULTS),
        "",
        "tgvkv's own flags:",
    ]
    lines += [f"  {flag.option:24}{flag.help}" for flag in FLAGS]
    return "\n".join(lines)


def serve(argv: Sequence[str]) -> int:
    """Become the server: the process is replaced, so that signals reach SGLang itself."""
    if any(argument in ("-h", "--help") for argument in argv):
        print(help_text())
        return 0
    arguments = complete(argv, cuda_usable())
    print("tgvkv: sglang serve " + " ".join(arguments), file=sys.stderr, flush=True)
    command = server_command(arguments)
    os.execve(command[0], command, server_environment(arguments, os.environ))
