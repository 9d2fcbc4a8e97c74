"""What we know of a request: validated in the tokenizer process, attached to the request in the scheduler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Iterator, Mapping

import numpy as np

from ..config import RequestOptions, TgvConfig
from ..errors import ConfigError
from ..namespace import Namespace, SaltedKey, client_key
from ..request.state import RequestState
from ..spans import PictureRun, vision_spans, with_symbols
from .pictures import picture_runs
from .request_checks import check_request, check_token_ids
from .server_args import config_of

FACTS = "_tgvkv_facts"


@dataclass(frozen=True)
class Facts:
    """What does not change while a request lives.

    Attributes:
        namespace: with whom it shares KV.
        pictures: its multimodal tokens and the ids that stand for them in the tree.
        state: its views and scoring; None for requests on the stock path (text only, or retention 1.0).
    """

    namespace: Namespace
    pictures: tuple[PictureRun, ...]
    state: RequestState | None

    def tree_ids(self, ids: Any) -> np.ndarray:
        """SGLang's token ids (``array('q')``) as the tree knows them, int64."""
        return with_symbols(token_ids(ids), self.pictures)


def compute_extra_key(original: Any, self: Any, request: Any) -> str | None:
    """Keep a chat request's ``cache_salt`` and ``extra_key`` apart; SGLang writes one behind the other."""
    if config_of(self.tokenizer_manager.server_args) is None:
        return original(self, request)
    client_key(request.extra_key)
    if request.cache_salt is not None and not isinstance(request.cache_salt, str):
        raise ConfigError(f"cache_salt must be a string, got {request.cache_salt!r}")
    joined = original(self, request)
    return SaltedKey(request.cache_salt, request.extra_key) if request.cache_salt else joined


def create_tokenized_object(original: Any, self: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
    """Refuse what would harm others; a ConfigError is a ValueError, which SGLang answers with HTTP 400."""
    if config_of(self.server_args) is None:
        return original(self, obj, *args, **kwargs)
    if getattr(obj, "session_params", None):
        raise ConfigError("session_params cannot be used with tgvkv: send the whole conversation, its prefix is cached")
    key = client_key(getattr(obj, "extra_key", None))
    tokenized = original(self, obj, *args, **kwargs)
    if key is not None:
        tokenized.extra_key = key  # plain text, which the scheduler can decode
    RequestOptions.from_custom_params(tokenized.sampling_params.custom_params)
    check_request(tokenized, obj, self.model_config.vocab_size, self.server_args)
    return tokenized


def tokenize_one_request(original: Any, self: Any, obj: Any) -> Any:
    """Runs before a request's pictures are read. Returns the coroutine that reads them."""
    if config_of(self.server_args) is not None:
        _refuse_claimed_hashes(obj)
        if obj.input_ids is not None:
            check_token_ids(obj.input_ids, self.model_config.vocab_size)
    return original(self, obj)


def _refuse_claimed_hashes(obj: Any) -> None:
    """A picture is known by its hash: a client that says the hash could put its picture in the place of another's."""
    if getattr(obj, "mm_hashes", None):
        raise ConfigError("mm_hashes cannot be used with tgvkv: pictures are hashed here; leave it out")
    for name in ("image_data", "video_data", "audio_data"):
        for item in _mappings(getattr(obj, name, None)):
            claimed = sorted({"hash", "pad_value"} & item.keys())
            if claimed:
                raise ConfigError(f"{name} must not say its {claimed[0]!r}: pictures are hashed here; leave it out")


def _mappings(data: Any) -> Iterator[Mapping]:
    if isinstance(data, Mapping):
        yield data
    elif isinstance(data, (list, tuple)):
        for item in data:
            yield from _mappings(item)


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
    """The state of a request that was matched; None on the stock path."""
    facts = getattr(req, FACTS, None)
    return facts.state if facts is not None else None


def facts_of(req: Any, server: TgvConfig) -> Facts:
    """What is known of a request; found out on its first match, when its pictures are still there."""
    if not hasattr(req, FACTS):
        setattr(req, FACTS, _find_out(req, server))
    return getattr(req, FACTS)


def _find_out(req: Any, server: TgvConfig) -> Facts:
    options = RequestOptions.from_custom_params(req.sampling_params.custom_params)
    config = options.apply(server)
    inputs = req.multimodal_inputs
    ids = token_ids(req.origin_input_ids)
    pictures = picture_runs(inputs, ids)
    state = None
    if config.evicts and inputs is not None and req.positional_embed_overrides is None:
        spans = vision_spans(with_symbols(ids, pictures), audio_offsets(inputs))
        if spans:
            state = RequestState(req.rid, config, options.trace, spans, len(ids))
    return Facts(Namespace.of(config, req.extra_key, req.lora_id), pictures, state)
