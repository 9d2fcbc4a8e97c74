"""Which answers of the soak must equal a fresh server's, and whether they do.

A chat's answer may depend on what the server still held when it was asked, by design (docs/design.md, "Rules"):
a follow-up attends to the whole image while it is there and to the view of it afterwards (rules 1 and 3); the very
same question asked again goes on with the view its first asking made (rule 5), and computes its last prompt token
through it if the image is gone; a question after two cached images is grounded in the new text alone; a retracted
request that was pushed out of the cache is grounded afresh. None of these is an error, and none can be compared
exactly. What is left, and must be identical whatever happened around it:

* text-only requests, and every turn at retention 1.0: stock SGLang's arithmetic, cached or not;
* first turns below 1.0 of which at most the first image (and what precedes it) came from the cache, and which were
  not retracted: a span is then attended to and scored in full by the whole question, whether its KV was cached in
  full or has just been computed (a span of which only somebody else's view is left is never matched).
"""

from __future__ import annotations

import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Sequence

from tqdm import tqdm

from bench.soak_traffic import Request
from tgvkv_sglang.testing.server import Server


@dataclass(frozen=True)
class Tolerance:
    """What a batch and a single request may differ in.

    Attributes:
        toss_up: a greedy choice whose two best logprobs are closer may go either way.
        same_selection: whether the same vision tokens must be kept. A rounding may decide between two at the border.
    """

    toss_up: float
    same_selection: bool


# Sums differ by some 1e-5 in float32. bfloat16 keeps 8 bits, and the stand-in model's logits reach 10 or so.
TOLERANCES = {"float32": Tolerance(1e-3, True), "bfloat16": Tolerance(0.25, False)}


@dataclass(frozen=True)
class Finished:
    """A request that ran to its end: token ids, tokens from the cache, and times it was retracted."""

    request: Request
    ids: tuple[int, ...]
    cached: int
    retractions: int


def comparable(done: Finished) -> bool:
    """See the module docstring."""
    request = done.request
    if not request.images or request.retention == 1.0:
        return True
    return request.turn == 0 and done.retractions == 0 and done.cached <= request.first_image_end


def gaps_of(top_logprobs: Sequence[Sequence[Sequence]]) -> list[float]:
    """Distance between the best and the second best logprob of each generated token (``output_top_logprobs``)."""
    return [rows[0][0] - rows[1][0] for rows in top_logprobs]


def first_difference(ids: Sequence[int], fresh: Sequence[int]) -> int | None:
    """Index of the first token that differs (or is missing in one of them); None when they are equal."""
    if tuple(ids) == tuple(fresh):
        return None
    pairs = zip(ids, fresh)  # noqa: B905 - the shorter one decides, below
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ids), len(fresh)))


def verdict(ids: Sequence[int], fresh: Sequence[int], gaps: Sequence[float], toss_up: float) -> str:
    """``equal``, ``toss-up`` (they part where the fresh answer's choice was open) or ``different``."""
    at = first_difference(ids, fresh)
    if at is None:
        return "equal"
    return "toss-up" if at < len(gaps) and gaps[at] < toss_up else "different"


@dataclass
class Replay:
    """What asking again showed: verdicts, what must not be, how many could be asked, and how many answers differed from
    each other (were they all alike, their equality would mean nothing)."""

    candidates: int = 0
    verdicts: Counter = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    different_answers: int = 0


def replay(server: Server, finished: Sequence[Finished], tolerance: Tolerance, seed: int = 0, most: int | None = None,
           seconds: float | None = None) -> Replay:  # fmt: skip
    """Ask comparable requests again, in random order, each alone on a flushed server.

    Args:
        most: no more than so many. seconds: no new one after so many.
    """
    candidates = [done for done in finished if comparable(done)]
    sample = random.Random(seed).sample(candidates, min(len(candidates), len(candidates) if most is None else most))
    found, answers = Replay(len(candidates)), set()
    began = time.monotonic()
    for done in tqdm(sample, desc="comparing with fresh answers", unit="answer"):
        if seconds is not None and time.monotonic() - began > seconds:
            break
        server.flush()
        reply = server.post("/generate", done.request.body(return_logprob=True, top_logprobs_num=2))
        reply.raise_for_status()
        fresh = reply.json()
        gaps = gaps_of(fresh["meta_info"]["output_top_logprobs"])
        said = verdict(done.ids, fresh["output_ids"], gaps, tolerance.toss_up)
        exact = tolerance.same_selection or not done.request.images or done.request.retention == 1.0
        found.verdicts[said if exact else f"selected anew, {said}"] += 1
        answers.add(tuple(fresh["output_ids"]))
        if said == "different" and exact:
            what = f"{done} fresh {fresh['output_ids']} gaps {gaps}"
            found.failures.append(f"another answer than a fresh server's: {what}")
    found.different_answers = len(answers)
    return found
