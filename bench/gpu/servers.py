"""The live servers of a part: started side by side, waited for, stopped together."""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator, Sequence

import requests

from bench.gpu.models import is_dummy, model_directory
from bench.gpu.programme import OURS, ServerSpec
from tgvkv_sglang.cli.serve import CPU_FLAGS
from tgvkv_sglang.cli.server import ServerFailedError, free_port
from tgvkv_sglang.testing.server import STRICT, Server

USERS = 64
GPU_FLAGS = (
    *("--dtype", "bfloat16", "--max-running-requests", str(USERS), "--cuda-graph-max-bs-decode", str(USERS)),
    # A piece every 8 tokens (and the first token at once), or the Python client and the HTTP server are the bottleneck.
    *("--stream-interval", "8", "--decode-log-interval", "20"),
)
SMALL_CPU_FLAGS = (*CPU_FLAGS, "--max-running-requests", "16", "--enable-precise-embedding-interpolation")
COMMON_FLAGS = ("--enable-cache-report", "--watchdog-timeout", "600", "--grammar-backend", "none")
CONTEXT = {True: "40960", False: "4096"}
INFO = (
    *("attention_backend", "max_total_num_tokens", "max_running_requests", "chunked_prefill_size", "dtype"),
    *("disable_radix_cache", "disable_overlap_schedule", "disable_cuda_graph", "mem_fraction_static"),
    "mm_attention_backend",
)


@dataclass(frozen=True)
class Setup:
    """How servers are started here.

    Attributes:
        cpu: on the CPU, for trying the machinery.
        work: where models are made and logs kept.
        flags: for all of them.
        commit: recorded with every result.
    """

    cpu: bool
    work: Path
    flags: tuple[str, ...] = ()
    commit: str | None = None

    def directory(self, spec: ServerSpec) -> Path:
        """Where a server's log and traces are."""
        return self.work / "servers" / spec.name


def command(spec: ServerSpec, model: Path, port: int, setup: Setup) -> list[str]:
    """The plain ``python -m sglang.launch_server``."""
    words = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(model), "--host", "127.0.0.1"]
    words += ["--port", str(port), "--nccl-port", str(free_port())]  # several servers are started at the same time
    words += ["--attention-backend", spec.backend] if spec.backend else []
    words += ["--tgvkv-trace-dir", str(setup.directory(spec) / "traces")] if spec.backend == OURS else []
    words += ["--max-total-tokens", str(spec.pool), "--context-length", CONTEXT[is_dummy(spec.model)], *COMMON_FLAGS]
    words += SMALL_CPU_FLAGS if setup.cpu else GPU_FLAGS
    words += ["--load-format", "dummy"] if is_dummy(spec.model) else []
    return [*words, *spec.flags, *setup.flags]


def environment(spec: ServerSpec, setup: Setup) -> dict[str, str]:
    quick = {"TORCH_COMPILE_DISABLE": "1"} if setup.cpu else {}
    return {**os.environ, **quick, **(STRICT if spec.checked else {})}


def start(spec: ServerSpec, setup: Setup) -> Server:
    """Start one server without waiting for it."""
    model = model_directory(spec.model, setup.work / "models")
    directory = setup.directory(spec)
    directory.mkdir(parents=True, exist_ok=True)
    port = free_port()
    server = Server(f"http://127.0.0.1:{port}", directory / "server.log", directory / "traces", tokens=spec.pool)
    return server.spawn(command(spec, model, port, setup), environment(spec, setup))


@contextmanager
def running(specs: Sequence[ServerSpec], setup: Setup) -> Iterator[tuple[dict[str, Server], dict[str, str]]]:
    """(those that came up, why the others did not), by name; all are stopped in the end."""
    with ExitStack() as stack:
        started = {spec.name: stack.enter_context(start(spec, setup)) for spec in specs}
        failed: dict[str, str] = {}
        for name, server in started.items():
            try:
                server.wait()
            except ServerFailedError as error:
                failed[name] = str(error)
                server.stop()
        yield {name: server for name, server in started.items() if name not in failed}, failed


def information(server: Server) -> dict:
    """What of the server's own account of itself belongs with a result."""
    reply = requests.get(server.url + "/server_info", timeout=10)
    reply.raise_for_status()
    content = reply.json()
    return {name: content.get(name) for name in INFO}
