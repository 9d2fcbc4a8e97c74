"""Answers that must be equal: the bundled model at retention 1.0 and on stock SGLang; both ways of selecting."""

from __future__ import annotations

from typing import Any, Sequence

from tgvkv_sglang.demo.bundle import DEMO_MODEL
from tgvkv_sglang.demo.scenes import render
from tgvkv_sglang.testing.server import Answer, Server
from training.demo_model import probes

PER_CLASS = 2  # of twelve classes
LONGEST_ANSWER = 48


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


def answers(server: Server, asked: Sequence[tuple[probes.Probe, dict]], retention: float | None) -> list[Answer]:
    """All questions, one after the other, from an empty cache."""
    server.flush()
    return [server.generate(**arguments, retention=retention) for _, arguments in asked]


def right(asked: Sequence[tuple[probes.Probe, dict]], given: Sequence[Answer]) -> int:
    pairs = zip(asked, given, strict=True)
    return sum(answer.text.split() == probe.question.answer_words for (probe, _), answer in pairs)


def equality(ours: Sequence[Answer], theirs: Sequence[Answer]) -> dict[str, Any]:
    """How many answers are equal token for token, and how many were served with as many cached tokens."""
    pairs = list(zip(ours, theirs, strict=True))
    different = [{"question": i, "ours": a.ids, "other": b.ids} for i, (a, b) in enumerate(pairs) if a.ids != b.ids]
    return {
        "questions": len(pairs),
        "equal_answers": len(pairs) - len(different),
        "equal_cached_tokens": sum(a.cached == b.cached for a, b in pairs),
        "first_different": different[0] if different else None,
    }


def measure_equal(servers: dict[str, Server], name: str) -> dict[str, Any]:
    """At retention 1.0 the answers of stock SGLang; a second server of ours also answers as the first one does.

    Raises:
        KeyError: a server to compare with did not start.
    """
    asked = questions()
    ours, stock = servers[name], servers["demo-stock"]
    full, below = answers(ours, asked, 1.0), answers(ours, asked, None)
    compared = {"retention 1 against stock": equality(full, answers(stock, asked, None))}
    if name != "demo":
        other = answers(servers["demo"], asked, None)
        compared["retention 0.1 against selection by the scheduler"] = equality(below, other)
    failures = [f"{key}: answers differ" for key, value in compared.items() if value["first_different"]]
    counts = {"right at 1": right(asked, full), "right at 0.1": right(asked, below)}
    return {**compared, **counts, "failures": failures}
