"""Which answers of the soak must equal a fresh server's, and whether they do. Pure functions.

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

from dataclasses import dataclass
from typing import Sequence

from bench.soak_traffic import Request

# A greedy choice whose two best logprobs are closer than this may go either way: the sums of a batch and of a single
# request differ by some 1e-5 in float32.
TOSS_UP = 1e-3


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


def verdict(ids: Sequence[int], fresh: Sequence[int], gaps: Sequence[float]) -> str:
    """``equal``, ``toss-up`` (they part where the fresh answer's choice was open) or ``different``."""
    at = first_difference(ids, fresh)
    if at is None:
        return "equal"
    return "toss-up" if at < len(gaps) and gaps[at] < TOSS_UP else "different"
