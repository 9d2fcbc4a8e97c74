"""Write docs/hooks.md from the ledger: python docs/make_hooks.py"""

from __future__ import annotations

from pathlib import Path

from tgvkv_sglang.sglang_seam.ledger import HOOKS, MEMBERS, SGLANG_VERSION

PAGE = Path(__file__).with_name("hooks.md")
HEAD = f"""# Where SGLang is touched

Written by `python docs/make_hooks.py` from `tgvkv_sglang/sglang_seam/ledger`; do not edit.

Every function of SGLang {SGLANG_VERSION} that the plugin wraps, replaces or calls although it is private, and every
name that it reads, assigns or overrides. `tgvkv doctor` checks each row against the installed SGLang: functions must
take the parameters given here, names must be there, overriding methods must take what SGLang passes. A server checks
the same in each of its processes: before anything is registered, every function that is wrapped and all names in
modules that the process has loaded (if one does not hold, nothing is registered and `--attention-backend tgvkv` is
refused); and when the attention backend is built, every row that this server leans on. Without
`--attention-backend tgvkv` every handler takes SGLang's own path. The CPU platform steps aside wherever there is an
accelerator, another platform plugin or SGLang's own CPU engine.

A test reads the plugin's source and fails when it uses a name of SGLang's that is not here.

"""
HOOK_HEAD = """## Functions

AFTER and AROUND are registered with SGLang's HookRegistry; PATCH is replaced on one instance at run time; CALL is a
private method that is called.

| target (in `sglang.srt`) | kind | handler (in `sglang_seam`) | how | why | remove when |
|---|---|---|---|---|---|
"""
MEMBER_HEAD = """
## Names

ATTRIBUTE is read, assigned, imported or (if public) called; OVERRIDE is a method that a subclass of ours replaces;
OPTIONAL is asked for with a default and cannot be checked.

| of (in `sglang.srt`) | kind | names | used by (in `sglang_seam`) | how | why | remove when |
|---|---|---|---|---|---|---|
"""


def line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |\n"


def code(*names: str) -> str:
    return ", ".join(f"`{name}`" for name in names)


def page() -> str:
    hooks = [
        line(code(row.target.removeprefix("sglang.srt.")), row.kind, code(row.handler), row.how, row.why,
             row.remove_when)
        for row in HOOKS
    ]  # fmt: skip
    members = [
        line(code(row.target.removeprefix("sglang.srt.")), row.kind, code(*row.names), code(*row.handler.split(",")),
             row.how, row.why, row.remove_when)
        for row in MEMBERS
    ]  # fmt: skip
    return "".join([HEAD, HOOK_HEAD, *hooks, MEMBER_HEAD, *members])


if __name__ == "__main__":
    PAGE.write_text(page())
