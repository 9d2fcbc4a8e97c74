"""Whether the plugin is whole in this process. Imports nothing of SGLang."""

from __future__ import annotations

from ..errors import NotActiveError

_problems: list[str] | None = ["the plugin entry point has not run in this process"]


def succeed() -> None:
    global _problems
    _problems = None


def fail(problems: list[str]) -> None:
    global _problems
    _problems = list(problems)


def require(what: str) -> None:
    """Raise NotActiveError unless every hook and class was registered."""
    if _problems is not None:
        raise NotActiveError(f"{what} needs the whole tgvkv plugin, but: {'; '.join(_problems)}; run 'tgvkv doctor'")
