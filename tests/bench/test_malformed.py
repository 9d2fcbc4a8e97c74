"""The corpus of malformed requests, and what the comparison with stock SGLang calls worse."""

from __future__ import annotations

import base64
import io
import json
import re
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from bench.malformed import CUT, DROPPED, HUNG, Reply, one_of_each, worse, written
from bench.malformed_corpus import (
    CHAT,
    ESCAPE,
    GENERATE,
    Malformed,
    bilevel_png,
    corpus,
    full_chat,
    full_generate,
    paths_of,
    pictures,
    replaced,
)
from tgvkv_sglang.testing.server import Server


def test_the_corpus_is_its_seed():
    assert corpus(3, per_field=2) == corpus(3, per_field=2)
    assert corpus(3, per_field=2) != corpus(4, per_field=2)


def test_the_corpus_is_large_and_every_name_is_one_request():
    made = corpus()
    assert len(made) >= 500
    assert len({one.name for one in made}) == len(made)
    assert min(Counter(one.endpoint for one in made).values()) >= 200
    assert max(len(one.body) for one in made) < 200_000


def test_every_field_of_a_valid_body_is_replaced():
    made = corpus(per_field=1)
    for endpoint, body in ((GENERATE, full_generate()), (CHAT, full_chat())):
        names = {one.name for one in made if one.endpoint == endpoint and one.kind == "wrong type"}
        for path in paths_of(body):
            where = ".".join(map(str, path))
            assert any(name.startswith(f"{endpoint} wrong type: {where} = ") for name in names), where


def test_a_short_profile_has_every_kind():
    short = corpus(per_field=1, per_kind=4)
    assert {one.kind for one in short} == {one.kind for one in corpus()}
    assert max(Counter(one.kind for one in short).values()) == 4 and 60 <= len(short) <= 100


def test_what_is_excluded_is_never_sent():
    for one in corpus(per_field=50):
        assert b"/dev/" not in one.body
        assert not re.search(rb'"n": (\d{2,}|9)\b', one.body), one.name


def test_no_request_names_another_machine():
    for one in corpus(per_field=50):
        for host in re.findall(rb'(?:https?|gopher)://([^/"]*)', one.body):
            assert host in (b"", b"127.0.0.1:1", b"www.w3.org"), one.name  # the last is SVG's name space


def test_replacing_leaves_the_rest_and_the_original():
    body = {"a": [{"b": 1}, 2], "c": 3}
    assert replaced(body, ("a", 0, "b"), None) == {"a": [{"b": None}, 2], "c": 3}
    assert body == {"a": [{"b": 1}, 2], "c": 3}
    assert list(paths_of(body)) == [("a",), ("a", 0), ("a", 0, "b"), ("a", 1), ("c",)]


def test_the_full_bodies_are_valid_json_with_a_picture():
    for body in (full_generate(), full_chat()):
        assert json.loads(json.dumps(body)) == body and "data:image/png;base64," in json.dumps(body)


def test_pictures_are_what_they_are_called():
    with Image.open(io.BytesIO(bilevel_png(5, 3, 3))) as image:
        image.load()
        assert image.size == (5, 3)
    for name in ("half a PNG", "a PNG of 0 x 0", "a PNG that declares 60000 x 60000", "text called a PNG", "no bytes"):
        with pytest.raises((OSError, ValueError, SyntaxError, Image.DecompressionBombError)):
            Image.open(io.BytesIO(base64.b64decode(pictures()[name].split(",")[1]))).load()


REQUEST = Malformed("kind", "name", GENERATE, b"")


@pytest.mark.parametrize(
    "our, stock, bad",
    [
        (200, 200, False),
        (400, 200, False),  # refused by us alone: somebody's request, but nobody else's
        (200, 400, False),
        (500, 500, False),
        (500, 200, True),
        (500, 400, True),
        (500, DROPPED, False),
        (DROPPED, DROPPED, True),  # what ends stock must not end ours
        (HUNG, HUNG, True),
        (DROPPED, 500, True),
        (400, None, False),
        (500, None, True),
        (CUT, 500, False),
        (CUT, CUT, False),
        (CUT, 400, True),
    ],
)
def test_worse(our, stock, bad):
    found = worse(REQUEST, Reply(our), None if stock is None else Reply(stock))
    assert (found is not None) is bad
    assert not bad or REQUEST.name in found


def test_one_of_each_guard():
    texts = [f"{name} cannot be {value}: it would end the server" for name in ("n", "top_p") for value in range(3)]
    texts.append("logit_bias['5'] must be in [-1, 1], got nan: it would end the server")
    made = [Malformed("kind", str(number), GENERATE, b"") for number in range(len(texts))]
    replies = {one.name: Reply(400, text) for one, text in zip(made, texts, strict=True)}
    assert all(reply.guarded for reply in replies.values()) and not Reply(400, "no").guarded
    chosen = one_of_each(made, replies, ["logit_bias", "top_p", "top_k"])
    assert [one.name for one in chosen] == ["6", "3"]


def test_files_outside_the_traces_are_found(tmp_path, monkeypatch):
    for name in ("model/tiny", "run/traces", "cwd"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "cwd")
    server = Server("http://127.0.0.1:1", tmp_path / "run" / "server.log", tmp_path / "run" / "traces")
    before = written(server, tmp_path / "model" / "tiny")

    def appeared(*names: str) -> set[Path]:
        for name in names:
            (tmp_path / name).write_text("")
        return written(server, tmp_path / "model" / "tiny") - before

    assert appeared("run/server.log", "run/traces/a.0.npz", "cwd/other") == set()
    outside = ("run/b.npz", "model/c", "model/tiny/d", f"cwd/{ESCAPE}.0.npz")
    assert appeared(*outside) == {tmp_path / name for name in outside}
