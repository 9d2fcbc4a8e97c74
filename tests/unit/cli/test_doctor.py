"""Checks of ``tgvkv doctor`` that need no SGLang."""

import compileall
import importlib
import sys

import pytest

from tgvkv_sglang.cli.doctor_probe import bytecode_rows


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of one file, never compiled."""
    (tmp_path / "uncompiled").mkdir()
    (tmp_path / "uncompiled" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    importlib.invalidate_caches()
    return "uncompiled"


def test_files_that_each_start_compiles_anew_are_noted_until_they_are_compiled(package, tmp_path):
    (row,) = bytecode_rows(package)
    assert row["level"] == "note" and row["check"] == "PYTHONDONTWRITEBYTECODE"
    assert row["remedy"].endswith(f"-m compileall -q {tmp_path}")
    assert compileall.compile_dir(tmp_path, quiet=1)
    assert bytecode_rows(package) == []


def test_where_python_may_write_bytecode_nothing_is_noted(package, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    assert bytecode_rows(package) == []


def test_a_package_that_is_not_there_is_no_matter_of_bytecode(package):
    assert bytecode_rows(package + "_not") == []
