"""The ledger names everything of SGLang's that the seam uses: read off the seam's source, SGLang is not imported."""

from __future__ import annotations

import ast
import builtins
import importlib
import os
import types
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from tgvkv_sglang.sglang_seam.ledger import HOOKS, LEDGER, MEMBERS

ROOT = Path(__file__).resolve().parents[3]
SEAM = ROOT / "tgvkv_sglang" / "sglang_seam"
FILES = sorted(SEAM.glob("*.py"))
OURS = sorted([*(ROOT / "tgvkv_sglang").rglob("*.py"), *(ROOT / "triton_kernels").rglob("*.py")])
# Variables that hold one kind of SGLang object wherever they stand in the seam, and the class that the ledger names.
RECEIVERS = {
    "req": "Req",
    "batch": "ScheduleBatch",
    "pending": "ScheduleBatch",
    "forward_batch": "ForwardBatch",
    "layer": "RadixAttention",
    "model_runner": "ModelRunner",
    "model_config": "ModelConfig",
    "args": "ServerArgs",
    "model_runner.server_args": "ServerArgs",
    "inputs": "MultimodalInputs",
    "a": "ServerArgs",
    "allocator": "TokenToKVPoolAllocator",
    "self.token_to_kv_pool_allocator": "TokenToKVPoolAllocator",
    "self.token_to_kv_pool": "MHATokenToKVPool",
    "self.req_to_token_pool": "ReqToTokenPool",
    "ctx": "TreeCacheBuildContext",
    "ctx.params": "CacheInitParams",
}
OF_SERVER_ARGS = {"_flag", "_set", "_above_one"}  # take the name of one of its attributes
# Of ours, on objects of SGLang's.
OWN_ON_THEIRS = {("MHATokenToKVPool", "store"), ("ServerArgs", "_tgvkv")}
LIBRARIES = (torch, torch.Tensor, torch.nn.Module, torch.device, torch.cuda, torch.distributed, np, np.ndarray, os,
             importlib, types)  # fmt: skip
BUILTINS = (str, list, dict, set, tuple, int, float, BaseException, types.FunctionType)


@cache
def trees() -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}


def named() -> set[str]:
    """Every name that a row gives."""
    return {name for row in MEMBERS for name in row.names} | {hook.target.rpartition(".")[2] for hook in HOOKS}


def names_of(owner: str) -> set[str]:
    rows = [row for row in MEMBERS if row.target.rpartition(".")[2] == owner]
    calls = [hook for hook in HOOKS if hook.target.rpartition(".")[0].endswith(f".{owner}")]
    return {name for row in rows for name in row.names} | {hook.target.rpartition(".")[2] for hook in calls}


def defined_by(path: Path) -> set[str]:
    """Names of functions, classes, fields, and of attributes that a file assigns to ``self``."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            found.add(node.attr)
    return found


def used_in(path: Path) -> set[tuple[str, str]]:
    """(what, name) of every attribute that a file of the seam reads, assigns or asks for by name."""
    found = set()
    for node in ast.walk(trees()[path]):
        if isinstance(node, ast.Attribute) and node.attr not in ("setter", "__struct_fields__"):  # Python's, msgspec's
            found.add((ast.unparse(node.value), node.attr))
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) in ("getattr", "hasattr", "setattr", "object.__setattr__")
            and isinstance(node.args[1], ast.Constant)
        ):
            found.add((ast.unparse(node.args[0]), node.args[1].value))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in OF_SERVER_ARGS:
            found.add(("args", node.args[0].value))
    return found


def imported_by(path: Path) -> set[str]:
    """Local names of whole modules that a file imports: what it takes off them is no object of SGLang's."""
    found = set()
    for node in ast.walk(trees()[path]):
        if isinstance(node, ast.Import):
            found.update((alias.asname or alias.name).split(".")[0] for alias in node.names)
    return found | {"logger"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_attribute_that_is_not_ours_is_in_the_ledger(path):
    ours = set().union(*(defined_by(other) for other in OURS))
    general = {name for owner in (*LIBRARIES, *BUILTINS, builtins) for name in dir(owner)}
    modules = imported_by(path)
    known = named() | ours | general | {"_tgvkv"}
    unknown = {pair for pair in used_in(path) if pair[1] not in known and pair[0].split(".")[0] not in modules}
    assert not unknown, "name them in sglang_seam/ledger"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_import_from_sglang_is_in_the_ledger(path):
    targets = {row.target for row in MEMBERS} | {hook.target.rpartition(".")[0] for hook in HOOKS}
    targets |= {f"{row.target}.{name}" for row in MEMBERS for name in row.names}
    for node in ast.walk(trees()[path]):
        if isinstance(node, ast.ImportFrom) and not node.level and node.module.split(".")[0] == "sglang":
            assert {f"{node.module}.{alias.name}" for alias in node.names} <= targets
        assert not isinstance(node, ast.Import) or not any(alias.name.startswith("sglang") for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_private_name_is_defined_in_its_own_file_or_in_the_ledger(path):
    own = defined_by(path)
    private = {name for _, name in used_in(path) if name.startswith("_") and not name.startswith("__")}
    assert private - own - named() <= {"_tgvkv"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_is_read_off_an_object_of_sglang_is_in_the_row_of_its_class(path):
    found = {(RECEIVERS[what], name) for what, name in used_in(path) if what in RECEIVERS} - OWN_ON_THEIRS
    assert {(owner, name) for owner, name in found if name not in names_of(owner)} == set()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_assignment_to_somebody_elses_object_is_in_the_ledger(path):
    """``self.updater.update = ...`` replaces a method of an instance: a PATCH."""
    ours = set().union(*(defined_by(other) for other in OURS if not other.is_relative_to(SEAM)))
    for node in ast.walk(trees()[path]):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) != "self":
            assert node.attr in named() | ours, f"{path.name}:{node.lineno} {ast.unparse(node)}"


def test_no_row_is_left_over():
    used = {name for path in FILES for _, name in used_in(path)}
    methods = {name for path in FILES for name in defined_by(path)}
    keys = {
        node.value for tree in trees().values() for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }  # fmt: skip
    imported = {
        alias.name for tree in trees().values() for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }  # fmt: skip
    assigned = {
        target.id for tree in trees().values() for node in ast.walk(tree) if isinstance(node, ast.Assign)
        for target in node.targets if isinstance(target, ast.Name)
    }  # fmt: skip
    for row in MEMBERS:
        where = methods if row.kind == "OVERRIDE" else used | keys | assigned | imported
        assert set(row.names) <= where, row.target
        assert tuple(sorted(row.names)) == row.names and len(set(row.names)) == len(row.names), row.target
    for hook in HOOKS:
        if hook.kind == "CALL":
            assert hook.target.rpartition(".")[2] in used


def test_rows_name_modules_of_the_seam_and_say_everything():
    modules = {path.stem for path in FILES}
    for row in LEDGER:
        assert set(row.users) <= modules, row.target
        assert row.how and row.why and row.remove_when, row.target
    assert {hook.kind for hook in HOOKS} == {"AFTER", "AROUND", "PATCH", "CALL"}
    assert {row.kind for row in MEMBERS} == {"ATTRIBUTE", "OVERRIDE", "OPTIONAL"}
    seen = [(row.target, row.kind, row.handler) for row in LEDGER]
    assert len(set(seen)) == len(seen)
