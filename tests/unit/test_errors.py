"""Every error that the package raises on purpose has a name and one base."""

from __future__ import annotations

import ast
import builtins
import inspect
from pathlib import Path

import pytest
import torch

from tgvkv_sglang import errors
from tgvkv_sglang.errors import TgvkvError
from tgvkv_sglang.kv.store import UnitStore
from tgvkv_sglang.selection.budget import shares
from tgvkv_sglang.types import Span

PLUGIN = Path(__file__).resolve().parents[2] / "tgvkv_sglang"
# The makers of the demo's pictures and questions are free-standing, and so is what only tests use.
APART = {"demo", "testing"}
FILES = [path for path in sorted(PLUGIN.rglob("*.py")) if path.relative_to(PLUGIN).parts[0] not in APART]
BUILT_IN = {
    name for name, value in vars(builtins).items() if isinstance(value, type) and issubclass(value, Exception)
}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PLUGIN).as_posix())
def test_no_built_in_exception_is_raised(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Raise) and node.exc is not None:
            raised = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            assert ast.unparse(raised) not in BUILT_IN, f"line {node.lineno}: give it a name in errors.py"


def test_every_named_error_has_the_base_and_a_built_in_one():
    for name, cls in inspect.getmembers(errors, inspect.isclass):
        assert issubclass(cls, TgvkvError)
        fits = [base.__name__ for base in cls.__mro__ if base.__name__ in BUILT_IN - {"Exception"}]
        assert (fits or cls is TgvkvError) and cls.__doc__, name


def test_errors_defined_elsewhere_have_the_base_too():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and node.name.endswith("Error") and path.name != "errors.py":
                assert "TgvkvError" in [ast.unparse(base) for base in node.bases], f"{path.name}: {node.name}"


BAD_INPUT = [
    (lambda: Span(5, 3), r"\[5, 3\)"),
    (lambda: shares([1.0, -2.0]), "layer 1 has attention mass -2.0"),
    (lambda: UnitStore(torch.zeros(2, 4, 1, 2), torch.zeros(2, 5, 1, 2)), r"V \(2, 5, 1, 2\)"),
]


@pytest.mark.parametrize("call, message", BAD_INPUT)
def test_a_named_error_tells_the_value(call, message):
    with pytest.raises(TgvkvError, match=message):
        call()


def test_a_layer_that_is_not_self_attention_is_told_by_number():
    assert "layer 7" in str(errors.NotSelfAttentionError(7))
