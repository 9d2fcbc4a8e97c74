"""Many servers after one import of SGLang: a process that has imported it and forks a server whenever it is told to.

SGLang takes 10 to 40 s to import, three times over for a server; a forked one is up in a few seconds. What runs in the
child is SGLang's own ``launch_server``: its plugins are loaded there, under the child's environment.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import traceback
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator, Mapping, Self, Sequence

from tests.fakes import plugin_env
from tgvkv_sglang.testing.server import Server

ROOT = Path(__file__).resolve().parents[2]


class Forked:
    """A forked server's process, to :class:`ServerProcess` like a ``Popen``."""

    def __init__(self, zygote: "Zygote", pid: int):
        self.zygote, self.pid = zygote, pid

    def poll(self) -> int | None:
        return self.zygote.ask({"poll": self.pid})["code"]

    def wait(self) -> int:
        return self.zygote.ask({"wait": self.pid})["code"]


class Zygote:
    """Start it with :func:`zygote`; its servers are made by :meth:`server`."""

    def __init__(self, process: subprocess.Popen):
        self._process = process

    def ask(self, message: Mapping[str, Any]) -> dict[str, Any]:
        print(json.dumps(message), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())

    def server(self, *args: Any, **kwargs: Any) -> Server:
        """A ``Server`` that is forked here instead of started anew."""
        outer = self

        class ForkedServer(Server):
            def spawn(self, command: Sequence[str], env: Mapping[str, str]) -> Self:
                message = {"argv": list(command[3:]), "env": {**env, "PYTHONUNBUFFERED": "1"}, "log": str(self.log)}
                self.process = Forked(outer, outer.ask(message)["pid"])
                return self

        return ForkedServer(*args, **kwargs)


@contextmanager
def zygote() -> Iterator[Zygote]:
    """A process with SGLang imported, until the end of the block."""
    env = {**os.environ, **plugin_env("observed"), "TORCH_COMPILE_DISABLE": "1"}
    command = [sys.executable, "-m", "tests.models.zygote"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with (
        tempfile.TemporaryFile("w+") as noise,
        subprocess.Popen(command, env=env, cwd=ROOT, stderr=noise, **pipes) as process,
    ):
        if process.stdout.readline().strip() != '"ready"':
            noise.seek(0)
            raise RuntimeError(f"SGLang cannot be imported: {noise.read()[-2000:]}")
        yield Zygote(process)
        process.stdin.close()


# -- in the process itself ---------------------------------------------------------------------------------------------


def _become_server(argv: Sequence[str], env: Mapping[str, str], log: str) -> None:
    """In the child: never returns."""
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (out, 1), (out, 2)):
        os.dup2(source, target)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = ["sglang.launch_server", *argv]
    try:
        from sglang.launch_server import run_server
        from sglang.srt.plugins import load_plugins
        from sglang.srt.server_args import prepare_server_args

        load_plugins()
        run_server(prepare_server_args(sys.argv[1:]))
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def _import_all() -> None:
    import sglang.srt.entrypoints.http_server
    import sglang.srt.managers.detokenizer_manager
    import sglang.srt.managers.scheduler
    import sglang.srt.models.registry  # noqa: F401
    from sglang.srt.managers.multimodal_processor import import_processors

    import_processors("sglang.srt.multimodal.processors")


def _serve() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever an import prints is no reply
    _import_all()

    def reply(content: Any) -> None:
        print(json.dumps(content), file=replies, flush=True)

    reply("ready")
    codes: dict[int, int] = {}
    for line in sys.stdin:
        message = json.loads(line)
        if "argv" in message:
            pid = os.fork()
            if not pid:
                os.setsid()
                _become_server(**message)
            reply({"pid": pid})
            continue
        pid, how = (message["poll"], os.WNOHANG) if "poll" in message else (message["wait"], 0)
        if pid not in codes:
            found, status = os.waitpid(pid, how)
            if found:
                codes[pid] = os.waitstatus_to_exitcode(status)
        reply({"code": codes.get(pid)})


if __name__ == "__main__":
    _serve()
