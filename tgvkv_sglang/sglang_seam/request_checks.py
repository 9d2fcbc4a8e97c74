"""Requests that would end the scheduler for everybody, refused in the tokenizer process with HTTP 400.

SGLang's scheduler runs a request outside any ``try``: a token id without an embedding, or a value that its tensors
cannot hold, stops the whole server. Values of other types than SGLang's own message declares are refused with them:
some of them end it (``extra_key: []``), with pickled messages (SGLang's default) not all, with msgpack every one.
"""

from __future__ import annotations

import copy
import re
import reprlib
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from ..errors import ConfigError

# Not a client's own values, or (the text) unread by the scheduler's decoder beyond being a string; and large.
NOT_CHECKED = ("input_text", "input_ids", "input_embeds", "mm_inputs", "mm_data_mooncake", "time_stats")
CONSEQUENCE = "it would end the server"
GRAMMARS = ("json_schema", "regex", "ebnf", "structural_tag")
INT32, INT64 = 2**31 - 1, 2**63 - 1
# Logits are float32: beyond these they overflow to infinities, and sampling from NaN ends the scheduler.
LARGEST_LOGIT = 1e30
SMALLEST_PENALTY = 1e-6


def check_request(tokenized: Any, given: Any, vocab_size: int, server_args: Any) -> None:
    """Refuse a tokenized request that would end the scheduler.

    Args:
        tokenized: SGLang's ``TokenizedGenerateReqInput``.
        given: the ``GenerateReqInput`` that it was made of.
        server_args: SGLang's ``ServerArgs``.

    Raises:
        ConfigError: it names the field and the value.
    """
    from sglang.srt.managers.io_struct import TokenizedGenerateReqInput

    if not isinstance(tokenized, TokenizedGenerateReqInput):
        return
    check_message(tokenized)
    if tokenized.input_ids is not None and not len(tokenized.input_ids):
        raise ConfigError(f"the prompt has no tokens; send at least one: {CONSEQUENCE}")
    if given.sampling_params.get("is_normalized"):
        raise ConfigError(f"sampling_params has no option 'is_normalized': {CONSEQUENCE}")
    check_sampling(tokenized.sampling_params, vocab_size)
    if server_args.device == "cpu" and server_args.grammar_backend == "xgrammar":
        check_no_grammar(tokenized.sampling_params)
    _within("top_logprobs_num", tokenized.top_logprobs_num, 0, vocab_size)
    _within("logprob_start_len", tokenized.logprob_start_len, -1, INT32)


def check_no_grammar(sampling: Any) -> None:
    """SGLang's xgrammar pins its token masks, which needs a GPU's driver, and applies them with GPU kernels alone.

    Raises:
        ConfigError: the answer shall follow a grammar; it is named.
    """
    for name in GRAMMARS:
        if getattr(sampling, name) is not None:
            raise ConfigError(f"{name} cannot be used on a CPU with --grammar-backend xgrammar: {CONSEQUENCE}")


def check_token_ids(ids: Sequence[int], vocab_size: int) -> None:
    """Refuse a client's token ids that have no embedding.

    Raises:
        ConfigError: an id is negative or ``vocab_size`` or more; it is named.
    """
    try:
        numbers = np.asarray(ids, np.int64)
        inside = bool(((numbers >= 0) & (numbers < vocab_size)).all())
    except OverflowError:
        inside = False
    if not inside:
        outside = next(token for token in ids if not 0 <= token < vocab_size)
        raise ConfigError(f"input_ids must be in [0, {vocab_size}), got {outside}: {CONSEQUENCE}")


def _within(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ConfigError(f"{name} must be in [{low}, {high}], got {value!r}: {CONSEQUENCE}")


def check_sampling(sampling: Any, vocab_size: int) -> None:
    """Refuse sampling parameters that SGLang accepts and that its tensors cannot hold.

    Args:
        sampling: SGLang's ``SamplingParams``, of the types it declares.

    Raises:
        ConfigError: a value is out of range; it is named.
    """
    _within("top_k", sampling.top_k, 1, INT32)
    _within("min_new_tokens", sampling.min_new_tokens, 0, INT32)
    _within("sampling_seed", sampling.sampling_seed or 0, -INT64 - 1, INT64)
    _within("temperature", sampling.temperature, 0.0, LARGEST_LOGIT)
    _within("repetition_penalty", sampling.repetition_penalty, SMALLEST_PENALTY, 2.0)
    stops = sampling.stop_token_ids or ()
    # Stop tokens are forbidden until min_new_tokens: where all tokens are, there is nothing to sample from.
    if sampling.min_new_tokens and len(stops) > vocab_size // 2:
        raise ConfigError(f"stop_token_ids must be few where min_new_tokens is set, got {len(stops)}: {CONSEQUENCE}")
    for token in stops:
        _within("stop_token_ids", token, 0, vocab_size - 1)
    for token, bias in (sampling.logit_bias or {}).items():
        _within(f"logit_bias[{token!r}]", bias, -LARGEST_LOGIT, LARGEST_LOGIT)


def _culprit(message: Any, reason: str) -> str:
    """The field and value that ``reason`` gives the position of (``$[8][24]``); messages are arrays on the wire."""
    found = re.search(r"\$\[(\d+)\](?:\[(\d+)\])?", reason)
    if found is None:
        return "this request cannot be read"
    name = message.__struct_fields__[int(found[1]) - 1]  # the first element is the message's tag
    value = getattr(message, name)
    if name == "sampling_params" and found[2] is not None:
        name = value.__struct_fields__[int(found[2])]
        value = getattr(value, name)
    return f"{name} cannot be {reprlib.repr(value)}"


def check_message(tokenized: Any) -> None:
    """Refuse a tokenized request whose values are not of the types that SGLang's message declares.

    ``custom_params`` may be any dictionary: its declared type is narrower than what SGLang's processors take.

    Raises:
        ConfigError: it cannot be encoded, or SGLang's decoder refuses it; with that decoder's reason.
    """
    from sglang.srt.managers.io_struct import msgpack_decode, msgpack_encode

    message = copy.copy(tokenized)
    for name in NOT_CHECKED:
        setattr(message, name, None)
    message.sampling_params = copy.copy(tokenized.sampling_params)
    if isinstance(message.sampling_params.custom_params, dict):
        message.sampling_params.custom_params = None
    try:
        encoded = msgpack_encode(message)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ConfigError(f"a value of this request cannot be sent to the scheduler: {error}") from error
    try:
        msgpack_decode(encoded)
    except (msgspec.MsgspecError, TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{_culprit(message, str(error))}: {error}") from error
