"""Every family of models that can be made small: the checks of ``tests/models`` on live CPU servers.

    python -m bench.models

Each family is served twice, by stock SGLang and by ours. What is in the result is not repeated (but with
``--fresh``); a family that failed is tried again. Ends with status 1 if one failed.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from bench.common import RESULTS, Store, header
from tests.models import checks
from tests.models.families import FAMILIES
from tests.models.family import Family
from tests.models.serving import OURS, retention_one, served
from tests.models.span_checks import anywhere
from tests.models.zygote import Zygote, zygote
from tgvkv_sglang.cli.server import ServerFailedError

CHECKS = {**checks.CHECKS, "spans": anywhere}
COLUMNS = ("stock", *CHECKS)


def try_family(server: Zygote, family: Family, directory: Path, bar: tqdm) -> dict[str, Any]:
    """A row of the result; ``error`` tells what failed after the ``checks`` that passed."""
    row: dict[str, Any] = {"name": family.name, "architecture": family.architecture, "note": family.note}
    row |= {"flags": list(family.flags), "checks": {}}
    try:
        bar.set_postfix_str("checkpoint")
        model = family.make(directory / "model")
        with served(server, family, model, directory / "ours", *OURS) as bench:
            bar.set_postfix_str("stock")
            row["checks"]["stock"] = retention_one(server, bench, directory / "stock")
            for name, check in CHECKS.items():
                bar.set_postfix_str(name)
                row["checks"][name] = check(bench)
    except (AssertionError, ServerFailedError, Exception) as error:  # whatever it is, the next family is tried
        row["error"] = f"{type(error).__name__}: {error}"[-2000:]
    return row


def show(rows: list[dict[str, Any]], console: Console) -> None:
    table = Table(title="tiny checkpoints on the CPU, random weights, float32")
    for name in ("family", *COLUMNS):
        table.add_column(name)
    for row in rows:
        table.add_row(row["name"], *(row["checks"].get(name, "-") for name in COLUMNS))
    console.print(table)
    for row in rows:
        if "error" in row:
            console.print(f"[bold red]{row['name']}[/bold red]: {row['error']}", markup=True, highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", choices=sorted(family.name for family in FAMILIES), metavar="FAMILY", help="default: all"
    )
    parser.add_argument("--fresh", action="store_true", help="repeat what is in the result")
    parser.add_argument("--out", type=Path, default=RESULTS / "models-cpu.json")
    args = parser.parse_args()
    store = Store(args.out)
    wanted = [family for family in FAMILIES if not args.only or family.name in args.only]
    todo = [family for family in wanted if args.fresh or family.key not in store.done]
    if todo:
        store.note(**header())
        directory = Path(tempfile.mkdtemp(prefix="tgvkv-models-"))
        with zygote() as server, tqdm(todo, unit="family") as bar:
            for family in bar:
                bar.set_description(family.name)
                row = try_family(server, family, directory / family.key, bar)
                store.add(family.key, row)
                if "error" in row:
                    print(f"{family.name}: logs are in {directory / family.key}", file=sys.stderr)
                else:
                    shutil.rmtree(directory / family.key)
    rows = [store.runs[family.key] for family in wanted]
    show(rows, Console())
    sys.exit(any("error" in row for row in rows))


if __name__ == "__main__":
    main()
