"""A server as a child process: started in a process group of its own, and always stopped with it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, Iterator, Mapping, Self, Sequence

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


class ServerProcess:
    """A server's life: :meth:`spawn`, :meth:`wait`, :meth:`stop`. A context manager: leaving it stops the server.

    Attributes:
        url: where it answers. log: file for its output. process: the leader of its process group while there is one.
    """

    url: str
    log: Path
    process: subprocess.Popen | None = None

    def spawn(self, command: Sequence[str], env: Mapping[str, str]) -> Self:
        """Start ``command`` in a process group of its own, so that Ctrl-C reaches us alone and nothing outlives us."""
        env = {**env, "PYTHONUNBUFFERED": "1"}
        env.pop("SGLANG_USE_CPU_ENGINE", None)  # needs kernels that no registry has
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(
                command, stdout=out, stderr=out, stdin=subprocess.DEVNULL, env=env, start_new_session=True
            )
        return self

    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def ready(self) -> bool:
        """True once it answers. Raises ServerFailedError if it has died."""
        if not self.alive():
            raise ServerFailedError(f"the server stopped while starting.\n{self.log_tail()}")
        try:
            return requests.get(self.url + "/health", timeout=2).ok
        except requests.RequestException:
            return False

    def wait(self, tick: Callable[[float], None] = lambda seconds: None) -> Self:
        """Wait until it answers; ``tick`` is told the seconds passed."""
        start = time.monotonic()
        while not self.ready():
            passed = time.monotonic() - start
            if passed > START_LIMIT_S:
                raise ServerFailedError(f"the server did not answer within {START_LIMIT_S} s.\n{self.log_tail()}")
            tick(passed)
            time.sleep(0.5)
        return self

    @contextmanager
    def running(self) -> Iterator[Self]:
        """Of a spawned server: wait until it answers, and stop it in the end.

        Raises:
            ServerFailedError: it did not come up, or had died by the end of the block.
        """
        with self:
            yield self.wait()
            if not self.alive():
                raise ServerFailedError(f"the server died.\n{self.log_tail()}")

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

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()


class CpuServer(ServerProcess):
    """A ``tgvkv serve`` on the CPU, whatever else the machine has.

    Args:
        flags: flags of ``sglang serve`` besides host, port and device.
        log: file for its output.
    """

    def __init__(self, flags: Sequence[str], log: Path):
        self.flags, self.log, self.port = flags, log, free_port()
        self.url = f"http://127.0.0.1:{self.port}"

    def start(self) -> Self:
        arguments = ["--host", "127.0.0.1", "--port", str(self.port), "--device", "cpu", *self.flags]
        arguments = complete(arguments, cuda=False)
        env = server_environment(arguments, {**os.environ, "CUDA_VISIBLE_DEVICES": ""})
        return self.spawn(server_command(arguments), env)


def _group_alive(process: subprocess.Popen) -> bool:
    process.poll()  # reap our child, so that only its own children keep the group alive
    try:
        os.killpg(process.pid, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True
