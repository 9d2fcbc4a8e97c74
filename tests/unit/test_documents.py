"""What the documents say about each other and about the code is true."""

from __future__ import annotations

import re
import string
import subprocess
from functools import cache
from pathlib import Path

import pytest

from bench.quality.boards import CLASSES as BENCHMARK
from tgvkv_sglang.cli.demo import CLASSES
from tgvkv_sglang.trace import file_stem

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
TEXT = {".py", ".md", ".toml", ".txt", ".jinja", ".svg", ""}
DESIGN = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")


@cache
def tracked() -> list[Path]:
    """Text files of the repository, this one aside: it has to spell out what others must not say."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = [ROOT / name for name in names.split("\0") if name]
    return [path for path in files if path.suffix in TEXT and path.is_file() and path != Path(__file__).resolve()]


def said(pattern: str) -> list[tuple[str, str]]:
    """(file, match) of a pattern in all text files."""
    found = []
    for path in tracked():
        name = path.relative_to(ROOT).as_posix()
        found += [(name, match.group(0)) for match in re.finditer(pattern, path.read_text(encoding="utf-8"))]
    return found


def test_every_document_that_a_file_names_is_there():
    names = {path.name for path in tracked()}
    for name, document in said(r"[\w./-]*\w\.md\b"):
        near = [ROOT / document, (ROOT / name).parent / document]
        assert any(path.is_file() for path in near) or document in names, f"{name} names {document}"


@pytest.mark.parametrize("pattern", [r"\bDESIGN (section|rule)\b", r"\b[Ii]ssue \d", r"\bissue text\b"])
def test_no_file_points_to_a_tracker_or_a_document_kept_elsewhere(pattern):
    assert said(pattern) == []


def test_headings_and_rules_of_the_design_that_files_name_are_there():
    headings = re.findall(r"^## (.+)$", DESIGN, re.MULTILINE)
    rules = {int(number) for number in re.findall(r"^(\d+)\. \*\*", DESIGN, re.MULTILINE)}
    quoted = [(name, match.split('"')[1]) for name, match in said(r'docs/design\.md,? \(?"[^"]+"')]
    numbers = [(name, int(match.rsplit(" ", 1)[1])) for name, match in said(r"docs/design\.md,? \(?rule \d+")]
    assert quoted and numbers
    for name, heading in quoted:
        assert any(known.startswith(heading) for known in headings), f"{name}: {heading}"
    assert {number for _, number in numbers} <= rules


# -- the model card --------------------------------------------------------------------------------------------------


@cache
def card() -> dict[str, dict[str, str]]:
    """The model card's table by class; the card is the one that the README links."""
    link = re.search(r"\[model card\]\(([^)]+)\)", README.read_text(encoding="utf-8")).group(1)
    text = (README.parent / link).read_text(encoding="utf-8")
    probes = text.partition("<!-- probes:begin -->")[2].partition("<!-- probes:end -->")[0]
    head, _, *rows = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in probes.strip().splitlines()]
    return {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in rows}


def test_the_readme_says_what_the_model_card_says():
    readme = " ".join(README.read_text(encoding="utf-8").split())
    least = float(re.search(r"answers held-out questions about its pictures at ([\d.]+) % or better", readme).group(1))
    assert len(card()) == 12 and least == min(float(row["exact, 100 %"]) for row in card().values())


def test_the_demo_and_the_benchmark_ask_what_needs_the_picture():
    assert set(CLASSES) == set(BENCHMARK["sparse"]) > set(BENCHMARK["crowded"])
    fit = {name for name, row in card().items() if row["fit to measure"] == "yes"}
    assert set(CLASSES) == fit - {"second_turn", "two_images"}, "all of one picture and one turn"
    for name in CLASSES:
        assert float(card()[name]["exact, 100 %"]) >= 98


# -- traces ----------------------------------------------------------------------------------------------------------


def test_a_trace_is_named_as_the_troubleshooting_page_says():
    page = " ".join((ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8").split())
    sentence = re.search(r"everything but letters, digits, (.+?) \(and leading dots\) replaced", page).group(1)
    kept = {*string.ascii_letters, *string.digits, *re.findall(r"`(.)`", sentence)}
    for character in map(chr, range(1, 256)):
        assert (file_stem(f"a{character}b") == f"a{character}b") is (character in kept), character
    assert not file_stem(".hidden").startswith(".")
