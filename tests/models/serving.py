"""Servers of a family: stock and ours, with the same drawn weights."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

from tests.fakes import observed_env
from tests.models.checks import RETENTION, Bench, answers, equals_stock, equals_transformers
from tests.models.family import Family
from tests.models.zygote import Zygote
from tgvkv_sglang.testing.server import launch

DRAWN = ("--load-format", "dummy")
STOCK = ("--attention-backend", "torch_native")
OURS = ("--attention-backend", "tgvkv", "--tgvkv-retention", str(RETENTION))
POOL = 900
"""Slots: some pictures in full, and all chats of the last check as views."""


@contextmanager
def served(
    zygote: Zygote, family: Family, model: Path, directory: Path, *flags: str, tokens: int = POOL
) -> Iterator[Bench]:
    """A family's server, with ``flags`` beside the family's own."""
    seen = directory / "seen"
    seen.mkdir(parents=True, exist_ok=True)
    flags = (*flags, *(() if family.weights else DRAWN), *family.flags)
    with launch(model, directory, *flags, tokens=tokens, env=observed_env(seen), make=zygote.server) as server:
        yield Bench(family, model, server, seen)


def retention_one(zygote: Zygote, bench: Bench, directory: Path) -> str:
    """Retention 1.0 is stock SGLang, or plain transformers where stock has no radix cache to compare."""
    if bench.family.weights:
        return equals_transformers(bench)
    return equals_stock(bench, stock_answers(zygote, bench.family, bench.model, directory))


def stock_answers(zygote: Zygote, family: Family, model: Path, directory: Path) -> list[tuple[list[int], int, int]]:
    with served(zygote, family, model, directory, *STOCK, tokens=20000) as bench:
        return answers(family, bench.server)
