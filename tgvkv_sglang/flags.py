"""Launch flags. One table serves the command line, ``sglang.Engine`` keyword arguments and the documentation."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any, Mapping

from .config import RECLAIMS, TgvConfig
from .errors import ConfigError
from .registry import BUDGETS, SCOPES, policy_names

BACKEND = "tgvkv"


@dataclass(frozen=True)
class Flag:
    """One flag: ``field`` of :class:`TgvConfig`, how its text is read, what it means."""

    field: str
    read: type
    help: str
    choices: tuple[str, ...] | None = None

    @property
    def option(self) -> str:
        return f"--tgvkv-{self.field.replace('_', '-')}"

    @property
    def keyword(self) -> str:
        """Its name as an ``sglang.Engine`` keyword argument and in an argparse namespace."""
        return f"tgvkv_{self.field}"


FLAGS = (
    Flag("retention", float, "Share of the vision KV that decode keeps, averaged over layers, 0 < r <= 1."),
    Flag("scope", str, "'vision' shares out layers*retention*vision tokens, 'total' as the paper.", tuple(SCOPES)),
    Flag("reclaim", str, "When full vision spans are freed: under memory 'pressure', or 'eager'ly.", RECLAIMS),
    Flag("policy", str, "How vision tokens are scored.", policy_names()),
    Flag("budget", str, "What a layer weighs when the kept tokens are shared out; 'own' asks the policy.", BUDGETS),
    Flag("full_budget", float, "Largest share of the pool held as reclaimable full vision spans, 0..1."),
    Flag("grounding_cap", int, "At most this many of a prompt's last new text tokens score the image."),
    Flag("stash_mib", int, "Device memory for the queries of that text, MiB; a question that needs more is cut short."),
    Flag("trace_dir", str, "Directory for selection traces of requests that ask for one (tgvkv_trace)."),
)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags to SGLang's own parser. Values are checked by :class:`TgvConfig`, so that all routes agree."""
    defaults = TgvConfig()
    group = parser.add_argument_group("tgvkv (with --attention-backend tgvkv)")
    for flag in FLAGS:
        default = getattr(defaults, flag.field)
        help_text = f"{flag.help} Default: {default}."
        group.add_argument(flag.option, default=None, help=help_text, type=flag.read, choices=flag.choices)


def config_from(values: Mapping[str, Any]) -> TgvConfig:
    """Build the configuration from ``tgvkv_*`` keywords; None means the default.

    Raises:
        ConfigError: unknown keyword or bad value.
    """
    fields = {flag.keyword: flag.field for flag in FLAGS}
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise ConfigError(f"unknown option {unknown[0]!r}; tgvkv has {', '.join(sorted(fields))}")
    return TgvConfig(**{fields[name]: value for name, value in values.items() if value is not None})
