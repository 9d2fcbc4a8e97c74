"""Three families of models, as the sweep tries all of them (``python -m bench.models``)."""

from __future__ import annotations

from typing import Iterator

import pytest

from tests.models import checks
from tests.models.families import BY_NAME, SMOKE
from tests.models.serving import OURS, retention_one, served
from tests.models.span_checks import anywhere
from tests.models.zygote import zygote


@pytest.fixture(scope="module")
def forked():
    with zygote() as process:
        yield process


@pytest.fixture(scope="module", params=SMOKE)
def bench(request, forked, tmp_path_factory) -> Iterator[checks.Bench]:
    family, directory = BY_NAME[request.param], tmp_path_factory.mktemp("family")
    model = family.make(directory / "model")
    with served(forked, family, model, directory / "ours", *OURS) as bench:
        yield bench


def test_retention_one_is_stock_or_plain_transformers(bench, forked, tmp_path):
    retention_one(forked, bench, tmp_path / "stock")


@pytest.mark.parametrize("check", [*checks.CHECKS.values(), anywhere], ids=lambda check: check.__name__)
def test_a_family_passes_the_checks(bench, check):
    check(bench)


def test_a_picture_behind_another_text_comes_from_the_cache_of_embeddings(bench):
    """Its KV is new, and selected from; the tower ran for the first text alone."""
    images = checks.pictures(bench.family, 1, seed=77)
    embedded = lambda: bench.server.log_text().count("a tower embeds")  # noqa: E731
    bench.server.flush()
    before, turn = embedded(), None
    for rid, text in (("text-1", "Look: {}What is it?"), ("text-2", "And here, {}What is it?")):
        text = bench.family.prompt(text)
        answer = bench.ask(rid, text, images)
        turn = bench.conversation(rid, answer, text, images, turn)
        assert answer.cached < int(turn.vision.argmax())
        checks.assert_selected(bench, rid, turn)
        assert embedded() == before + 1
