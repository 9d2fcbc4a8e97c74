"""Does the installed SGLang have what the ledger's rows name?"""

from __future__ import annotations

import dis
import importlib
import inspect
import sys
from typing import Callable, Iterator, Sequence

from ...errors import LedgerError, NotActiveError
from .hooks import HOOKS
from .members import MEMBERS
from .rows import SGLANG_VERSION, Hook, Members, Row

SEAM = __package__.rpartition(".")[0]
REGISTERED = ("AFTER", "AROUND")
MOVED = (AttributeError, ImportError, LedgerError)


def resolve(target: str) -> object:
    """Import the longest module prefix of ``target`` and follow the rest as attributes.

    Raises:
        AttributeError, ImportError, LedgerError: the target is not there.
    """
    parts = target.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError as error:
            if error.name and ".".join(parts[:cut]).startswith(error.name):
                continue
            raise
        for name in parts[cut:]:
            found = getattr(found, name)
        return found
    raise LedgerError(f"no module of {target!r} can be imported; install sglang=={SGLANG_VERSION}")


def handler(row: Row) -> object:
    """Our side of a row: a function or class, or None where only modules are named (those are not imported)."""
    module, _, name = row.handler.partition(":")
    return getattr(importlib.import_module(f"{SEAM}.{module}"), name) if name else None


def parameters_of(function: Callable) -> dict[str, inspect.Parameter]:
    """Parameters by name, without ``cls`` (bound class methods hide it)."""
    found = inspect.signature(inspect.unwrap(function)).parameters
    return {name: parameter for name, parameter in found.items() if name != "cls"}


def has(owner: object, name: str) -> bool:
    """Whether ``owner`` has ``name``; of a class, whether its instances have: also as an annotation, or by
    ``self.name = ...`` in any of its methods."""
    if hasattr(owner, name):
        return True
    if not isinstance(owner, type):
        return False
    members = [member for cls in owner.__mro__[:-1] for member in vars(cls).values()]
    return any(name in getattr(cls, "__annotations__", ()) for cls in owner.__mro__) or any(
        _assigns(inspect.unwrap(getattr(member, "__func__", member)), name) for member in members
    )


def _assigns(function: object, name: str) -> bool:
    """Whether a method assigns to this attribute of its first argument."""
    code = getattr(function, "__code__", None)
    if code is None or not code.co_argcount or name not in code.co_names:
        return False
    steps = list(dis.get_instructions(code))
    return any(
        step.opname == "STORE_ATTR" and step.argval == name and before.argval == code.co_varnames[0]
        for before, step in zip(steps, steps[1:], strict=False)
    )


def _unfit(ours: Callable, theirs: Callable) -> str | None:
    """Why a method of ours cannot stand in for theirs; None when it can."""
    own, stock = parameters_of(ours), parameters_of(theirs)
    kinds = {parameter.kind for parameter in stock.values()}
    if inspect.Parameter.VAR_KEYWORD not in kinds:
        new = [name for name, p in own.items() if p.default is p.empty and name not in stock]
        if new:
            return f"does not take {', '.join(new)}, ours does"
    lost = [
        name for name, p in stock.items()
        if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and p.default is p.empty and name not in own
    ]  # fmt: skip
    return f"takes {', '.join(lost)}, ours does not" if lost else None


def _hook_problems(hook: Hook, target: Callable, _: object) -> Iterator[str]:
    names = tuple(parameters_of(target))
    if hook.parameters and names != hook.parameters:
        yield f"{hook.target} takes {names}, expected {hook.parameters} (SGLang {SGLANG_VERSION})"


def _member_problems(row: Members, target: object, ours: object) -> Iterator[str]:
    if row.kind == "OPTIONAL":
        return
    missing = [name for name in row.names if not has(target, name)]
    if missing:
        yield f"{row.target} has no {', '.join(missing)}; this plugin is written for SGLang {SGLANG_VERSION}"
    if row.kind != "OVERRIDE":
        return
    for name in [name for name in row.names if name not in missing]:
        if not hasattr(ours, name):
            yield f"{row.handler} has no {name}"
            continue
        why = _unfit(getattr(ours, name), getattr(target, name))
        if why is not None:
            yield f"{row.target}.{name} {why} (SGLang {SGLANG_VERSION})"


def problems(row: Row) -> list[str]:
    """What is wrong with one row on the installed SGLang; empty when it holds."""
    try:
        target = resolve(row.target)
    except MOVED as error:
        return [f"{row.target} is not there ({error}); this plugin is written for SGLang {SGLANG_VERSION}"]
    try:
        ours = handler(row)
    except MOVED as error:
        return [f"the handler {row.handler} of {row.target} is missing ({error})"]
    check = _hook_problems if isinstance(row, Hook) else _member_problems
    return list(check(row, target, ours))


def version_problem() -> list[str]:
    from importlib.metadata import version

    installed = version("sglang")
    if installed != SGLANG_VERSION:
        return [f"SGLang {installed} is installed; install sglang=={SGLANG_VERSION}"]
    return []


def check_ledger(rows: Sequence[Row] | None = None) -> Iterator[tuple[Row, list[str]]]:
    """Each row (all of the ledger by default) with its problems."""
    for row in (*HOOKS, *MEMBERS) if rows is None else rows:
        yield row, problems(row)


def rows_in_use() -> list[Row]:
    """Rows of those modules of ours that this process has loaded: of the others nothing can go wrong here."""
    return [row for row in (*HOOKS, *MEMBERS) if any(f"{SEAM}.{user}" in sys.modules for user in row.users)]


def loaded(target: str) -> bool:
    """Whether looking ``target`` up imports nothing."""
    parts = target.split(".")
    for cut in range(len(parts), 0, -1):
        module = sys.modules.get(".".join(parts[:cut]))
        if module is not None:
            return cut == len(parts) or hasattr(module, parts[cut]) or not hasattr(module, "__path__")
    return False


def start_up_problems() -> list[str]:
    """Problems that show before anything is registered: of every registered hook (SGLang imports their modules right
    afterwards), and of all other rows in use as far as this process has their modules."""
    registered = [row for row in HOOKS if row.kind in REGISTERED]
    rest = [row for row in rows_in_use() if row not in registered]
    return failures(registered) + [p for row in rest if loaded(row.target) for p in problems(row)]


def failures(rows: Sequence[Row]) -> list[str]:
    """Problems of several rows in one list, the SGLang version first."""
    return version_problem() + [problem for _, found in check_ledger(rows) for problem in found]


def require_rows() -> None:
    """Raise NotActiveError unless every row in use holds. For a process that has loaded the model anyway."""
    found = failures(rows_in_use())
    if found:
        raise NotActiveError(f"this SGLang is not the one tgvkv is written for: {'; '.join(found)}; run 'tgvkv doctor'")
