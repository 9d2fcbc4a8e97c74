"""What must be right before anything is timed: the bundled model on ours and on stock SGLang, in half a minute."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, Sequence

from bench.resident import count_resident
from tgvkv_sglang.demo.bundle import DEMO_MODEL
from tgvkv_sglang.demo.scenes import render
from tgvkv_sglang.testing.log_text import decode_steps
from tgvkv_sglang.testing.server import Answer, Server
from training.demo_model import probes

PER_CLASS = 2  # of twelve classes
LONGEST_ANSWER = 48
CONVERSATIONS, SIDE = 16, 512  # more tokens than the pool has slots


class SmokeError(RuntimeError):
    """Something is wrong that makes every speed worthless."""


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


def wrong(full: Sequence[Answer], stock: Sequence[Answer], below: Sequence[Answer]) -> list[str]:
    """What is wrong with the answers at retention 1.0, of stock SGLang, and at 10 %."""
    failures = []
    pairs = enumerate(zip(full, stock, strict=True))
    if different := [(i, a.ids, b.ids) for i, (a, b) in pairs if (a.ids, a.cached) != (b.ids, b.cached)]:
        failures.append(
            f"retention 1.0: {len(different)} of {len(full)} answers or their cached tokens are not stock "
            f"SGLang's; the first, question {different[0][0]}: {different[0][1]} and {different[0][2]}"
        )
    if empty := [i for i, answer in enumerate(below) if not answer.text.split()]:
        failures.append(f"retention 0.1: no words in the answers to questions {empty}")
    return failures  # fmt: skip


def triton_cache(directory: Path, began: float) -> tuple[Counter, Counter]:
    """Names of the kernels in Triton's cache from before ``began`` (seconds since the epoch), and of those since."""
    there, new = Counter(), Counter()
    for path in directory.glob("*/*.json"):
        if not path.name.startswith("__grp__"):
            (new if path.stat().st_mtime >= began else there)[path.stem] += 1
    return there, new


def measure_smoke(ours: Server, stock: Server, graphs: bool) -> dict[str, Any]:
    """Answers, a reclaim and a decode step with views in a CUDA graph.

    Args:
        graphs: whether decode should run in CUDA graphs here.

    Raises:
        SmokeError: something is wrong, with all that is.
    """
    asked = questions()
    full, expected = answers(ours, asked, 1.0), answers(stock, asked, None)
    before = len(ours.log_text())
    below = answers(ours, asked, None)
    steps = decode_steps(ours.log_text()[before:])  # all of them decode through views
    failures = wrong(full, expected, below)
    in_graphs = sum(step.graph for step in steps)
    if graphs and not in_graphs:
        failures.append(f"none of {len(steps)} decode steps with views is logged with 'cuda graph: True'")
    resident, length, _ = count_resident(ours, CONVERSATIONS, SIDE, None, "youngest", lambda: None)
    if resident * length <= ours.tokens:
        failures.append(f"no reclaim: {resident} of {CONVERSATIONS} chats of {length} tokens were served from the "
                        f"cache, which fit the pool of {ours.tokens} slots in full")  # fmt: skip
    if failures:
        raise SmokeError("; ".join(failures))
    counts = {"right at 1": right(asked, full), "right at 0.1": right(asked, below), "questions": len(asked)}
    graph_share = round(in_graphs / len(steps), 4) if steps else None
    return {**counts, "cuda_graph_share": graph_share, "resident": resident, "resident_tokens": resident * length}
