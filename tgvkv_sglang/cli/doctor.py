"""``tgvkv doctor``: does everything fit together on this machine? The slow part runs in a child process."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time

from rich.console import Console
from rich.markup import escape
from rich.table import Table

PROBE = "tgvkv_sglang.cli.doctor_probe"
MARKS = {"ok": "[green]ok[/green]", "note": "[yellow]note[/yellow]", "bad": "[bold red]bad[/bold red]"}
LIMIT_S = 900


def doctor() -> int:
    """Print a row a check and a verdict; returns 0 when tgvkv can serve here, 1 when not."""
    console = Console()
    rows = run_probe(console)
    table = Table(show_header=True, header_style="bold")
    for name in ("", "check", "found", "what to do"):
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(MARKS[row["level"]], escape(row["check"]), escape(row["found"]), escape(row["remedy"]))
    console.print(table)
    bad = [row for row in rows if row["level"] == "bad"]
    if bad:
        console.print(f"[bold red]tgvkv cannot serve here: {len(bad)} problem(s), the first is "
                      f"{escape(bad[0]['check'])}: {escape(bad[0]['found'])}[/bold red]")  # fmt: skip
        return 1
    console.print("[bold green]tgvkv is ready: start a server with 'tgvkv serve', or see 'tgvkv demo'.[/bold green]")
    return 0


def run_probe(console: Console) -> list[dict]:
    """The rows of :mod:`.doctor_probe`; a crash of the child becomes a row of its own."""
    with tempfile.TemporaryFile("w+") as noise, console.status("importing SGLang") as status:
        child = subprocess.Popen([sys.executable, "-m", PROBE], stdout=subprocess.PIPE, stderr=noise, text=True)
        start = time.monotonic()
        try:
            while True:
                try:
                    out, _ = child.communicate(timeout=0.5)
                    break
                except subprocess.TimeoutExpired:
                    passed = time.monotonic() - start
                    if passed > LIMIT_S:
                        raise
                    status.update(f"importing SGLang and checking every hook, {passed:.0f} s (up to a few minutes)")
        except BaseException:
            child.kill()
            child.wait()
            raise
        lines = [line for line in out.splitlines() if line.startswith("[{")]
        if child.returncode == 0 and lines:
            return json.loads(lines[-1])
        noise.seek(0)
        tail = " | ".join(noise.read().strip().splitlines()[-3:])
        return [{"level": "bad", "check": "SGLang can be imported", "found": f"exit {child.returncode}: {tail}",
                 "remedy": "install it anew: pip install -c constraints.txt tgvkv-sglang"}]  # fmt: skip
