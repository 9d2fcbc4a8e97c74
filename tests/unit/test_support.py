"""The table of supported models says what results and tests say."""

from __future__ import annotations

import io
import json
import shlex
from pathlib import Path

import pytest
from rich.console import Console

from tests.models.families import BY_NAME, FAMILIES, SMOKE, UNTRIED
from tgvkv_sglang.cli.main import build_parser
from tgvkv_sglang.cli.models import show_models, support

ROOT = Path(__file__).resolve().parents[2]
ROWS = support()["rows"]
ACCEPTED = [row for row in ROWS if row["verdict"] == "accepted"]
RUNS = json.loads((ROOT / "bench" / "results" / "models-cpu.json").read_text())["runs"]
CHECKS = {"stock", "kept set", "follow-up", "two images", "reclaim", "spans"}


@pytest.mark.parametrize("row", ACCEPTED, ids=lambda row: f"{row['architecture']}{row['variant']}")
def test_every_accepted_row_names_a_test_that_is_there(row):
    words = shlex.split(row["test"])
    if row["cpu"]:
        assert words[:4] == ["python", "-m", "bench.models", "--only"] and words[4:] == row["cpu"]
        assert {BY_NAME[name].architecture for name in row["cpu"]} == {row["architecture"]}
    else:
        assert len(words) == 1 and (ROOT / words[0]).is_file()
    assert not row["gpu"] or (ROOT / row["gpu"]).is_file()


def test_what_was_tried_passed_every_check():
    tried = [name for row in ROWS for name in row["cpu"]]
    passed = [family.name for family in FAMILIES if "error" not in RUNS[family.key]]
    assert sorted(tried) == sorted(passed) and set(SMOKE) <= set(tried)
    for name in tried:
        run = RUNS[BY_NAME[name].key]
        assert set(run["checks"]) == CHECKS and all(run["checks"].values())
        assert run["flags"] == list(BY_NAME[name].flags)


def test_nothing_is_both_tried_and_not():
    assert {row["architecture"] for row in ROWS if not row["cpu"]} >= {"LlavaLlamaForCausalLM", "Phi4MMForCausalLM"}
    assert {untried.architecture for untried in UNTRIED} <= {row["architecture"] for row in ACCEPTED}
    assert not {untried.name for untried in UNTRIED} & {family.name for family in FAMILIES}


def test_the_doctor_prints_every_row():
    out = io.StringIO()
    assert build_parser().parse_args(["doctor", "--models"]).models
    assert show_models(Console(file=out, width=400)) == 0
    text = out.getvalue()
    assert all(row["architecture"] in text for row in ROWS)
    assert all(name in text for row in ROWS for name in row["cpu"])
