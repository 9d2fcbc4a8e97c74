"""Policies by name: ours, another package's through its entry point, and names that nobody has."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import numpy as np
import pytest

from tests.registered import other_packages
from tests.unit.selection.random_prompt import LAYERS, SPANS, N, Prompt
from tgvkv_sglang import registry
from tgvkv_sglang.config import TgvConfig
from tgvkv_sglang.errors import ConfigError
from tgvkv_sglang.flags import FLAGS
from tgvkv_sglang.selection.budget import TotalScope, VisionScope
from tgvkv_sglang.selection.budget_rules import Tvb
from tgvkv_sglang.selection.tgv import Tgv

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "policy_package"


class Unfinished(Tgv):
    """Another package's, with a budget rule that nobody has."""

    budget = "layers"


@pytest.fixture
def installed(monkeypatch):
    """Registers entry points as an installed package does; takes (name, value) pairs."""

    def install(**points: str) -> None:
        found = EntryPoints(EntryPoint(name, value, registry.GROUP) for name, value in points.items())
        monkeypatch.setattr(registry, "entry_points", lambda group: found.select(group=group))
        registry.refresh()

    with other_packages(monkeypatch, EXAMPLE):
        yield install
    sys.modules.pop("loudest", None)


def test_ours_are_found_by_name():
    assert registry.policy_names()[0] == "tgv" and isinstance(registry.load_policy("tgv"), Tgv)
    assert isinstance(registry.load_budget_rule("tvb"), Tvb)
    assert isinstance(registry.load_scope("vision"), VisionScope)
    assert isinstance(registry.load_scope("total"), TotalScope)


def test_the_examples_policy_is_the_brute_force_maximum(installed):
    installed(loudest="loudest:Loudest")
    assert registry.policy_names() == (*registry.POLICIES, "loudest")
    prompt = Prompt()
    scores = prompt.ground([13], policy=registry.load_policy("loudest")).chosen
    text = Tgv().query_positions(SPANS, 0, N, 99).numpy()
    vision = np.concatenate([np.arange(span.start, span.end) for span in SPANS])
    for layer in range(LAYERS):
        weights = prompt.dense(layer, np.tri(N))[0]
        want = [max(weights[head, t, v] for head in range(len(weights)) for t in text) for v in vision]
        np.testing.assert_allclose(scores.scores[layer], want, rtol=1e-5)
    assert TgvConfig(policy="loudest").rule == "uniform" and not scores.extras


def test_the_examples_project_registers_what_it_says():
    import tomllib

    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    assert project["entry-points"][registry.GROUP] == {"loudest": "loudest:Loudest"}


def test_a_name_of_ours_cannot_be_taken_over(installed):
    installed(tgv="loudest:Loudest")
    assert registry.policy_names() == tuple(registry.POLICIES) and isinstance(registry.load_policy("tgv"), Tgv)


@pytest.mark.parametrize("value, words", [("no_such_module:Thing", "no_such_module"), ("loudest:Nothing", "Nothing"),
                                          ("builtins:dict", "has no method query_positions"),
                                          (f"{__name__}:Unfinished", "budget of .* must be one of tvb")])  # fmt: skip
def test_a_policy_that_cannot_be_used_is_named(installed, value, words):
    installed(broken=value)
    with pytest.raises(ConfigError, match=f"--tgvkv-policy broken: .*{words}"):
        registry.load_policy("broken")


def test_an_unknown_name_is_refused_with_those_there_are(installed):
    installed(loudest="loudest:Loudest")
    for refuse in (lambda: TgvConfig(policy="kvzip"), lambda: registry.load_policy("kvzip")):
        with pytest.raises(ConfigError, match="--tgvkv-policy must be one of tgv, peak, .*, loudest, got 'kvzip'"):
            refuse()


def test_the_flag_offers_what_is_registered():
    (flag,) = [flag for flag in FLAGS if flag.field == "policy"]
    assert flag.choices == registry.policy_names()
