"""What the span tree must do, on plain dictionaries: one entry per cached token, no nodes, no splits.

A token is known by its ``pid`` (see :class:`radix_engine.Prefixes`): itself and everything before it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tests.unit.kv.radix_engine import Engine, Prefixes, Request
from tgvkv_sglang.kv.nodes import View
from tgvkv_sglang.kv.radix import Match


@dataclass(eq=False)
class ViewRecord:
    """A view: which span (pid of its last token), which prompt's end it was grounded in, and what it kept."""

    view: View
    span: int
    end: int
    grounding: tuple[int, int]
    kept: torch.Tensor
    users: int = 0

    @property
    def slots(self) -> int:
        return -(-int(self.kept.sum()) // self.kept.shape[0])


@dataclass
class Expected:
    length: int
    slots: list[int]
    handle: int | None
    views: list[View]
    replay: list[View]


class Model:
    """``tokens``: pid -> slot, 0 where reclaimed. ``ground``: pid -> where the prefill that made this text began."""

    def __init__(self, prefixes: Prefixes) -> None:
        self.prefixes = prefixes
        self.clear()

    def clear(self) -> None:
        self.tokens: dict[int, int] = {}
        self.ground: dict[int, int | None] = {}
        self.views: list[ViewRecord] = []

    # -- match ---------------------------------------------------------------------------------------------------

    def match(self, req: Request, limit: int) -> Expected:
        pids, length = req.pids, 0
        while length < len(pids) and pids[length] in self.tokens:
            length += 1
        spans = [self.prefixes.span[pid] for pid in pids[:length] if pid in self.prefixes.span]
        same = length == len(pids) and any(record.end == pids[-1] for record in self.views)
        length = min(length, limit)
        while True:
            before = length
            for span in spans:
                if pids.index(span[0]) < length <= pids.index(span[-1]):
                    length = pids.index(span[0])
            inside = [span for span in spans if pids.index(span[-1]) < length]
            usable = {span[-1]: self._on_path(span[-1], pids, length, same) for span in inside}
            bare = [span for span in inside if not self.tokens[span[-1]] and usable[span[-1]] is None]
            if bare:
                length, same = pids.index(bare[0][0]), False
            elif length == before:
                length = self._floor(pids, length, inside, same)
            if length == before:
                return self._expected(pids, length, inside, usable, same)

    def _on_path(self, span: int, pids: list[int], length: int, same: bool) -> ViewRecord | None:
        path = set(pids[:length]) | ({pids[-1]} if same else set())
        there = [record for record in self.views if record.span == span and record.end in path]
        return max(there, key=lambda r: self.prefixes.depth[r.end], default=None) and [
            r for r in there if r.end == max(there, key=lambda r: self.prefixes.depth[r.end]).end
        ][-1]

    def _replayed(self, inside: list[tuple], end: int, same: bool) -> bool:
        full = {span[-1] for span in inside if self.tokens[span[-1]]}
        return same and full <= {record.span for record in self.views if record.end == end}

    def _floor(self, pids: list[int], length: int, inside: list[tuple], same: bool) -> int:
        if not length or not any(self.tokens[span[-1]] for span in inside):
            return length
        last = pids[length - 1]
        if self.ground[last] is None or self._replayed(inside, pids[-1], same):
            return length
        if any(record.end == last for record in self.views):
            return length
        return min(length, max(self.ground[last], pids.index(inside[-1][-1]) + 1))

    def _expected(self, pids, length, inside, usable, same) -> Expected:
        views = [usable[span[-1]] for span in inside if not self.tokens[span[-1]]]
        replay = []
        if self._replayed(inside, pids[-1], same):
            replay = [usable[span[-1]] for span in inside if self.tokens[span[-1]]]
        deep = length and same and (replay or any(record.end == pids[-1] for record in views))
        handle = pids[-1] if deep else pids[length - 1] if length else None
        slots = [self.tokens[pid] for pid in pids[:length]]
        return Expected(length, slots, handle, [r.view for r in views], [r.view for r in replay])

    # -- changes -------------------------------------------------------------------------------------------------

    def insert(
        self, req: Request, row: list[int], start: int, length: int, grounding: tuple[int, int] | None
    ) -> set[int]:
        """Take over ``row[start:length]``; returns the slots that are duplicates and must have been freed."""
        began, prompt_end = grounding or (None, 0)
        spans = {pid for span in self.prefixes.span.values() for pid in span}
        duplicates = set()
        for pid, slot in list(zip(req.pids, row, strict=False))[start:length]:
            if pid not in self.tokens:
                asked = self.prefixes.depth[pid] <= prompt_end and pid not in spans
                self.ground[pid] = began if asked else None
            elif self.tokens[pid]:
                duplicates.add(slot)
                continue
            self.tokens[pid] = slot
        return duplicates

    # -- what is owned, locked and evictable ---------------------------------------------------------------------

    def locked(self, requests: list[Request]) -> dict[int, list[Request]]:
        out: dict[int, list[Request]] = {}
        for req in requests:
            for pid in self.prefixes.above(req.lock_pid):
                out.setdefault(pid, []).append(req)
        return out

    def block(self, record: ViewRecord) -> int:
        return record.slots if record.view.packed else 0

    def total(self) -> int:
        return sum(slot != 0 for slot in self.tokens.values()) + sum(map(self.block, self.views))

    def spans(self) -> list[tuple[int, ...]]:
        """Spans held in full."""
        return [s for end, s in self.prefixes.span.items() if self.tokens.get(end)]

    def unpinned(self, span: tuple, locked) -> bool:
        return all(
            req.state is not None and any(view.span.end == self.prefixes.depth[span[-1]] for view in req.state.views)
            for req in locked.get(span[-1], [])
        )

    def superseded(self, record: ViewRecord, others: list[ViewRecord], locked) -> bool:
        for other in others:
            if other is record or other.span != record.span:
                continue
            if other.end == record.end:
                if other.users or self.views.index(other) > self.views.index(record):
                    return True
            elif record.end in self.prefixes.above(other.end) and (other.end in locked or record.end not in locked):
                return True
        return False

    def gain(self, span: tuple, locked, only_locked: bool) -> int:
        views = [r for r in self.views if r.span == span[-1] and (not only_locked or r.end in locked)]
        if not views or not self.unpinned(span, locked):
            return 0
        old = [record for record in views if not record.users and self.superseded(record, views, locked)]
        room = len(span) - sum(record.slots for record in views if not record.view.packed and record not in old)
        return room + sum(map(self.block, old)) if room > 0 else 0

    def evictable(self, requests: list[Request]) -> int:
        locked = self.locked(requests)
        held = sum(self.tokens.get(pid, 0) != 0 for pid in locked)
        held += sum(self.block(record) for record in self.views if record.end in locked)
        gains = sum(self.gain(span, locked, True) for span in self.spans() if span[-1] in locked)
        return self.total() - held + gains

    def reclaimable(self, requests: list[Request]) -> dict[tuple, int]:
        locked = self.locked(requests)
        gains = {span: self.gain(span, locked, False) for span in self.spans()}
        return {span: gain for span, gain in gains.items() if gain}


def snapshot(engine: Engine) -> tuple[dict[int, int], dict[int, object]]:
    """The tree's content by pid, and for each node the pid of its last token."""
    tokens, ends = {}, {}
    stack = [((edge[0],), node) for edge, node in engine.tree.root.children.items()]
    while stack:
        parent, node = stack.pop()
        atomic = node.atom
        pids = engine.prefixes.run(parent, node.key.tolist(), atomic)
        assert node.value is None or len(node.value) == len(pids)
        tokens.update(zip(pids, node.value.tolist() if node.value is not None else [0] * len(pids), strict=True))
        ends[pids[-1]] = node
        stack.extend((pids[-1], child) for child in node.children.values())
    return tokens, ends


def compare_match(match: Match, expected: Expected, req: Request) -> None:
    assert match.length == expected.length
    assert match.slots.tolist() == expected.slots
    assert (req.pids[match.node.end - 1] if match.node.end else None) == expected.handle
    assert match.views == expected.views
    assert match.replay == expected.replay
