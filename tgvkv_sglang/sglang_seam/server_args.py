"""Hooks on ServerArgs: our flags in, our radix cache selected, impossible combinations refused."""

from __future__ import annotations

import contextvars
import logging
from typing import Any

from ..config import TgvConfig
from ..flags import BACKEND, FLAGS, add_flags, config_from
from . import active
from .model_support import ask_for_transformers
from .refusals import refuse, refuse_model

logger = logging.getLogger(__name__)
_parsed: contextvars.ContextVar[dict[str, Any] | None] = contextvars.ContextVar("tgvkv_parsed_flags", default=None)


def add_cli_args(result: Any, parser: Any) -> None:
    add_flags(parser)


def from_cli_args(original: Any, cls: type, args: Any) -> Any:
    values = {flag.keyword: getattr(args, flag.keyword, None) for flag in FLAGS}
    token = _parsed.set(values)
    try:
        return original(cls, args)
    finally:
        _parsed.reset(token)


def init(original: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    """ServerArgs(...) with ``tgvkv_*`` keywords. Stock arguments take the stock path."""
    values = {name: kwargs.pop(name) for name in list(kwargs) if name.startswith("tgvkv_")}
    parsed = _parsed.get()
    if parsed is not None:
        values = {**parsed, **values}
    config = config_from(values)
    asked = BACKEND in (
        kwargs.get("attention_backend"),
        kwargs.get("prefill_attention_backend"),
        kwargs.get("decode_attention_backend"),
    )
    if asked:
        active.require(f"--attention-backend {BACKEND}")
        if kwargs.get("radix_cache_backend") in (None, BACKEND):
            kwargs["radix_cache_backend"] = BACKEND
    if asked:
        object.__setattr__(self, "_tgvkv", config)
    original(self, *args, **kwargs)
    if asked:
        refuse(self)


def get_model_config(result: Any, self: Any) -> None:
    """The first look at the model, while ServerArgs resolves itself: a model we cannot serve goes no further.

    Later checks (ours and SGLang's own, on graphs, pools and recurrent state) would name something else.
    """
    if BACKEND in (self.attention_backend, self.prefill_attention_backend, self.decode_attention_backend):
        refuse_model(result)
        ask_for_transformers(self, result)
        _bound_stash(self, result)


def _bound_stash(server_args: Any, model_config: Any) -> None:
    """As many grounding tokens as the stash holds, counted over all ranks: kept sets do not depend on their number."""
    config = config_of(server_args)
    if config is None:
        return
    row = model_config.head_dim * model_config.dtype.itemsize + 4
    bounded = config.within(model_config.num_hidden_layers * model_config.num_attention_heads * row)
    if bounded != config:
        logger.info("tgvkv: --tgvkv-stash-mib %d holds the queries of %d text tokens; of a longer question the last %d "
                    "choose what is kept", config.stash_mib, *[bounded.grounding_cap] * 2)  # fmt: skip
        object.__setattr__(server_args, "_tgvkv", bounded)


def config_of(server_args: Any) -> TgvConfig | None:
    """The server's configuration, or None when it does not run on tgvkv."""
    return getattr(server_args, "_tgvkv", None)
