"""The live servers of a part: started side by side, waited for together, stopped for certain."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import requests

from bench.gpu.models import is_dummy, model_directory
from bench.gpu.programme import ServerSpec
from tgvkv_sglang.cli.serve import CPU_FLAGS
from tgvkv_sglang.cli.server import ServerFailedError, free_port
from tgvkv_sglang.testing.server import STRICT, Server

STARTED = "servers.json"
"""Process groups of the servers that a part started, for whoever has to clean up after it."""
USERS = 64
GPU_FLAGS = (
    *("--dtype", "bfloat16", "--max-running-requests", str(USERS), "--cuda-graph-max-bs-decode", str(USERS)),
    # SGLang's default on Hopper needs FlashAttention 3, a library of over a GB that cannot be carried. Both sides.
    *("--mm-attention-backend", "triton_attn"),
    # A piece every 8 tokens (and the first token at once), or the Python client and the HTTP server are the bottleneck.
    *("--stream-interval", "8"),
)
SMALL_CPU_FLAGS = (*CPU_FLAGS, "--max-running-requests", "16", "--enable-precise-embedding-interpolation")
COMMON_FLAGS = ("--enable-cache-report", "--watchdog-timeout", "600", "--grammar-backend", "none")
CONTEXT = {True: "40960", False: "4096"}
INFO = (
    *(
        "attention_backend",
        "max_total_num_tokens",
        "max_running_requests",
        "chunked_prefill_size",
        "disable_radix_cache",
    ),
    *("disable_overlap_schedule", "disable_cuda_graph", "mem_fraction_static", "dtype", "mm_attention_backend"),
)


@dataclass
class Setup:
    """How servers are started here.

    Attributes:
        cpu: on the CPU, for trying the machinery.
        work: where models are made and logs kept.
        extra_flags: for all of them. extra_env: added to every server's environment.
    """

    cpu: bool
    work: Path
    extra_flags: tuple[str, ...] = ()
    extra_env: dict[str, str] | None = None


def command(spec: ServerSpec, model: Path, ports: tuple[int, int], setup: Setup) -> list[str]:
    """The plain ``python -m sglang.launch_server``; ``ports`` are for HTTP and for torch.distributed."""
    words = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(model), "--host", "127.0.0.1"]
    words += ["--port", str(ports[0]), "--nccl-port", str(ports[1])]
    words += ["--attention-backend", spec.backend, "--max-total-tokens", str(spec.pool)]
    words += ["--context-length", CONTEXT[is_dummy(spec.model)], *COMMON_FLAGS]
    words += SMALL_CPU_FLAGS if setup.cpu else GPU_FLAGS
    if is_dummy(spec.model):
        words += ["--load-format", "dummy"]
    return [*words, *spec.flags, *setup.extra_flags]


def environment(spec: ServerSpec, setup: Setup) -> dict[str, str]:
    env = dict(os.environ)
    env.update({"TORCH_COMPILE_DISABLE": "1"} if setup.cpu else {})
    env.update(STRICT if spec.checked else {})
    return {**env, **(setup.extra_env or {})}


def start(spec: ServerSpec, setup: Setup) -> Server:
    """Start one server without waiting for it."""
    model = model_directory(spec.model, setup.work / "models")
    directory = setup.work / "servers" / spec.name
    directory.mkdir(parents=True, exist_ok=True)
    ports = free_port(), free_port()
    server = Server(f"http://127.0.0.1:{ports[0]}", directory / "server.log", directory / "traces", tokens=spec.pool)
    return server.spawn(command(spec, model, ports, setup), environment(spec, setup))


class Servers:
    """A part's servers; use as a context manager. ``alive`` has those that came up, ``failed`` the others' log ends."""

    def __init__(self, specs: list[ServerSpec], setup: Setup, limit: float):
        self.specs, self.setup, self.limit = specs, setup, limit
        self.alive: dict[str, Server] = {}
        self.failed: dict[str, str] = {}
        self.seconds: dict[str, float] = {}
        self._all: dict[str, Server] = {}

    def __enter__(self) -> Servers:
        began = time.monotonic()
        try:
            for spec in self.specs:
                self._all[spec.name] = start(spec, self.setup)
                groups = [server.process.pid for server in self._all.values()]
                (self.setup.work / STARTED).write_text(json.dumps(groups))
            waiting = dict(self._all)
            while waiting and time.monotonic() - began < self.limit:
                for name, server in list(waiting.items()):
                    try:
                        if server.ready():
                            self.alive[name] = waiting.pop(name)
                            self.seconds[name] = round(time.monotonic() - began, 1)
                    except ServerFailedError as error:
                        self.failed[name] = str(error)
                        del waiting[name]
                time.sleep(0.5)
            for name, server in waiting.items():
                self.failed[name] = f"not up after {self.limit:.0f} s. {server.log_tail()}"
                kill(server)
        except BaseException:
            self.__exit__()
            raise
        return self

    def trouble(self, name: str) -> str | None:
        """Why nothing can be measured on a server, or None."""
        if name not in self.alive:
            return f"server {name} did not start: see parts"
        if not self.alive[name].alive():
            return f"server {name} died. {self.alive[name].log_tail()}"
        return None

    def __exit__(self, *_) -> None:
        for server in self._all.values():
            kill(server)
        (self.setup.work / STARTED).unlink(missing_ok=True)


def kill(server: Server) -> None:
    """At once: SGLang's own way down takes 6 s a server."""
    if server.process is not None:
        with suppress(ProcessLookupError):
            os.killpg(server.process.pid, signal.SIGKILL)
        server.stop()


def information(server: Server) -> dict:
    """What of the server's own account of itself belongs with a result."""
    reply = requests.get(server.url + "/server_info", timeout=10)
    reply.raise_for_status()
    content = reply.json()
    return {name: content.get(name) for name in INFO}


def kill_left_over(work: Path) -> None:
    """Stop what a part that was killed had started (by its process groups, nothing else)."""
    path = work / STARTED
    if path.is_file():
        for group in json.loads(path.read_text()):
            with suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
        path.unlink()
