"""docs/features.md: written from its data, names tests that are there, and refusals that start-up knows."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
_spec = importlib.util.spec_from_file_location("make_features", ROOT / "docs" / "make_features.py")
features = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(features)
ROWS = features.rows()
CHECKS = ("refusals.py", "request_checks.py")
SEAM = "".join((ROOT / "tgvkv_sglang" / "sglang_seam" / name).read_text() for name in CHECKS)


def test_the_page_is_current():
    assert features.PAGE.read_text(encoding="utf-8") == features.page(), "run: python docs/make_features.py"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["feature"])
def test_what_a_row_names_is_there(row):
    assert set(row) == {"feature", "asked_by", "state", "how", "tests"} and row["state"] in features.STATES
    for test in row["tests"]:
        path, _, function = test.partition("::")
        assert f"def {function}" in (ROOT / path).read_text(encoding="utf-8"), test
    assert row["tests"] or row["state"] != "tested"


@pytest.mark.parametrize("row", [row for row in ROWS if row["state"] == "refused"], ids=lambda row: row["feature"])
def test_a_refusal_at_start_up_is_one_of_ours(row):
    flags = [name.split()[0] for name in row["asked_by"] if name.startswith("--")]
    assert all(flag in SEAM for flag in flags)
