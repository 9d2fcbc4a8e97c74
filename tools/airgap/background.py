"""Run a command beyond the end of the session that started it, and look after it from later ones.

    python3 tools/airgap/background.py KEEP start COMMAND...
    python3 tools/airgap/background.py KEEP follow --seconds 500 --copy-to DIR

For machines that are reached with one short command after another. KEEP is a folder that outlives them: the command's
output goes to KEEP/run.txt, and its results should be written there too. ``follow`` prints what is new of the output
and copies the files of KEEP to DIR until the command ends or the seconds are over. Standard library only.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Sequence

RUNNING, OUTPUT = "running.pid", "run.txt"


def running(keep: Path) -> int | None:
    """Process id of a command that has not ended, or None."""
    if not (keep / RUNNING).is_file():
        return None
    pid = int((keep / RUNNING).read_text())
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return None
    return None if state == "Z" else pid  # nobody may be there to reap it


def start(keep: Path, command: Sequence[str]) -> int:
    """Start the command in a session of its own; returns its process id.

    Raises:
        SystemExit: one is under way already.
    """
    if (pid := running(keep)) is not None:
        raise SystemExit(f"a run is under way already (process {pid}); use follow")
    keep.mkdir(parents=True, exist_ok=True)
    with (keep / OUTPUT).open("ab") as out:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True)
    (keep / RUNNING).write_text(str(child.pid))
    return child.pid


def copy_files(source: Path, target: Path) -> None:
    """Copy the files of a folder, each whole or not at all."""
    target.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.is_file() and path.name != RUNNING and path.suffix != ".part":
            staging = target / (path.name + ".part")
            shutil.copyfile(path, staging)
            staging.replace(target / path.name)


def follow(keep: Path, target: Path | None, seconds: float) -> bool:
    """Show output and copy results until the command ends or ``seconds`` are over; True when it has ended."""
    deadline = time.monotonic() + seconds
    shown = 0
    while True:
        ended = running(keep) is None
        if target is not None:
            copy_files(keep, target)
        text = (keep / OUTPUT).read_bytes() if (keep / OUTPUT).is_file() else b""
        print(text[shown:].decode(errors="replace"), end="", flush=True)
        shown = len(text)
        if ended or time.monotonic() > deadline:
            return ended
        time.sleep(1)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("keep", type=Path, metavar="KEEP")
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("start").add_argument("command", nargs=argparse.REMAINDER)
    following = actions.add_parser("follow")
    following.add_argument("--seconds", type=float, default=600.0)
    following.add_argument("--copy-to", type=Path)
    args = parser.parse_args(words)
    if args.action == "start":
        if not args.command:
            parser.error("start needs a command")
        print(f"started as process {start(args.keep, args.command)}")
    elif follow(args.keep, args.copy_to, args.seconds):
        print("the run has ended")
    else:
        print("still running: follow again")
    return 0


if __name__ == "__main__":
    sys.exit(main())
