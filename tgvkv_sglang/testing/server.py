"""Live SGLang servers for tests, on the CPU: start, talk, look at memory, stop.

Each checks its memory after every batch: a slot that is lost or has two owners kills the server and so fails the test.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping, Sequence

import requests
from PIL import Image

from ..cli.serve import CPU_FLAGS
from ..cli.server import ServerProcess, free_port
from ..trace import read_trace
from .images import data_url
from .log_text import memory_checks, slots_by_owner

COMMON = (
    "--enable-precise-embedding-interpolation",
    "--enable-cache-report",
    "--max-running-requests",
    "16",
    "--context-length",
    "4096",
    "--sleep-on-idle",
    "--watchdog-timeout",
    "600",
)
STRICT = {"SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "2", "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1"}


@dataclass
class Server(ServerProcess):
    """One live server. ``traces`` is its trace directory, ``tokens`` the slots of its pool."""

    url: str
    log: Path
    traces: Path
    process: subprocess.Popen | None = None
    tokens: int = 0

    def post(self, path: str, body: dict, timeout: float = 300) -> requests.Response:
        return requests.post(self.url + path, json=body, timeout=timeout)

    def generate(
        self,
        text: str,
        images: Sequence[Image.Image] = (),
        *,
        max_new_tokens: int = 16,
        rid: str | None = None,
        trace: bool = False,
        retention: Any = None,
        policy: str | None = None,
        budget: str | None = None,
        logprobs: bool = False,
        logprob_start_len: int | None = None,
        fields: Mapping[str, Any] | None = None,
        **sampling: Any,
    ) -> "Answer":
        """Greedy ``/generate``; raises on any HTTP error.

        Args:
            trace, retention, policy, budget: the request's own options; None: the server's.
            logprobs: ask for the answer's log-probabilities.
            logprob_start_len: ask for the prompt's log-probabilities from there on: what follows is never taken from
                the cache.
            fields: further fields of the request, say ``lora_path``.
        """
        own = {"policy": policy, "budget": budget}
        body = {**self.body(text, images, max_new_tokens, rid, trace, retention, own, **sampling), **(fields or {})}
        if logprobs:
            body["return_logprob"] = True
        if logprob_start_len is not None:
            body |= {"return_logprob": True, "logprob_start_len": logprob_start_len}
        reply = self.post("/generate", body)
        reply.raise_for_status()
        return Answer.of(reply.json())

    @staticmethod
    def body(text, images, max_new_tokens=16, rid=None, trace=False, retention=None, own=None, **sampling) -> dict:
        """own: further options of the request, by name without their prefix; None is left out."""
        options = {"trace": trace or None, "retention": retention, **(own or {})}
        custom = {f"tgvkv_{name}": value for name, value in options.items() if value is not None}
        params = {"temperature": 0, "max_new_tokens": max_new_tokens, "ignore_eos": True, **sampling}
        if custom:
            params["custom_params"] = custom
        body: dict[str, Any] = {"text": text, "sampling_params": params}
        if images:
            body["image_data"] = [data_url(image) for image in images]
        if rid is not None:
            body["rid"] = rid
        return body

    def together(self, jobs: Sequence[dict]) -> list["Answer"]:
        """Several :meth:`generate` calls at once, answers in order."""
        with ThreadPoolExecutor(len(jobs)) as pool:
            return list(pool.map(lambda job: self.generate(**job), jobs))

    def trace(self, rid: str, number: int = 0) -> tuple[dict, dict]:
        return read_trace(self.traces / f"{rid}.{number}.npz")

    def flush(self, patience_s: float = 10) -> None:
        """Empty the radix cache; waits until the server is idle enough to do it.

        Raises:
            RuntimeError: it was not within ``patience_s`` seconds.
        """
        deadline = time.monotonic() + patience_s
        while not self.post("/flush_cache", {}).ok:
            if time.monotonic() > deadline:
                raise RuntimeError(f"the server was not idle within {patience_s:g} s")
            time.sleep(0.1)

    def memory(self) -> dict[str, int]:
        """Slots by owner once the server is idle, as SGLang's own check after its last batch logged them.

        ``available`` are free, ``evictable`` belong to the radix cache; ``protected`` and ``uncached`` are 0 then.

        Raises:
            RuntimeError: no batch has run yet, or requests kept running for 10 s.
        """
        memory = None
        for _ in range(100):
            checks = memory_checks(self.log_text())
            memory = slots_by_owner(checks[-1]) if checks else None
            if memory and memory["protected"] == memory["uncached"] == 0:
                return memory
            time.sleep(0.1)
        if memory is None:
            raise RuntimeError(f"{self.log} tells of no memory check: send a request first, or start with STRICT")
        raise RuntimeError(f"the server never became idle: {memory}")

    def log_text(self) -> str:
        return self.log.read_text(errors="replace")


@dataclass
class Answer:
    """Token ids, text and SGLang's own accounting of one answer."""

    ids: list[int]
    text: str
    meta: dict = field(repr=False)

    @classmethod
    def of(cls, reply: dict) -> "Answer":
        return cls(list(reply["output_ids"]), reply["text"], reply["meta_info"])

    @property
    def logprobs(self) -> list[float]:
        """Log probability of each token; empty unless the request asked for it."""
        return [entry[0] for entry in self.meta.get("output_token_logprobs") or []]

    @property
    def cached(self) -> int:
        return self.meta["cached_tokens"]


def server_env(extra: dict[str, str] | None = None) -> dict[str, str]:
    return {**os.environ, "TORCH_COMPILE_DISABLE": "1", **STRICT, **(extra or {})}


@contextmanager
def launch(
    model: Path,
    directory: Path,
    *flags: str,
    tokens: int = 20000,
    env: dict[str, str] | None = None,
    make: Callable[..., Server] = Server,
) -> Iterator[Server]:
    """A server that answers, stopped in the end. ``make`` makes the object for it.

    Raises:
        ServerFailedError: it did not come up, or had died by the end of the block; with the end of its log.
    """
    directory.mkdir(parents=True, exist_ok=True)
    port = free_port()
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(model), "--port", str(port)]
    command += [*CPU_FLAGS, *COMMON, "--max-total-tokens", str(tokens), *flags]
    if "tgvkv" in flags:
        command += ["--tgvkv-trace-dir", str(directory / "traces")]
    server = make(f"http://127.0.0.1:{port}", directory / "server.log", directory / "traces", tokens=tokens)
    with server.spawn(command, server_env(env)).running():
        yield server
