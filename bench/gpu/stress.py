"""The stress run: answers that must be equal, and the soak, on servers that check their memory after every batch."""

from __future__ import annotations

import random
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any, Sequence

from bench.soak import Plan, soak
from bench.soak_check import Finished, comparable, first_difference, gaps_of
from tgvkv_sglang.demo.bundle import DEMO_MODEL
from tgvkv_sglang.demo.scenes import render
from tgvkv_sglang.testing.server import Server
from training.demo_model import probes

# Two best tokens closer than this may change places between a batch and a request alone: bfloat16 keeps 8 bits, and the
# stand-in model's logits reach 10 or so. In float32 (on the CPU) the bound is that of bench.soak_check.
TOSS_UP = {"bfloat16": 0.25, "float32": 1e-3}
PER_CLASS = 2  # of twelve classes
LONGEST_ANSWER = 48


@dataclass(frozen=True)
class Asked:
    """One question to the demo model: token ids of the answer, tokens from the cache, and whether it is right."""

    ids: tuple[int, ...]
    cached: int
    right: bool


def questions() -> list[tuple[probes.Probe, dict]]:
    """The demo model's held-out questions with their ``/generate`` arguments."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    asked = []
    for probe in probes.probes(per_class=PER_CLASS):
        messages = probes.chat_messages(probe, image_parts=[{"type": "image"} for _ in probe.scenes])
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        images = [render(scene) for scene in probe.scenes]
        asked.append((probe, {"text": text, "images": images, "max_new_tokens": LONGEST_ANSWER, "ignore_eos": False}))
    return asked


def answers(server: Server, asked: Sequence[tuple[probes.Probe, dict]], retention: float | None) -> list[Asked]:
    """All questions, one after the other, from an empty cache."""
    server.flush()
    out = []
    for probe, arguments in asked:
        answer = server.generate(**arguments, retention=retention)
        right = answer.text.split() == probe.question.answer_words
        out.append(Asked(tuple(answer.ids), answer.cached, right))
    return out


def equality(ours: Sequence[Asked], theirs: Sequence[Asked]) -> dict[str, Any]:
    """How many answers are equal token for token, and how many were served with as many cached tokens."""
    pairs = list(zip(ours, theirs, strict=True))
    return {
        "questions": len(pairs),
        "equal_answers": sum(a.ids == b.ids for a, b in pairs),
        "equal_cached_tokens": sum(a.cached == b.cached for a, b in pairs),
        "right": sum(a.right for a in ours),
        "right_other": sum(b.right for b in theirs),
        "first_different": next(
            ({"question": i, "ours": a.ids, "other": b.ids} for i, (a, b) in enumerate(pairs) if a.ids != b.ids), None
        ),
    }


def measure_equal(servers: dict[str, Server], name: str) -> dict[str, Any]:
    """At retention 1.0 the answers of stock SGLang; a second server of ours also answers as the first one does.

    Raises:
        KeyError: a server to compare with did not start.
    """
    asked = questions()
    ours, stock = servers[name], servers["demo-stock"]
    figures = {"retention 1 against stock": equality(answers(ours, asked, 1.0), answers(stock, asked, None))}
    below = answers(ours, asked, None)
    if name == "demo":
        figures["right at 0.1"] = sum(answer.right for answer in below)
    else:
        figures["retention 0.1 against selection by the scheduler"] = equality(
            below, answers(servers["demo"], asked, None)
        )
    failed = [key for key, value in figures.items() if isinstance(value, dict) and value["first_different"]]
    return {**figures, "failures": [f"{key}: answers differ" for key in failed]}


def compare_again(server: Server, finished: Sequence[Finished], deadline: float, toss_up: float) -> dict[str, Any]:
    """Ask the soak's comparable questions again, each alone on a flushed server, until ``deadline`` (monotonic).

    At retention 1.0 and without images a difference is a failure unless the two best tokens were within ``toss_up``.
    Below 1.0 it is only counted: in bfloat16 a batch may round two vision tokens at the border of the selection apart.
    """
    counts: Counter[str] = Counter()
    failures = []
    candidates = [done for done in finished if comparable(done)]
    random.Random(0).shuffle(candidates)
    for done in candidates:
        if time.monotonic() > deadline:
            break
        server.flush()
        reply = server.post("/generate", done.request.body(return_logprob=True, top_logprobs_num=2))
        reply.raise_for_status()
        fresh = reply.json()
        at = first_difference(done.ids, fresh["output_ids"])
        exact = not done.request.images or done.request.retention == 1.0
        kind = "whole KV" if exact else "selected"
        gaps = gaps_of(fresh["meta_info"]["output_top_logprobs"])
        if at is None:
            counts[f"{kind}: equal"] += 1
        elif at < len(gaps) and gaps[at] < toss_up:
            counts[f"{kind}: toss-up"] += 1
        else:
            counts[f"{kind}: different"] += 1
            if exact:
                failures.append(f"another answer than a fresh server's: {done} {fresh['output_ids']} {gaps}"[:600])
    return {"answers_compared": dict(sorted(counts.items())), "failures": failures}


def measure_soak(server: Server, seconds: float, dtype: str) -> dict[str, Any]:
    """Two thirds of the time the soak's traffic, the rest comparing its answers with a fresh server's."""
    deadline = time.monotonic() + seconds
    busy = 2 * seconds / 3
    outcome = soak(server, Plan(seconds=busy, flush_every=max(5.0, busy / 4), replays=0))
    again = compare_again(server, outcome.finished, deadline, TOSS_UP[dtype]) if server.alive() else {"failures": []}
    figures = outcome.as_dict()
    return {**figures, **again, "failures": [failure[:1000] for failure in outcome.failures] + again["failures"]}
