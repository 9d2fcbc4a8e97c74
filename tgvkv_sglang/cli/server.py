"""A server as a child process: started in a process group of its own, and always stopped with it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Sequence

import requests

from ..errors import TgvkvError
from .serve import complete, server_command, server_environment

START_LIMIT_S = 900
STOP_PATIENCE_S = 15.0
LOG_TAIL = 60


class ServerFailedError(TgvkvError, RuntimeError):
    """The server died or did not come up. The message ends with the end of its log."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass
class CpuServer:
    """A ``tgvkv serve`` on the CPU, whatever else the machine has. A context manager: leaving it stops the server.

    Attributes:
        flags: flags of ``sglang serve`` besides host, port and device.
        log: file for its output.
    """

    flags: Sequence[str]
    log: Path
    port: int = field(default_factory=free_port)
    process: subprocess.Popen | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> "CpuServer":
        arguments = ["--host", "127.0.0.1", "--port", str(self.port), "--device", "cpu", *self.flags]
        arguments = complete(arguments, cuda=False)
        env = server_environment(arguments, {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"})
        env.pop("SGLANG_USE_CPU_ENGINE", None)  # needs kernels that no registry has
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(
                server_command(arguments), stdout=out, stderr=out, stdin=subprocess.DEVNULL, env=env,
                start_new_session=True,
            )  # fmt: skip
        return self

    def ready(self) -> bool:
        """True once it answers. Raises ServerFailedError if it has died."""
        if self.process is None or self.process.poll() is not None:
            raise ServerFailedError(f"the server stopped while starting.\n{self.log_tail()}")
        try:
            return requests.get(self.url + "/health", timeout=2).ok
        except requests.RequestException:
            return False

    def wait(self, tick: Callable[[float], None] = lambda seconds: None) -> "CpuServer":
        """Wait until it answers; ``tick`` is told the seconds passed."""
        start = time.monotonic()
        while not self.ready():
            passed = time.monotonic() - start
            if passed > START_LIMIT_S:
                raise ServerFailedError(f"the server did not answer within {START_LIMIT_S} s.\n{self.log_tail()}")
            tick(passed)
            time.sleep(0.5)
        return self

    def log_tail(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        return "\n".join([f"The end of {self.log}:", *lines[-LOG_TAIL:]])

    def stop(self) -> None:
        """Stop the whole process group: politely, then not."""
        if self.process is None:
            return
        for kind in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, kind)
            except ProcessLookupError:
                break
            deadline = time.monotonic() + STOP_PATIENCE_S
            while time.monotonic() < deadline and _group_alive(self.process):
                time.sleep(0.1)
        self.process.wait()
        self.process = None

    def __enter__(self) -> "CpuServer":
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()


def _group_alive(process: subprocess.Popen) -> bool:
    process.poll()  # reap our child, so that only its own children keep the group alive
    try:
        os.killpg(process.pid, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True
