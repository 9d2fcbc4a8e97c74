"""Every place where SGLang is touched, one row each: what, how, by which module of ours, why, and when it can go.

The rows are data (``hooks``, ``members``); :mod:`.check` holds them against the installed SGLang. ``tgvkv doctor``
checks every row. A server checks, in each of its processes and before anything is registered, every hook and all names
in modules that the process has loaded (``start_up_problems``), and when the attention backend is built every row that
this server leans on (``require_rows``). docs/hooks.md is written from here.
"""

from __future__ import annotations

from .hooks import HOOKS
from .members import MEMBERS
from .rows import SGLANG_VERSION, Hook, Members, Row

LEDGER: tuple[Row, ...] = (*HOOKS, *MEMBERS)

__all__ = ["HOOKS", "LEDGER", "MEMBERS", "SGLANG_VERSION", "Hook", "Members", "Row"]
