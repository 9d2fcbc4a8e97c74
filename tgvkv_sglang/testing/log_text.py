"""What SGLang 0.5.17 writes into its log, in one place: a server of another version may say it otherwise."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass

_MEMORY_CHECK = re.compile(r"(?:TP(\d+)\] )?\[Mem Check \(BUSY\)\] (.*)")
_RETRACTION = re.compile(r"Retract requests\.|Testing retraction\.")
_STAMP = r"\[(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)[^\]]*\] "
_DECODE = re.compile(_STAMP + r"Decode batch.*?#running-req: (\d+),.*? (?:cuda|cpu) graph: (True|False),")
_RETRACTED = re.compile(_STAMP + r".*#retracted_reqs: (\d+)")
_PREFILL_ALONE = re.compile(r"#new-token: (\d+), #cached-token: 0,.* #running-req: 1,")


def memory_checks(log: str, rank: int = 0) -> list[str]:
    """What each check of the memory found, in order, of one tensor-parallel rank (a single server is rank 0)."""
    return [found[2] for found in _MEMORY_CHECK.finditer(log) if int(found[1] or 0) == rank]


def slots_by_owner(check: str) -> dict[str, int]:
    """The numbers of one memory check by name: ``available``, ``evictable``, ``protected``, ``uncached`` and others."""
    return {name: int(value) for name, value in re.findall(r"(\w+)=(\d+)", check)}


def retractions(log: str) -> int:
    """How often the scheduler took running requests back into its queue."""
    return len(_RETRACTION.findall(log))


def rounds(log: str) -> list[str]:
    """The log cut at each retraction."""
    return _RETRACTION.split(log)


def prefills_beside_one(log: str) -> list[int]:
    """New tokens of each prefill that took nothing from the cache while one other request was running."""
    return [int(tokens) for tokens in _PREFILL_ALONE.findall(log)]


@dataclass(frozen=True)
class DecodeStep:
    """One decode step as SGLang logs it, one of each ``--decode-log-interval``.

    Attributes:
        at: seconds since the epoch, to the second. running: requests in the batch. graph: replayed from a CUDA graph.
    """

    at: float
    running: int
    graph: bool


def _seconds(stamp: str) -> float:
    return time.mktime(time.strptime(stamp, "%Y-%m-%d %H:%M:%S"))


def decode_steps(log: str) -> list[DecodeStep]:
    """The decode steps that were logged, in order."""
    return [DecodeStep(_seconds(at), int(running), graph == "True") for at, running, graph in _DECODE.findall(log)]


def retracted_requests(log: str) -> list[tuple[float, int]]:
    """When requests were taken back into the queue (seconds since the epoch), and how many."""
    return [(_seconds(at), int(count)) for at, count in _RETRACTED.findall(log)]
