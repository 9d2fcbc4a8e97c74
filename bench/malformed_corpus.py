"""Malformed and hostile requests, a pure function of a seed: wrong types everywhere, and hand-made traps by kind.

Every body asks for two tokens and names every token of the stand-in model as a stop token, so that whatever a server
makes of the rest, it is done soon. ``EXCLUDED`` lists what is never sent, and why.
"""

from __future__ import annotations

import base64
import copy
import json
import random
import struct
import zlib
from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Iterator

from tgvkv_sglang.demo.tiny_model import VOCAB_SIZE
from tgvkv_sglang.testing.images import make_image, png_bytes
from tgvkv_sglang.testing.prompts import IMAGE, chat

GENERATE, CHAT = "/generate", "/v1/chat/completions"
ESCAPE = "tgvkv-escaped"
"""Part of every name that a server could be talked into writing; no file of this name may ever appear."""
MARK = "\x1ftgvkv-retention="
NOWHERE = "127.0.0.1:1"
EXCLUDED = {
    "n above 8": "SGLang makes n copies of the request before any hook of ours sees it, and runs out of memory",
    "a device or pipe as image path": "SGLang reads a local path to its end; /dev/zero has none",
}
WRONG: tuple[Any, ...] = (
    None, True, -1, 0, 7, 1.5, -0.5, 2**31, 2**63, 2**64, 2**70, -(2**63), -(2**70), 1e308,
    float("nan"), float("inf"), float("-inf"),
    "", "x", "1", "\x00", "\ud800", MARK + "nan", f"../../{ESCAPE}", "<|image_pad|>",
    [], [None], [[]], [1, 2], ["a", "b"], [float("nan")], {}, {"a": {"b": [1]}}, {"1": float("nan")},
)  # fmt: skip


@dataclass(frozen=True)
class Malformed:
    """One request: ``kind`` groups it, ``name`` says what is wrong with it, ``body`` is sent as it is."""

    kind: str
    name: str
    endpoint: str
    body: bytes


# -- pictures --------------------------------------------------------------------------------------------------------


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bilevel_png(width: int, height: int, rows: int) -> bytes:
    """A PNG that declares ``width x height`` pixels of one bit and holds the first ``rows`` rows."""
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    pixels = zlib.compress(bytes((1 + -(-width // 8)) * rows))
    parts = (_chunk(b"IHDR", header), _chunk(b"IDAT", pixels), _chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def url_of(data: bytes, media: str = "image/png") -> str:
    return f"data:{media};base64,{base64.b64encode(data).decode()}"


@lru_cache(maxsize=None)
def pictures() -> dict[str, str]:
    """What stands where an image should, by name."""
    good = png_bytes(make_image(0, 128, 96))
    return {
        "half a PNG": url_of(good[: len(good) // 2]),
        "a PNG without its last chunk": url_of(good[:-12]),
        "a PNG with a flipped bit": url_of(good[:200] + bytes([good[200] ^ 1]) + good[201:]),
        "a PNG that declares 60000 x 60000": url_of(bilevel_png(60000, 60000, 1)),
        "a PNG that declares 8000 x 8000": url_of(bilevel_png(8000, 8000, 1)),
        "a PNG of 4000 x 4000 zeros": url_of(bilevel_png(4000, 4000, 4000)),
        "a PNG of 0 x 0": url_of(bilevel_png(0, 0, 0)),
        "a picture of 1 x 1": url_of(bilevel_png(1, 1, 1)),
        "a picture of 1 x 4000": url_of(bilevel_png(1, 4000, 4000)),
        "no bytes": url_of(b""),
        "text called a PNG": url_of(b"Hello"),
        "a data URL of text": url_of(b"Hello", "text/html"),
        "an SVG": url_of(b'<svg xmlns="http://www.w3.org/2000/svg"/>', "image/svg+xml"),
        "a data URL without data": "data:image/png;base64",
        "a data URL of bad base64": "data:image/png;base64,!!!",
        "a closed port": f"http://{NOWHERE}/a.png",
        "a closed TLS port": f"https://{NOWHERE}/a.png",
        "a URL without a host": "http://",
        "a file URL to nowhere": f"file:///nowhere/{ESCAPE}.png",
        "a path to nowhere": f"/nowhere/{ESCAPE}.png",
        "a directory": "file:///",
        "another scheme": "gopher://127.0.0.1:1/a.png",
        "an empty string": "",
        "control characters": "\x00\x1f\x7f",
    }


# -- bodies ----------------------------------------------------------------------------------------------------------


def generate_body(text: str = "Hello", **fields: Any) -> dict:
    params = {"temperature": 0, "max_new_tokens": 2, "stop_token_ids": list(range(VOCAB_SIZE))}
    return {"text": chat(text), "sampling_params": params, **fields}


def chat_body(content: Any = "Hello", **fields: Any) -> dict:
    body = {"model": "m", "messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 2}
    return {**body, "stop_token_ids": list(range(VOCAB_SIZE)), **fields}


def full_generate() -> dict:
    """A valid body that names every field a client has a use for."""
    body = generate_body(IMAGE + "What?", image_data=[pictures()["a picture of 1 x 1"]])
    body["sampling_params"] |= {
        "min_new_tokens": 0, "n": 1, "top_p": 1.0, "top_k": 1, "min_p": 0.0, "frequency_penalty": 0.0,
        "presence_penalty": 0.0, "repetition_penalty": 1.0, "stop": ["a"], "stop_regex": "a", "json_schema": None,
        "regex": None, "ebnf": None, "structural_tag": None, "ignore_eos": False, "skip_special_tokens": True,
        "spaces_between_special_tokens": True, "no_stop_trim": False, "stream_interval": 1, "logit_bias": {"5": 0.5},
        "sampling_seed": 1, "custom_params": {"tgvkv_retention": 0.5, "tgvkv_trace": False, "other": 1},
    }  # fmt: skip
    return body | {
        "rid": "r", "extra_key": "k", "session_id": None, "session_params": None, "input_ids": None,
        "input_embeds": None, "video_data": None, "audio_data": None, "mm_hashes": None, "return_logprob": True,
        "logprob_start_len": -1, "top_logprobs_num": 1, "token_ids_logprob": [1], "return_sampling_mask": False,
        "return_text_in_logprobs": False, "stream": False, "return_hidden_states": False, "modalities": None,
        "return_routed_experts": False, "routed_experts_start_len": 0, "lora_path": None, "lora_id": None,
        "custom_logit_processor": None, "positional_embed_overrides": None, "bootstrap_host": None,
        "bootstrap_port": None, "bootstrap_room": None, "routed_dp_rank": None, "disagg_prefill_dp_rank": None,
        "routing_key": None, "conversation_id": None, "background": False, "require_reasoning": False,
        "max_thinking_tokens": None, "priority": None, "no_logs": False, "custom_labels": None, "return_entropy": False,
        "return_prompt_token_ids": False, "need_wait_for_mm_inputs": None, "num_items_assigned": None,
        "max_dynamic_patch": None, "images_config": None, "multi_item_delimiter_indices": None,
    }  # fmt: skip


def full_chat() -> dict:
    parts = [{"type": "text", "text": "What?"}, _image_part(pictures()["a picture of 1 x 1"])]
    return chat_body(parts) | {
        "frequency_penalty": 0.0, "presence_penalty": 0.0, "repetition_penalty": 1.0, "logit_bias": {"5": 0.5},
        "logprobs": True, "top_logprobs": 1, "max_completion_tokens": None, "n": 1, "response_format": None, "seed": 1,
        "stop": ["a"], "stream": False, "stream_options": None, "top_p": 1.0, "user": "u", "tools": None,
        "tool_choice": "none", "return_hidden_states": False, "reasoning_effort": None, "top_k": 1, "min_p": 0.0,
        "min_tokens": 0, "regex": None, "ebnf": None, "stop_regex": "a", "no_stop_trim": False, "ignore_eos": False,
        "continue_final_message": False, "skip_special_tokens": True, "lora_path": None, "session_id": None,
        "session_params": None, "separate_reasoning": True, "chat_template_kwargs": {"a": 1}, "images_config": None,
        "custom_logit_processor": None, "custom_params": {"tgvkv_retention": 0.5, "tgvkv_trace": False},
        "input_ids": None, "rid": "r", "extra_key": "k", "cache_salt": "s", "priority": None, "bootstrap_host": None,
        "bootstrap_port": None, "bootstrap_room": None, "routed_dp_rank": None, "data_parallel_rank": None,
    }  # fmt: skip


def _image_part(url: Any) -> dict:
    return {"type": "image_url", "image_url": {"url": url}}


def _sampling(**params: Any) -> dict:
    body = generate_body()
    body["sampling_params"] |= params
    return body


# -- wrong types -----------------------------------------------------------------------------------------------------


def paths_of(value: Any, before: tuple = ()) -> Iterator[tuple]:
    """Every place in a JSON value that can be replaced, outer ones first; of a long list only the first."""
    if before:
        yield before
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from paths_of(inner, (*before, key))
    elif isinstance(value, list) and value:
        for index in range(1 if len(value) > 2 else len(value)):
            yield from paths_of(value[index], (*before, index))


def replaced(body: dict, path: tuple, value: Any) -> dict:
    body = copy.deepcopy(body)
    inner = body
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return body


def _excluded(path: tuple, value: Any) -> bool:
    return path[-1] == "n" and isinstance(value, int) and value > 8


def _wrong_types(rng: random.Random, per_field: int) -> Iterator[tuple[str, str, str, Any]]:
    for endpoint, body in ((GENERATE, full_generate()), (CHAT, full_chat())):
        for path in paths_of(body):
            values = [value for value in WRONG if not _excluded(path, value)]
            for value in rng.sample(values, min(per_field, len(values))):
                where = ".".join(map(str, path))
                yield "wrong type", f"{where} = {value!r}", endpoint, replaced(body, path, value)


# -- hand-made -------------------------------------------------------------------------------------------------------


def _raw() -> Iterator[tuple[str, str, str, Any]]:
    for endpoint, body in ((GENERATE, generate_body()), (CHAT, chat_body())):
        whole = json.dumps(body).encode()
        bodies = {
            "nothing": b"", "null": b"null", "a list": b"[]", "a string": b'"x"', "a number": b"1", "NaN": b"NaN",
            "truncated": whole[:-5], "cut in a string": whole[:20], "twice": whole + whole, "invalid UTF-8":
            whole.replace(b"Hello", b"\xff\xfe\x80"), "a byte-order mark": b"\xef\xbb\xbf" + whole, "UTF-16":
            json.dumps(body).encode("utf-16"), "binary": bytes(range(256)), "single quotes": whole.replace(b'"', b"'"),
            "deep lists": b"[" * 20000 + b"]" * 20000, "deep objects": b'{"text":' * 5000 + b"1" + b"}" * 5000,
            "a number of 5000 digits": whole[:-1] + b', "priority": ' + b"9" * 5000 + b"}",
            "a key twice": whole[:-1] + b', "model": 1, "text": 1}',
        }  # fmt: skip
        for name, raw in bodies.items():
            yield "raw JSON", name, endpoint, raw


def _pictures() -> Iterator[tuple[str, str, str, Any]]:
    for name, url in pictures().items():
        yield "picture", name, GENERATE, generate_body(IMAGE + "What?", image_data=[url])
        yield "picture", name, CHAT, chat_body([_image_part(url), {"type": "text", "text": "What?"}])
    good = pictures()["a picture of 1 x 1"]
    for count in (0, 2, 5):
        for given in (0, 1, 3):
            body = generate_body(IMAGE * count + "What?", image_data=[good] * given)
            yield "picture count", f"{count} markers, {given} pictures", GENERATE, body
    many = chat_body([_image_part("data:image/png;base64,!!!")] * 2000)
    yield "picture count", "2000 broken parts", CHAT, many
    yield "picture count", "2000 broken pictures", GENERATE, generate_body("a", image_data=["!!!"] * 2000)
    yield "picture count", "100 small parts", CHAT, chat_body([_image_part(good)] * 100)
    for kind in ("video_url", "audio_url", "input_image", "image", "file"):
        yield "picture count", f"a part of type {kind}", CHAT, chat_body([{"type": kind, kind: {"url": good}}])
    for field in ("video_data", "audio_data"):
        yield "picture count", field, GENERATE, generate_body("a", **{field: [good]})
    for name, value in (("nested", [[[good]]]), ("mixed", [good, None]), ("objects", [{"format": "x"}]),
                        ("embedding", [{"format": "precomputed_embedding", "feature": [[1.0]]}]),
                        ("processed", [{"format": "processor_output", "pixel_values": [1]}])):  # fmt: skip
        yield "picture count", name, GENERATE, generate_body(IMAGE, image_data=value)


def _texts() -> Iterator[tuple[str, str, str, Any]]:
    marks = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|im_start|>", "<|endoftext|>")
    texts = [mark * count for mark in marks for count in (1, 50)]
    texts += ["<|vision_end|>" + IMAGE + "<|vision_start|>", "\x00", "\x1f\x7f", "\ud800", "\u202e\U0010ffff", " ", ""]
    for text in texts:
        yield "text", repr(text)[:40], GENERATE, {**generate_body(), "text": text}
        yield "text", repr(text)[:40], CHAT, chat_body(text)
    good = pictures()["a picture of 1 x 1"]
    for text in texts[::2]:
        yield "text", f"{text[:30]!r} and a picture", GENERATE, {**generate_body(image_data=[good]), "text": text}
    for name, text in (("no texts", []), ("an empty one", [""]), ("a batch", ["a"] * 3), ("mixed", ["a", 1, None])):
        yield "text", name, GENERATE, {**generate_body(), "text": text}
    yield "text", "too long", GENERATE, generate_body("a" * 10000)
    yield "text", "too long", CHAT, chat_body("a" * 10000)


def _token_ids() -> Iterator[tuple[str, str, str, Any]]:
    lists = [
        [], [-1], [5, -1, 5], [-(2**63)], [VOCAB_SIZE], [VOCAB_SIZE - 1], [2**31], [2**62], [2**63], [[-1]],
        [[5], [-1]], [[5], [VOCAB_SIZE]], [[]], [[], [5]], [[[5]]], [1.5], [True], ["a"], [None], [5] * 5000,
        [261], [261] * 9, [260],
    ]  # fmt: skip
    good = pictures()["a picture of 1 x 1"]
    for ids in lists:
        name = repr(ids)[:40]
        body = {key: value for key, value in generate_body().items() if key != "text"}
        yield "token ids", name, GENERATE, {**body, "input_ids": ids}
        yield "token ids", f"{name}, streamed", GENERATE, {**body, "input_ids": ids, "stream": True}
        yield "token ids", name, CHAT, chat_body(input_ids=ids)
    for ids in lists[:12]:
        yield "token ids", f"{ids!r} and a picture", GENERATE, {**body, "input_ids": ids, "image_data": [good]}
    yield "token ids", "and text", GENERATE, generate_body(input_ids=[-1])
    yield "token ids", "four samples", GENERATE, {**_sampling(n=4), "text": None, "input_ids": [5, -1]}
    yield "token ids", "embeddings", GENERATE, {**body, "input_embeds": [[0.5] * 64]}


def _custom_params() -> Iterator[tuple[str, str, str, Any]]:
    deep: Any = 1
    for _ in range(50):
        deep = {"a": [deep]}
    values = [1, "x", [], [1], {}, {"a": deep}, {"a": {"b": {"c": 1}}}, {"a": [[1]]}, {"": 1},
              {"a" * 10000: 1}, {"__req__": 1}, {"__req__": {"a": 1}}, {"thinking_budget": -1}, {"\x00": "\x00"},
              {"a": 2**70}]  # fmt: skip
    values += [{"tgvkv_retention": wrong} for wrong in (0, -1, 2, "0.5", True, [], {}, 1e-320, 2**70, float("nan"))]
    values += [{"tgvkv_retention": 5e-324}, {"tgvkv_retention": float("inf")}, {"tgvkv_retention": None}]
    values += [{"tgvkv_trace": wrong} for wrong in (0, 1, "yes", None, [], {})]
    values += [{"tgvkv_": 1}, {"tgvkv_rid": "../x"}, {"tgvkv_scope": "total"}, {"TGVKV_RETENTION": 0.1}]
    good = pictures()["half a PNG"]
    for value in values:
        name = repr(value)[:60]
        yield "custom params", name, GENERATE, _sampling(custom_params=value)
        yield "custom params", name, CHAT, chat_body(custom_params=value)
    for value in values[15:]:
        body = _sampling(custom_params=value) | {"image_data": [good], "text": IMAGE}
        yield "picture", f"broken, and {repr(value)[:50]}", GENERATE, body


def _sampling_params() -> Iterator[tuple[str, str, str, Any]]:
    wrong: dict[str, tuple] = {
        "temperature": (-1, 1e-9, 1e30, 1e308, float("nan")), "top_p": (0, -1, 2, float("nan"), 1e-300),
        "min_p": (-1, 2), "top_k": (-2, 0, 2**31 - 1, 2**31, 2**40), "frequency_penalty": (3, float("nan")),
        "presence_penalty": (-3,), "repetition_penalty": (0, -1, 3, 1e-300),
        "max_new_tokens": (0, -1, 10**6, 2**31, 2**63, 1.5, float("inf")),
        "min_new_tokens": (-1, 3, 2**40), "n": (0, -1, 2, 8, 1.5, "2"), "stop": ("", [""], ["\x00"], [1], ["a"] * 500),
        "stop_token_ids": ([-1], [2**40], [1.5], ["a"], [None], 7), "stop_regex": ("(", "a{99999}", "(a*)*b", [""]),
        "regex": ("(", "a*", "\x00"), "ebnf": ("x", "root ::= root"), "json_schema": ("{", "{}", '{"type": "x"}'),
        "structural_tag": ("{", "{}"), "logit_bias": ({"-1": 1}, {"x": 1}, {"99999": 1}, {"5": float("nan")},
        {"5": float("inf")}, {"5": -1e308}, []), "stream_interval": (0, -1, 2**40),
        "sampling_seed": (-1, 2**63, -(2**63)), "no_such_parameter": (1,), "stop_strs": (["a"],),
        "is_normalized": (True,), "stop_str_max_len": (-1, 2**40),
    }  # fmt: skip
    for name, values in wrong.items():
        for value in values:
            yield "sampling", f"{name} = {value!r}"[:60], GENERATE, _sampling(**{name: value})
            hot = _sampling(**{"temperature": 1.0, "min_new_tokens": int(name == "stop_token_ids"), name: value})
            hot["stream"] = True
            yield "sampling", f"{name} = {value!r}, sampled and streamed"[:80], GENERATE, hot
    for name in ("temperature", "top_p", "top_k", "max_tokens", "min_tokens", "n", "logit_bias", "stop_token_ids"):
        for value in wrong.get(name.replace("_tokens", "_new_tokens"), ()):
            yield "sampling", f"{name} = {value!r}"[:60], CHAT, chat_body(**{name: value})
    yield "sampling", "0 K, called normalized", GENERATE, _sampling(is_normalized=True, top_k=1 << 30)
    yield "sampling", "every token a stop token, and not yet", GENERATE, _sampling(min_new_tokens=1, temperature=1)
    yield "sampling", "two grammars", GENERATE, _sampling(regex="a", ebnf='root ::= "a"')
    yield "sampling", "a list", GENERATE, {**generate_body(), "sampling_params": [{}, {}]}


def _fields() -> Iterator[tuple[str, str, str, Any]]:
    """Fields beyond sampling: identity, namespaces, log-probabilities, sessions, adapters."""
    wrong: dict[str, tuple] = {
        "rid": (f"../../{ESCAPE}", f"/tmp/{ESCAPE}", "\x00", "", "a" * 5000, "a/b/../c", [], ["a", "a"], ["a", 1], 5,
                "\ud800", "con\n\x1b[2J", "r", "r"),
        "extra_key": (MARK + "nan", MARK + "1.0", MARK + "0.5", MARK, MARK + "x", "x" + MARK + "1e999", "\x1f",
                      "\x00", "", "a" * 10000, "\ud800", [], ["a"], 5),
        "session_params": ({}, {"id": "no such"}, {"id": 5}, {"x": 1}, {"id": None, "rid": f"../{ESCAPE}"}),
        "session_id": ("s", "", "\x00"), "lora_path": (f"/nowhere/{ESCAPE}", "", ["a"], [None], "\x00"),
        "lora_id": ("x",), "http_worker_ipc": (f"ipc:///tmp/{ESCAPE}", "x"), "priority": (-1, 2**40),
        "custom_logit_processor": ("x", ""), "routed_dp_rank": (-1, 5), "max_thinking_tokens": (-1, 5),
        "return_hidden_states": (True, "last", "full"), "bootstrap_room": (5,), "bootstrap_host": ("127.0.0.1",),
    }  # fmt: skip
    for name, values in wrong.items():
        for number, value in enumerate(values):
            yield name, f"{value!r}, {number}"[:60], GENERATE, generate_body(**{name: value})
            yield name, f"{value!r}, {number}"[:60], CHAT, chat_body(**{name: value})
    for value in wrong["extra_key"]:
        yield "extra_key", f"cache_salt {value!r}"[:60], CHAT, chat_body(cache_salt=value)
    logprobs: dict[str, tuple] = {
        "logprob_start_len": (-2, -(2**40), 0, 5, 100, 2**40, 2**63),
        "token_ids_logprob": ([-1], [VOCAB_SIZE], [[5]], 5),
        "top_logprobs_num": (-1, VOCAB_SIZE, VOCAB_SIZE + 1, 10**6, 2**40),
    }  # fmt: skip
    for name, values in logprobs.items():
        for value in values:
            asked = {"return_logprob": True, name: value}
            yield "log-probabilities", f"{name} = {value!r}", GENERATE, generate_body(**asked)
            asked = {"logprob_start_len": 0, "top_logprobs_num": 2, **asked}
            yield "log-probabilities", f"{name} = {value!r}, of the prompt", GENERATE, generate_body(**asked)
    for value in (-1, 0, 25, VOCAB_SIZE + 1, 2**40):
        yield "log-probabilities", f"top_logprobs = {value}", CHAT, chat_body(logprobs=True, top_logprobs=value)


def _messages() -> Iterator[tuple[str, str, str, Any]]:
    hello = {"role": "user", "content": "Hello"}
    lists = [
        [], [{}], [None], [[]], "Hello", {"role": "user"}, [{"role": "user"}], [{"content": "x"}],
        [{"role": "nobody", "content": "x"}], [{"role": "", "content": ""}], [{"role": "user", "content": None}],
        [{"role": "assistant", "content": "x"}], [{"role": "system", "content": []}], [hello] * 300,
        [{"role": "user", "content": [{}]}], [{"role": "user", "content": [{"type": "text"}]}],
        [{"role": "user", "content": [{"type": "image_url"}]}], [{"role": "tool", "content": "x", "tool_call_id": 5}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": None}}]}],
        [{"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "x", "arguments": "{"}}]}, hello],
    ]  # fmt: skip
    for number, messages in enumerate(lists):
        yield "messages", f"{number}: {messages!r}"[:70], CHAT, {**chat_body(), "messages": messages}
    tools = ([{}], [{"type": "function"}], [{"type": "function", "function": {"name": "", "parameters": "x"}}])
    for tool in tools:
        yield "messages", f"tools {tool!r}"[:70], CHAT, chat_body(tools=tool, tool_choice="required")


def corpus(seed: int = 0, *, per_field: int = 5, per_kind: int | None = None) -> list[Malformed]:
    """The requests, in a seeded order.

    Args:
        per_field: wrong values that each field of a valid body is replaced by.
        per_kind: keep at most this many of each kind (a short profile); None keeps all.
    """
    rng = random.Random(seed)
    sources = (_raw, _pictures, _texts, _token_ids, _custom_params, _sampling_params, _fields, _messages)
    groups: dict[str, list[Malformed]] = defaultdict(list)
    for kind, name, endpoint, body in (*_wrong_types(rng, per_field), *(one for source in sources for one in source())):
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        groups[kind].append(Malformed(kind, f"{endpoint} {kind}: {name}", endpoint, raw))
    chosen = [one for group in groups.values() for one in rng.sample(group, min(per_kind or len(group), len(group)))]
    rng.shuffle(chosen)
    return chosen
