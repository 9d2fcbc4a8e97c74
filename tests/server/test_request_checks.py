"""Requests that are refused because they would end the scheduler: SGLang's own tensors and message types say so.

No server: SGLang's messages, encoder, decoder and sampling tensors in this process.
"""

from __future__ import annotations

import math
from array import array
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.constrained.xgrammar_backend import XGrammarGrammar
from sglang.srt.managers.io_struct import GenerateReqInput, TokenizedGenerateReqInput, msgpack_decode, msgpack_encode
from sglang.srt.sampling import sampling_batch_info
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo
from sglang.srt.sampling.sampling_params import SamplingParams

from tgvkv_sglang.errors import ConfigError
from tgvkv_sglang.sglang_seam.request_checks import check_request, check_token_ids

VOCAB = 320
GPU = SimpleNamespace(device="cuda", grammar_backend="xgrammar")
CPU = SimpleNamespace(device="cpu", grammar_backend="xgrammar")


def request(fields: dict | None = None, **sampling) -> tuple[TokenizedGenerateReqInput, GenerateReqInput]:
    """A message as TokenizerManager makes it, through SGLang's own checks."""
    params = SamplingParams(**sampling)
    params.normalize(SimpleNamespace())  # a tokenizer: asked only about stop strings
    params.verify(VOCAB)
    message = {
        "rid": "r", "input_text": "x", "input_ids": array("q", [1, 2]), "input_embeds": None, "mm_inputs": None,
        "token_type_ids": None, "sampling_params": params, "return_logprob": False, "logprob_start_len": -1,
        "top_logprobs_num": 0, "token_ids_logprob": None, "stream": False, **(fields or {}),
    }  # fmt: skip
    given = GenerateReqInput(input_ids=list(message["input_ids"]), sampling_params=sampling)
    return TokenizedGenerateReqInput(**message), given


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 0, "max_new_tokens": 5, "stop": None, "stop_token_ids": [0, VOCAB - 1]},
        {"top_k": -1, "top_p": 0.5, "min_p": 0.1, "repetition_penalty": 0.01, "logit_bias": {"5": -100, "6": 1e9}},
        {"custom_params": {"tgvkv_retention": 0.1, "tgvkv_trace": True, "a": [1, "x", None], "b": {"c": 1.5}}},
        {"custom_params": {"a": {"b": [{"c": [1]}]}}},
        {"max_new_tokens": None, "min_new_tokens": 3, "sampling_seed": -(2**63), "stream_interval": 0},
    ],
)
def test_what_can_be_served_is_left_alone(sampling):
    message, given = request({"extra_key": "k", "token_ids_logprob": [1], "top_logprobs_num": VOCAB}, **sampling)
    before = msgpack_encode(message)
    check_request(message, given, VOCAB, GPU)
    assert msgpack_encode(message) == before


@pytest.mark.parametrize(
    ("sampling", "fields", "named"),
    [
        ({"max_new_tokens": 1.5}, {}, "max_new_tokens cannot be 1.5"),
        ({"temperature": True}, {}, "temperature cannot be True"),
        ({"top_k": 5.0}, {}, "top_k cannot be 5.0"),
        ({"ignore_eos": "x"}, {}, "ignore_eos cannot be 'x'"),
        ({"regex": 5}, {}, "regex cannot be 5"),
        ({"custom_params": [1]}, {}, "custom_params cannot be [1]"),
        ({"custom_params": "a"}, {}, "custom_params cannot be 'a'"),
        ({}, {"extra_key": 5}, "extra_key cannot be 5"),
        ({}, {"stream": "x"}, "stream cannot be 'x'"),
        ({}, {"positional_embed_overrides": [1]}, "positional_embed_overrides cannot be [1]"),
    ],
)
def test_what_sglangs_message_does_not_declare_is_refused_by_name(sampling, fields, named):
    message, given = request(fields, **sampling)
    with pytest.raises(Exception, match="Expected"):
        msgpack_decode(msgpack_encode(message))
    with pytest.raises(ConfigError) as error:
        check_request(message, given, VOCAB, GPU)
    assert named in str(error.value)


@pytest.mark.parametrize(("sampling", "fields"), [({"top_k": 2**70}, {}), ({}, {"extra_key": "\ud800"})])
def test_what_cannot_be_sent_is_refused(sampling, fields):
    message, given = request(fields, **sampling)
    with pytest.raises((OverflowError, UnicodeError)):
        msgpack_encode(message)
    with pytest.raises(ConfigError, match="cannot be sent to the scheduler"):
        check_request(message, given, VOCAB, GPU)


def test_an_empty_prompt_is_refused():
    with pytest.raises(ConfigError, match="no tokens"):
        check_request(*request({"input_ids": array("q")}), VOCAB, GPU)


@pytest.mark.parametrize("ids", [[-1], [5, -1], [VOCAB], [5, 2**62], [-(2**63)], [-1, 2**63], [2**70]])
def test_token_ids_without_an_embedding_are_refused(ids):
    outside = next(token for token in ids if not 0 <= token < VOCAB)
    with pytest.raises((IndexError, ValueError)):
        torch.nn.Embedding(VOCAB, 2)(torch.tensor(ids))
    with pytest.raises(ConfigError, match=f"input_ids must be in .* got {outside}:"):
        check_token_ids(ids, VOCAB)
    check_token_ids([0, VOCAB - 1], VOCAB)


class Batch:
    """As much of a ScheduleBatch as the making of its sampling tensors reads."""

    device = "cpu"

    def __init__(self, params: SamplingParams):
        tokenizer = SimpleNamespace(additional_stop_token_ids=None, eos_token_id=258)
        self.reqs = [
            SimpleNamespace(
                sampling_params=params, tokenizer=tokenizer, custom_logit_processor=None, return_sampling_mask=False
            )
        ]


@pytest.fixture
def sample(monkeypatch):
    """What the scheduler does with sampling parameters: SGLang's own tensors, penalties and bias, then a draw."""
    execution = SimpleNamespace(
        deterministic=SimpleNamespace(enable_deterministic_inference=True),
        features=SimpleNamespace(enable_custom_logit_processor=False),
    )
    monkeypatch.setattr(sampling_batch_info, "get_exec", lambda: execution)
    monkeypatch.setattr(sampling_batch_info, "get_server_args", lambda: None)

    def draw(params: SamplingParams) -> torch.Tensor:
        batch = Batch(params)
        info = SamplingBatchInfo.from_schedule_batch(batch, VOCAB)
        info.penalizer_orchestrator.cumulate_output_tokens(torch.tensor([5]))
        logits = torch.ones(1, VOCAB)
        info.apply_logits_bias(logits)
        return torch.multinomial(torch.softmax(logits / info.temperatures, -1), 1)

    return draw


@pytest.mark.parametrize(
    "sampling",
    [{}, {"top_k": 2**31 - 1}, {"temperature": 1e30, "min_new_tokens": 2}, {"repetition_penalty": 1e-6},
     {"min_new_tokens": 2, "stop_token_ids": [0, VOCAB - 1]}, {"logit_bias": {"5": 1e30, "6": -1e30}},
     {"sampling_seed": -(2**63)}],
)  # fmt: skip
def test_values_at_the_bounds_are_served(sampling, sample):
    message, given = request(**sampling)
    check_request(message, given, VOCAB, GPU)
    assert 0 <= int(sample(message.sampling_params)) < VOCAB


@pytest.mark.parametrize(
    ("named", "sampling"),
    [("top_k", {"top_k": 2**31}), ("min_new_tokens", {"min_new_tokens": 2**31, "max_new_tokens": None}),
     ("repetition_penalty", {"repetition_penalty": 1e-300}), ("sampling_seed", {"sampling_seed": 2**63}),
     ("temperature", {"temperature": 1e308, "min_new_tokens": 2}),
     ("stop_token_ids", {"min_new_tokens": 1, "stop_token_ids": [VOCAB + 1]}),
     ("stop_token_ids", {"min_new_tokens": 1, "stop_token_ids": [-1]}),
     ("stop_token_ids", {"min_new_tokens": 2, "stop_token_ids": list(range(VOCAB))}),
     ("logit_bias", {"logit_bias": {"5": math.nan}}), ("logit_bias", {"logit_bias": {"5": math.inf}}),
     ("logit_bias", {"logit_bias": {str(token): -math.inf for token in range(VOCAB)}}),
     ("logit_bias", {"logit_bias": {"5": 1e308}})],
)  # fmt: skip
def test_values_that_sampling_raises_on_are_refused_by_name(named, sampling, sample):
    message, given = request(**sampling)
    with pytest.raises((RuntimeError, ValueError)):
        sample(message.sampling_params)
    with pytest.raises(ConfigError, match=named):
        check_request(message, given, VOCAB, GPU)


@pytest.mark.parametrize("count", (-1, VOCAB + 1))
def test_more_log_probabilities_than_tokens_are_refused(count):
    with pytest.raises(ConfigError, match=f"top_logprobs_num .* got {count}:"):
        check_request(*request({"top_logprobs_num": count}), VOCAB, GPU)


@pytest.mark.parametrize("start", (-2, -(2**40), 2**40))
def test_log_probabilities_start_in_a_prompt(start):
    with pytest.raises(ConfigError, match=f"logprob_start_len .* got {start}:"):
        check_request(*request({"logprob_start_len": start}), VOCAB, GPU)


@pytest.mark.parametrize("name", ("regex", "ebnf", "json_schema", "structural_tag"))
def test_a_grammar_is_refused_where_xgrammar_has_no_kernel(name):
    """A mask that xgrammar's own class would apply to a CPU's logits raises in the scheduler."""
    with pytest.raises(RuntimeError, match="Unsupported device: cpu"):
        XGrammarGrammar.apply_vocab_mask(None, torch.zeros(1, VOCAB), torch.zeros(1, VOCAB // 32, dtype=torch.int32))
    message = request(**{name: "a"})
    with pytest.raises(ConfigError, match=f"{name} cannot be used on a CPU"):
        check_request(*message, VOCAB, CPU)
    check_request(*message, VOCAB, GPU)
    check_request(*message, VOCAB, SimpleNamespace(device="cpu", grammar_backend="llguidance"))
    check_request(*request(), VOCAB, CPU)


def test_a_client_cannot_skip_sglangs_own_checks(sample):
    """``is_normalized`` makes SamplingParams take a temperature of 0 as it is, and divide by it."""
    message, given = request(is_normalized=True, temperature=0)
    with pytest.raises(RuntimeError):
        sample(message.sampling_params)
    with pytest.raises(ConfigError, match="is_normalized"):
        check_request(message, given, VOCAB, GPU)
