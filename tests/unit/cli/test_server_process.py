"""The life of a child server, and of the demo around it, on stand-ins for SGLang."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time

import pytest

from tgvkv_sglang.cli import demo as demo_module
from tgvkv_sglang.cli import server as server_module
from tgvkv_sglang.cli.main import main

# A stand-in with a grandchild that ignores SIGTERM, as a hung scheduler would.
STUBBORN = """
import signal, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
                          "print('deaf', flush=True); time.sleep(600)"], stdout=subprocess.PIPE)
child.stdout.readline()
print("child", child.pid, flush=True)
time.sleep(600)
"""


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rsplit(")", 1)[1].split()[0] != "Z"


def test_stopping_takes_the_whole_process_group(tmp_path, monkeypatch):
    monkeypatch.setattr(server_module, "server_command", lambda argv: [sys.executable, "-c", STUBBORN])
    monkeypatch.setattr(server_module, "STOP_PATIENCE_S", 0.5)
    log = tmp_path / "log"
    with server_module.CpuServer([], log) as server:
        server.start()
        while "child" not in log.read_text():
            assert server.process.poll() is None, log.read_text()
            time.sleep(0.02)
        pids = [server.process.pid, int(log.read_text().split()[-1])]
        assert all(map(alive, pids))
    assert not any(map(alive, pids))


def test_a_server_that_dies_shows_the_end_of_its_log(tmp_path, monkeypatch):
    code = "import sys; print('first'); sys.exit('the reason')"
    monkeypatch.setattr(server_module, "server_command", lambda argv: [sys.executable, "-c", code])
    with server_module.CpuServer([], tmp_path / "log") as server, pytest.raises(server_module.ServerFailedError) as e:
        server.start().wait()
    assert "the reason" in str(e.value)


# Answers /health, and refuses every chat with the reason.
REFUSING = """
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_GET(self): self.send_response(200); self.end_headers()
    def do_POST(self): self.send_error(500, 'out of patience')
print('a line of the log', flush=True)
HTTPServer(('127.0.0.1', int(sys.argv[1])), Handler).serve_forever()
"""


def test_a_server_that_dies_while_it_is_used_shows_the_end_of_its_log(tmp_path, monkeypatch):
    monkeypatch.setattr(
        server_module, "server_command", lambda argv: [sys.executable, "-c", REFUSING, argv[argv.index("--port") + 1]]
    )
    server = server_module.CpuServer([], tmp_path / "log").start()
    with pytest.raises(server_module.ServerFailedError, match="(?s)died.*a line of the log"), server.running() as same:
        assert same is server and server.alive()
        server.process.kill()
        server.process.wait()
    assert not server.alive()


def test_a_server_never_gets_the_engine_that_no_registry_has(tmp_path, monkeypatch):
    monkeypatch.setenv("SGLANG_USE_CPU_ENGINE", "1")
    code = "import os; print(sorted(name for name in os.environ if 'CPU_ENGINE' in name), os.environ['KEPT'])"
    monkeypatch.setenv("KEPT", "kept")
    monkeypatch.setattr(server_module, "server_command", lambda argv: [sys.executable, "-c", code])
    with server_module.CpuServer([], tmp_path / "log").start() as server:
        server.process.wait()
    assert (tmp_path / "log").read_text() == "[] kept\n"


def test_a_demo_that_fails_prints_the_reason_and_the_log_and_stops_its_server(tmp_path, monkeypatch, capsys):
    started = []

    def command(argv):
        started.append([sys.executable, "-c", REFUSING, argv[argv.index("--port") + 1]])
        return started[-1]

    monkeypatch.setattr(server_module, "server_command", command)
    assert main(["demo", "--out", str(tmp_path)]) == 1
    shown = capsys.readouterr().out
    assert "out of patience" in shown and "a line of the log" in shown
    assert len(list(tmp_path.glob("*/picture.png"))) == 1
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", int(started[0][-1]))) != 0


def test_sigterm_ends_the_demo_like_ctrl_c():
    previous = signal.signal(signal.SIGTERM, demo_module._terminate)
    try:
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
    finally:
        signal.signal(signal.SIGTERM, previous)
