"""A request's options and spans: validated in the tokenizer process, attached to the request in the scheduler."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..attention.state import RequestState
from ..config import RequestOptions, TgvConfig, namespaced
from ..errors import ConfigError
from ..spans import vision_spans
from .server_args import config_of

STATE = "_tgvkv_state"


def create_tokenized_object(original: Any, self: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
    """Refuse bad options (ValueError becomes HTTP 400) and give another retention its own radix namespace."""
    server = config_of(self.server_args)
    if server is None:
        return original(self, obj, *args, **kwargs)
    sampling = obj.sampling_params if isinstance(getattr(obj, "sampling_params", None), dict) else {}
    options = RequestOptions.from_custom_params(sampling.get("custom_params"))
    if getattr(obj, "session_params", None):
        raise ConfigError("session_params cannot be used with tgvkv: send the whole conversation, its prefix is cached")
    tokenized = original(self, obj, *args, **kwargs)
    if options.retention is not None:
        tokenized.extra_key = namespaced(tokenized.extra_key, options.apply(server), server)
    return tokenized


def token_ids(ids: Any) -> np.ndarray:
    """SGLang's ``array('q')`` as int64 numpy, without a copy."""
    return np.frombuffer(ids, dtype=np.int64) if len(ids) else np.empty(0, np.int64)


def audio_offsets(multimodal_inputs: Any) -> list[tuple[int, int]]:
    items = getattr(multimodal_inputs, "mm_items", None) or []
    return [tuple(pair) for item in items if item.is_audio() for pair in item.offsets or []]


def image_grids(multimodal_inputs: Any) -> list[list[int]]:
    """``[t, h, w]`` patch grids of the images, where the model's processor gives them."""
    grids = []
    for item in getattr(multimodal_inputs, "mm_items", None) or []:
        grid = getattr(item, "image_grid_thw", None)
        if grid is None:
            grid = getattr(item, "video_grid_thw", None)
        if grid is not None:
            grids.extend([int(x) for x in row] for row in np.asarray(grid).reshape(-1, 3))
    return grids


def state_of(req: Any) -> RequestState | None:
    """The state attached to a request, or None (text-only, or retention 1.0)."""
    return getattr(req, STATE, None)


def ensure_state(req: Any, server: TgvConfig) -> RequestState | None:
    """Attach a state to a request on its first match; None for requests that take the stock path."""
    if hasattr(req, STATE):
        return getattr(req, STATE)
    options = RequestOptions.from_custom_params(
        {k: v for k, v in (req.sampling_params.custom_params or {}).items() if k != "__req__"}
    )
    config = options.apply(server)
    state = None
    if config.evicts and req.multimodal_inputs is not None and req.positional_embed_overrides is None:
        spans = vision_spans(token_ids(req.origin_input_ids), audio_offsets(req.multimodal_inputs))
        if spans:
            state = RequestState(req.rid, config, options.trace, spans, len(req.origin_input_ids))
    setattr(req, STATE, state)
    return state
