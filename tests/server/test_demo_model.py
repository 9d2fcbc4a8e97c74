"""The bundled model in the real server: the same tokens as transformers at retention 1.0, and it still sees at 5 %."""

from __future__ import annotations

import pytest
import torch

from tests.oracle.oracle import load
from tests.server.compare import GAP
from tests.server.conftest import OURS, _serve
from tgvkv_sglang.demo.bundle import DEMO_MODEL
from tgvkv_sglang.demo.scenes import render
from training.demo_model import probes as P

PER_CLASS = 17  # of twelve classes: 204 questions
MAX_NEW = 64


@pytest.fixture(scope="module")
def demo_server(tmp_path_factory):
    yield from _serve(DEMO_MODEL, tmp_path_factory.mktemp("demo"), *OURS, "--tgvkv-retention", "1.0", tokens=30000)


@pytest.fixture(scope="module")
def reference():
    return load(DEMO_MODEL, dtype=torch.float32, image_backend="pil")


def job(reference, probe: P.Probe) -> dict:
    messages = P.chat_messages(probe, image_parts=[{"type": "image"} for _ in probe.scenes])
    text = reference.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    images = [render(scene) for scene in probe.scenes]
    return {"text": text, "images": images, "max_new_tokens": MAX_NEW, "ignore_eos": False}


def test_two_hundred_held_out_questions_equal_transformers(demo_server, reference):
    """Greedy, fp32. Where transformers' own two best logits are within GAP, what follows is not compared."""
    probes = list(P.probes(per_class=PER_CLASS))
    assert len(probes) >= 200 and len({probe.cls for probe in probes}) >= 6
    whole = 0
    for start in range(0, len(probes), 8):
        jobs = [job(reference, probe) for probe in probes[start : start + 8]]
        for one, answer in zip(jobs, demo_server.together(jobs), strict=True):
            ids = reference.tokenizer.encode(one["text"], add_special_tokens=False)
            prompt = reference.prepare_ids(ids, one["images"])
            turn = reference.greedy(prompt, MAX_NEW, stop_at_eos=True)
            sure = next((i for i, gap in enumerate(turn.gaps) if gap < GAP), None)
            assert answer.ids[:sure] == turn.token_ids[:sure]
            assert answer.meta["prompt_tokens"] == len(prompt.token_ids)
            whole += sure is None
    assert whole >= 190


def test_a_chat_at_five_per_cent_is_grounded_in_every_question(demo_server, reference):
    """Six-turn chats: with 5 % of the picture, most answers are those of the whole picture in every turn."""
    same, asked, cached = 0, 0, 0
    for seed in range(3):
        chat = P.chat(seed, turns=6)
        for turn in range(1, 7):
            one = job(reference, P.Probe(chat.cls, chat.scenes, chat.turns[:turn]))
            full = demo_server.generate(**one)
            few = demo_server.generate(**one, retention=0.05)
            same += full.text == few.text
            asked += 1
            cached += few.cached > 200
    assert cached >= 15, "follow-up turns find the picture in the cache"
    assert same >= 0.7 * asked
