"""Write docs/hooks.md from the hook ledger: python docs/make_hooks.py"""

from __future__ import annotations

from pathlib import Path

from tgvkv_sglang.sglang_seam.ledger import LEDGER, SGLANG_VERSION

PAGE = Path(__file__).with_name("hooks.md")
HEAD = f"""# Where SGLang is touched

Written by `python docs/make_hooks.py` from `tgvkv_sglang/sglang_seam/ledger.py`; do not edit.

Every hook is a row, for SGLang {SGLANG_VERSION}. `tgvkv doctor` and the tests check that each target exists in the
installed SGLang with the parameters that the handler was written for. Besides, the plugin registers an attention
backend and a radix cache named `tgvkv`, and a CPU platform that steps aside wherever there is an accelerator, another
platform plugin or SGLang's own CPU engine. Without `--attention-backend tgvkv` every handler takes SGLang's own path.

| target (in `sglang.srt`) | kind | handler (in `sglang_seam`) | why | remove when |
|---|---|---|---|---|
"""


def page() -> str:
    rows = [
        f"| `{hook.target.removeprefix('sglang.srt.')}` | {hook.kind} | `{hook.handler}` | {hook.why} | "
        f"{hook.remove_when} |\n"
        for hook in LEDGER
    ]
    return HEAD + "".join(rows)


if __name__ == "__main__":
    PAGE.write_text(page())
