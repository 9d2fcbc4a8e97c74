"""The ledger against the installed SGLang, and what happens where a row does not hold. No server is started."""

from __future__ import annotations

import dis
import json
import subprocess
import sys
import types
from abc import ABC
from typing import Protocol

import pytest
from sglang.srt.plugins import load_plugins
from sglang.srt.plugins.hook_registry import HookRegistry

from tgvkv_sglang.errors import NotActiveError
from tgvkv_sglang.sglang_seam import active, backend, ledger, plugin, pool, radix_cache
from tgvkv_sglang.sglang_seam.allocator import CpuSlotAllocator
from tgvkv_sglang.sglang_seam.cpu_platform import TgvCpuPlatform
from tgvkv_sglang.sglang_seam.flashinfer_backend import TgvFlashInferBackend
from tgvkv_sglang.sglang_seam.ledger import check
from tgvkv_sglang.sglang_seam.torch_backend import TgvTorchBackend

SUBCLASSES = (TgvTorchBackend, TgvFlashInferBackend, pool.TgvKVPool, radix_cache.TgvRadixCache,
              CpuSlotAllocator, TgvCpuPlatform)  # fmt: skip
MACHINERY = {*dir(type("Abstract", (ABC,), {})), *dir(type("Interface", (Protocol,), {}))}  # what abc adds to a class


@pytest.fixture(scope="module", autouse=True)
def plugins():
    load_plugins()
    active.require("this test")


def hook(target: str, handler: str = "cpu:support_triton", parameters: tuple[str, ...] = ()) -> ledger.Hook:
    return ledger.Hook(f"sglang.srt.{target}", "AFTER", handler, parameters, "how", "why", "when")


def members(target: str, kind: str, *names: str, handler: str = "backend") -> ledger.Members:
    return ledger.Members(f"sglang.srt.{target}", kind, names, handler, "how", "why", "when")


TORCH = "layers.attention.torch_native_backend.TorchNativeAttnBackend"
BROKEN = [
    (hook("server_args.ServerArgs.no_such"), "no_such"),
    (hook("no_such_module.function"), "no_such_module"),
    (hook("utils.common.support_triton", parameters=("name",)), "takes"),
    (hook("utils.common.support_triton", "cpu:no_such", ("backend",)), "handler"),
    (members("managers.schedule_batch.Req", "ATTRIBUTE", "rid", "no_such"), "has no no_such;"),
    (members(TORCH, "OVERRIDE", "no_such", handler="torch_backend:TgvTorchBackend"), "has no no_such;"),
    (members("mem_cache.allocator.token.TokenToKVPoolAllocator", "OVERRIDE", "free",
             handler="radix_cache:TgvRadixCache"), "TgvRadixCache has no free"),
]  # fmt: skip


def test_every_row_holds():
    assert [problem for _, found in check.check_ledger() for problem in found] == []


@pytest.mark.parametrize("row, word", BROKEN)
def test_a_row_that_does_not_hold_is_told(row, word):
    found = check.problems(row)
    assert len(found) == 1 and word in found[0]


def test_an_override_that_cannot_take_what_sglang_passes_is_told():
    class Stock:
        def new(self, a, b): ...

        def old(self, a): ...

        def fits(self, a, b=1): ...

    class Ours(Stock):
        def new(self, a): ...

        def old(self, a, c): ...

        def fits(self, a): ...

    row = members("x", "OVERRIDE", "new", "old", "fits")
    found = list(check._member_problems(row, Stock, Ours))
    assert [problem.split(" (")[0] for problem in found] == [
        "sglang.srt.x.new takes b, ours does not", "sglang.srt.x.old does not take c, ours does",
    ]  # fmt: skip


def test_names_set_in_a_method_a_base_or_an_annotation_are_found():
    class Base:
        def __init__(self):
            self.in_base = 1

    class Child(Base):
        annotated: int

        def later(self, other):
            self.in_method, other.not_self = 1, 2

    for name in ("in_base", "annotated", "in_method", "later"):
        assert check.has(Child, name)
    assert not check.has(Child, "not_self") and not check.has(Child, "read")


@pytest.mark.parametrize("ours", SUBCLASSES, ids=lambda cls: cls.__name__)
def test_every_method_and_attribute_of_sglang_that_a_class_of_ours_replaces_is_in_the_ledger(ours):
    theirs = [cls for cls in ours.__mro__ if cls.__module__.startswith("sglang.")]
    rows = [row for row in ledger.MEMBERS if any(check.resolve(row.target) is cls for cls in theirs)]
    named = {name for row in rows for name in row.names} | {"__init__"}
    for name, member in vars(ours).items():
        if not name.startswith("__") and name not in MACHINERY and any(name in vars(cls) for cls in theirs):
            assert name in named
        code = getattr(member, "__code__", None)
        for step in dis.get_instructions(code) if code else ():
            if step.opname == "STORE_ATTR" and any(check.has(cls, step.argval) for cls in theirs):
                assert step.argval in named, step.argval


@pytest.fixture
def registered(monkeypatch):
    """Hooks that are registered; the process's own state is put back."""
    monkeypatch.setattr(active, "_problems", active._problems)
    calls = []
    monkeypatch.setattr(HookRegistry, "register", lambda target, *rest: calls.append(target))
    return calls


def test_start_up_registers_every_hook(registered):
    plugin.activate()
    active.require("this test")
    assert registered == [row.target for row in ledger.HOOKS if row.kind in ("AFTER", "AROUND")]


def test_start_up_registers_nothing_when_a_row_does_not_hold(monkeypatch, registered):
    """A name that is gone: SGLang goes on as stock, and refuses --attention-backend tgvkv."""
    gone = members("managers.schedule_batch.Req", "ATTRIBUTE", "no_such_attribute")
    monkeypatch.setattr(check, "MEMBERS", (*ledger.MEMBERS, gone))
    plugin.activate()
    assert registered == []
    with pytest.raises(NotActiveError, match="Req has no no_such_attribute.*tgvkv doctor"):
        active.require("--attention-backend tgvkv")


def test_start_up_registers_nothing_on_another_version(monkeypatch, registered):
    monkeypatch.setattr(check, "SGLANG_VERSION", "0.0.1")
    plugin.activate()
    assert registered == []
    with pytest.raises(NotActiveError, match="sglang==0.0.1"):
        active.require("--attention-backend tgvkv")


@pytest.mark.parametrize("cls", (TgvTorchBackend, TgvFlashInferBackend))
def test_no_backend_is_built_on_a_row_that_does_not_hold(monkeypatch, cls):
    gone = members("model_executor.model_runner.ModelRunner", "ATTRIBUTE", "no_such_attribute", handler="backend")
    monkeypatch.setattr(check, "MEMBERS", (*ledger.MEMBERS, gone))
    monkeypatch.setattr(backend, "refuse_loaded", lambda _: None)
    monkeypatch.setattr(backend, "backend_class", lambda _: cls)
    runner = types.SimpleNamespace(model_config=None, token_to_kv_pool=object.__new__(pool.TgvKVPool), device="cpu")
    with pytest.raises(NotActiveError, match="ModelRunner has no no_such_attribute.*tgvkv doctor"):
        backend.create_backend(runner)


def test_doctor_tells_which_row_does_not_hold(monkeypatch, registered):
    from tgvkv_sglang.cli import doctor_probe

    count = len(ledger.LEDGER)
    assert [row["found"] for row in doctor_probe.ledger_rows()][0] == f"{count} rows of docs/hooks.md hold"
    gone = members("managers.schedule_batch.Req", "ATTRIBUTE", "no_such_attribute")
    lost = ledger.Members("flashinfer.NoSuchWrapper", "ATTRIBUTE", (), "flashinfer_backend", "how", "why", "when")
    monkeypatch.setattr(check, "MEMBERS", (*ledger.MEMBERS, gone, lost))
    monkeypatch.setattr(doctor_probe, "cuda_usable", lambda: False)
    bad, note, hold, plugin_row = doctor_probe.ledger_rows()
    assert bad["level"] == "bad" and "no_such_attribute" in bad["found"]
    assert note["level"] == "note" and note["remedy"] == "not needed on the CPU"
    assert hold["found"].startswith(str(count)) and plugin_row["level"] == "bad"
    monkeypatch.setattr(doctor_probe, "cuda_usable", lambda: True)
    assert [row["level"] for row in doctor_probe.ledger_rows()] == ["bad", "bad", "ok", "bad"]


COST = """
import json, sys
from tgvkv_sglang.sglang_seam.ledger import check
problems, rows = check.problems, []
check.problems = lambda row: rows.append(row) or []
from sglang.srt.plugins import load_plugins
load_plugins()
before = set(sys.modules)
for row in rows:
    problems(row)
runner = "sglang.srt.model_executor.model_runner" in before
print(json.dumps([len(rows), sorted(set(sys.modules) - before), runner]))
"""


def test_start_up_imports_nothing_that_the_process_would_not():
    """Neither the check nor our own modules: this process runs no model."""
    out = subprocess.run([sys.executable, "-c", COST], capture_output=True, text=True, check=True, timeout=300).stdout
    count, new, runner = json.loads(out.splitlines()[-1])
    assert count > len(ledger.LEDGER) // 2 and new == [] and not runner
