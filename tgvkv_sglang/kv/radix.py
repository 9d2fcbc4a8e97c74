"""The span tree: a radix tree over token ids in which every vision span is one atomic node with views.

Pure data structure: it knows slots and a :class:`UnitStore`, never SGLang's requests. Rules are those of
docs/design.md ("Rules"); the numbers in comments refer to them. A logical clock orders accesses, so that every
tensor-parallel rank evicts the same slots in the same order. What goes when memory is short, and when, is decided above
the tree (``evictor.py``): the tree only notes which nodes changed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import count
from typing import Callable, Hashable, Iterator

import numpy as np
import torch

from ..errors import IntegrityError, SpanError
from ..spans import vision_runs
from .branches import count_lock, count_views, share_counts
from .matching import covered, grounding_floor, replays, views_on_path, whole_spans
from .nodes import Node, View, shared_prefix
from .store import UnitStore


@dataclass
class Match:
    """A reusable prefix.

    Attributes:
        length: reusable tokens. slots: ``[length]`` int64, 0 where a vision span was reclaimed.
        node: what to lock. It ends at ``length``, or later when a view of the very same question hangs there.
        path: nodes with tokens before ``length``, from the first.
        views: for each reclaimed span before ``length``, the view to attend through.
        replay: views of exactly this prompt over spans that are in full: the same question asked again.
    """

    length: int
    slots: torch.Tensor
    node: Node
    path: list[Node] = field(default_factory=list)
    views: list[View] = field(default_factory=list)
    replay: list[View] = field(default_factory=list)


@dataclass
class Inserted:
    """Where an insertion ended.

    Attributes:
        node: deepest node of the inserted path (the root for an empty key).
        slots: ``[n]`` int64 slots the tree holds for the key, 0 where a span is reclaimed.
        path: nodes from the first to ``node``.
    """

    node: Node
    slots: torch.Tensor
    path: list[Node]

    def span_nodes(self) -> dict[int, Node]:
        return {node.start: node for node in self.path if node.atom}


class SpanTree:
    """See the module docstring.

    Attributes:
        total: slots owned by the tree and its views. locked: those of them on locked nodes.
        leaves: unlocked leaves. full_spans: vision nodes held in full.
        changed: nodes whose owner, lock, views, children or last access changed; the evictor above empties it.

    Args:
        store: the unit store (for packing).
        free: called with an int64 tensor of slots that nobody owns any more. Never receives slot 0.
    """

    def __init__(self, store: UnitStore, free: Callable[[torch.Tensor], None]):
        self.store = store
        self._free = free
        self.reset()

    def reset(self) -> None:
        """Forget everything without freeing slots (the caller clears the allocator)."""
        self.clock = 0
        self._serials = count(1)
        self.root = Node(np.empty(0, np.int64), None)
        self.root.lock_ref = 1
        self.total = self.locked = 0
        self.leaves: set[Node] = set()
        self.full_spans: set[Node] = set()
        self.changed: set[Node] = set()

    # -- slots ---------------------------------------------------------------------------------------------------

    def _grow(self, node: Node, slots: int) -> None:
        """Account ``slots`` more (or fewer) slots owned by ``node``."""
        self.total += slots
        if node.lock_ref:
            self.locked += slots
        self.changed.add(node)

    def release(self, slots: torch.Tensor) -> None:
        if slots.numel():
            self._free(slots)

    # -- walking -------------------------------------------------------------------------------------------------

    def _child_key(self, parent: Node, namespace: Hashable, ids: np.ndarray, pos: int, run_end: int) -> Hashable:
        first = int(ids[pos])
        key: Hashable = (first, run_end - pos) if run_end else first
        return (namespace, key) if parent is self.root else key

    def _walk(self, namespace: Hashable, ids: np.ndarray, runs: list[tuple[int, int]]) -> Iterator[tuple[Node, int]]:
        """Yield (node, matched tokens) along ``ids``; only the last may be matched in part, and only if it is text."""
        ends = dict(runs)
        node, pos = self.root, 0
        while pos < len(ids):
            child = node.children.get(self._child_key(node, namespace, ids, pos, ends.get(pos, 0)))
            if child is None:
                return
            matched = shared_prefix(child.key, ids[pos : pos + len(child)])
            yield child, matched
            pos += matched
            if matched < len(child):
                return
            node = child

    def _touch(self, nodes: list[Node]) -> None:
        self.clock += 1
        for node in nodes:
            node.last_access = self.clock
        self.changed.update(nodes)

    def _split(self, node: Node, at: int) -> Node:
        """Cut a text node after ``at`` tokens; return the upper part. Owners, locks and views stay what they were."""
        assert not node.atom and 0 < at < len(node)
        upper = Node(
            node.key[:at], node.value[:at].clone(), node.parent, node.edge, node.start, serial=next(self._serials)
        )
        upper.lock_ref, upper.last_access = node.lock_ref, node.last_access
        upper.grounding_start = node.grounding_start
        node.parent.children[node.edge] = upper
        node.key, node.value = node.key[at:], node.value[at:].clone()
        node.parent, node.start, node.edge = upper, node.start + at, int(node.key[0])
        upper.children[node.edge] = node
        share_counts(upper, node)
        self.changed.add(node)
        return upper

    # -- match (rule 5) ------------------------------------------------------------------------------------------

    def match(self, namespace: Hashable, ids: np.ndarray, limit: int, atomic: bool) -> Match:
        """Longest reusable prefix of ``ids[:limit]``.

        Three rules cut the match: an image is reused whole or not at all; each image before the cut must be there in
        full or as a view on the path; a question is grounded in all of its own words. A cut may break a rule that held
        before, so all are asked again until none cuts. That ends, because every round but the last shortens the match.

        For example, A and B are reclaimed images, and this prompt is asked again with ``limit`` 23 (each node's end in
        brackets):

            "look" [4]  A [13]  "and" [15]  B [21]  "where?" [24], with a view of A and one of B

        ``deep`` is the node where the very same prompt ends. Its views serve although the match stops before it: 23
        tokens are reused. If B's view is no longer there, B is not covered and the match is cut to 15. The request will
        then compute B anew and select from it, so it is not the same question asked again, and ``deep`` is forgotten:
        A's view belongs to a selection that was made over A and B together. So the next round finds A uncovered and
        cuts to 4.

        May split a text node, so that the returned node ends where the match ends; contents, owners and sizes do not
        change. ``ids`` runs past ``limit`` so that a repeated prompt is recognised as one.

        Args:
            namespace: prefixes of different namespaces are never shared.
            ids: ``[n]`` int64 token ids with vision pads.
            limit: at most this many tokens may be reused.
            atomic: vision spans match whole or not at all (False: plain radix tree, for retention 1.0).
        """
        steps = list(self._walk(namespace, ids, vision_runs(ids) if atomic else []))
        reach = sum(matched for _, matched in steps)
        length, deep = min(reach, limit), None
        last_node = steps[-1][0] if steps else None
        if reach == len(ids) and last_node is not None and last_node.views and last_node.end == reach:
            deep = last_node
        while True:
            usable = views_on_path(steps, length, deep)
            cut = min(whole_spans(steps, length), covered(steps, length, usable))
            if cut < length and cut != whole_spans(steps, length):
                deep = None
            if cut == length:
                cut = grounding_floor(steps, length, deep)
            if cut == length:
                return self._result(steps, length, usable, deep)
            length = cut

    def _result(self, steps, length: int, usable: dict[Node, View], deep: Node | None) -> Match:
        taken = [(node, min(matched, length - node.start)) for node, matched in steps if node.start < length]
        slots = [_slots(node, self.store.device)[:used] for node, used in taken]
        spans = [node for node, _ in taken if node.atom]
        full = [node for node in spans if node.value is not None]
        views = [usable[node] for node in spans if node.value is None]
        replay = [usable[node] for node in full] if replays(deep, full) else []
        handle = self.root
        if taken:
            handle, used = taken[-1]
            if any(view.node is deep for view in views) or replay:
                handle = deep
            elif used < len(handle):
                handle = self._split(handle, used)
        self._touch([node for node, _ in taken] + [handle] * (handle is deep))
        empty = torch.empty(0, dtype=torch.int64, device=self.store.device)
        path = [node for node, _ in taken[:-1]] + ([handle if handle is not deep else taken[-1][0]] if taken else [])
        return Match(length, torch.cat(slots) if slots else empty, handle, path, views, replay)

    # -- insert (rule 6) -----------------------------------------------------------------------------------------

    def insert(
        self,
        namespace: Hashable,
        ids: np.ndarray,
        slots: torch.Tensor,
        owned_from: int,
        atomic: bool,
        grounding: tuple[int, int] | None = None,
    ) -> Inserted:
        """Give the slots of ``ids`` to the tree.

        Positions below ``owned_from`` are the tree's already. From there on the caller's slots become the tree's, or
        are freed where the tree holds the same tokens; a span that the tree held only as a view is healed.

        Args:
            ids: ``[n]`` ids of whole spans (see :func:`whole_prefix`).
            slots: ``[n]`` int64 the caller's slots.
            grounding: ``[start, end)`` of the new text of one prefill, to be marked as such; what follows is generated.
        """
        node, pos, path, duplicates = self.root, 0, [], []
        start, prompt_end = grounding or (None, 0)
        ends = dict(vision_runs(ids)) if atomic else {}
        starts = sorted(ends)
        while pos < len(ids):
            run_end = ends.get(pos, 0)
            key = self._child_key(node, namespace, ids, pos, run_end)
            child = node.children.get(key)
            if child is None:
                end = run_end or next((s for s in starts if s > pos), len(ids))
                asked = not run_end and pos < prompt_end  # the prompt's own text gets nodes of its own
                end = min(end, prompt_end) if asked else end
                child = self._add(node, key, ids[pos:end], slots[pos:end], bool(run_end))
                child.grounding_start = start if asked else None
            else:
                matched = shared_prefix(child.key, ids[pos : pos + len(child)])
                if matched < len(child):
                    child = self._split(child, matched)
                self._absorb(child, slots, owned_from, duplicates)
            path.append(child)
            node, pos = child, child.end
        self._touch(path)
        for part in duplicates:
            self.release(part)
        empty = torch.empty(0, dtype=torch.int64, device=self.store.device)
        return Inserted(node, torch.cat([_slots(n, self.store.device) for n in path]) if path else empty, path)

    def _add(self, parent: Node, key: Hashable, ids: np.ndarray, slots: torch.Tensor, atom: bool) -> Node:
        node = Node(np.array(ids), slots.clone(), parent, key, parent.end, atom, next(self._serials))
        parent.children[key] = node
        self.leaves.discard(parent)
        self.leaves.add(node)
        self.changed.add(parent)
        if atom:
            self.full_spans.add(node)
        self._grow(node, len(node))
        return node

    def _absorb(self, node: Node, slots: torch.Tensor, owned_from: int, duplicates: list[torch.Tensor]) -> None:
        """The caller brings slots for a node that exists: free them, or heal the node with them."""
        start = max(node.start, owned_from)
        if start >= node.end:
            return
        if node.value is not None:
            duplicates.append(slots[start : node.end])
            return
        if start != node.start:
            raise SpanError(f"span [{node.start}, {node.end}) can only be healed whole, owned from {owned_from}")
        node.value = slots[node.start : node.end].clone()
        self.full_spans.add(node)
        self._grow(node, len(node))

    # -- views ---------------------------------------------------------------------------------------------------

    def attach(self, view: View, node: Node) -> View:
        """Hang ``view`` on the node where its grounding ends; an equal view that is there already is returned."""
        for other in node.views:
            if other.span is view.span and other.grounding == view.grounding:
                return other
        first = not node.views_of(view.span)
        view.node = node
        node.views.append(view)
        view.span.span_views.add(view)
        if first:
            count_views(node, view.span, 1, self.changed)
        self.changed.add(node)
        return view

    def use(self, views: list[View], user) -> None:
        """``user`` decodes through ``views`` from now on (it holds one lock on their path)."""
        for view in views:
            view.readers += 1
            view.span.through.add(user)
            self.changed.update((view.node, view.span))

    def disuse(self, views: list[View], user) -> None:
        for view in views:
            view.readers -= 1
            view.span.through.discard(user)
            self.changed.update((view.node, view.span))

    def pack(self, view: View, block: torch.Tensor, units: torch.Tensor) -> None:
        """From now on ``view`` owns ``block``, slots that its span gives up; ``units`` lie in them."""
        view.moved_to(block, units)
        self._grow(view.node, len(block))

    def drop_view(self, view: View) -> None:
        """Take an unused view off the tree and free the slots it owns."""
        node, span = view.node, view.span
        node.views.remove(view)
        span.span_views.discard(view)
        if not node.views_of(span):
            count_views(node, span, -1, self.changed)
        self.changed.add(node)
        if view.block is not None:
            self._grow(node, -len(view.block))
            self.release(view.block)

    def give_up(self, span: Node) -> None:
        """The tree no longer owns a full span's slots; those who decode through views of it are told."""
        for user in span.through:
            user.span_reclaimed(span.start, span.end)
        span.value = None
        self.full_spans.discard(span)
        self._grow(span, -len(span))

    # -- locks ---------------------------------------------------------------------------------------------------

    def lock(self, node: Node) -> int:
        """Protect the path to ``node``. Returns the change of slots on unlocked nodes (<= 0)."""
        delta = 0
        while node is not self.root:
            node.lock_ref += 1
            if node.lock_ref == 1:
                delta -= node.own_slots
                self.leaves.discard(node)
                count_lock(node, 1, self.changed)
            if node.atom or node.lock_ref == 1:
                self.changed.add(node)
            node = node.parent
        self.locked -= delta
        return delta

    def unlock(self, node: Node) -> int:
        """Undo one :meth:`lock`. Returns the change of slots on unlocked nodes (>= 0)."""
        delta = 0
        while node is not self.root:
            if node.lock_ref <= 0:
                raise IntegrityError(f"node [{node.start}, {node.end}) is unlocked more often than locked")
            node.lock_ref -= 1
            if node.lock_ref == 0:
                delta += node.own_slots
                if not node.children:
                    self.leaves.add(node)
                count_lock(node, -1, self.changed)
            if node.atom or node.lock_ref == 0:
                self.changed.add(node)
            node = node.parent
        self.locked -= delta
        return delta

    # -- removal (rule 4) ----------------------------------------------------------------------------------------

    def drop_leaf(self, node: Node) -> int:
        """Remove an unlocked leaf and free all it owns; returns the number of slots."""
        assert not node.children and node.lock_ref == 0
        freed = node.own_slots
        for view in list(node.views):
            self.drop_view(view)
        self._grow(node, -node.own_slots)
        if node.value is not None:
            self.release(node.value)
        self.full_spans.discard(node)
        parent = node.parent
        del parent.children[node.edge]
        self.leaves.discard(node)
        if parent is not self.root and not parent.children and parent.lock_ref == 0:
            self.leaves.add(parent)
            self.changed.add(parent)
        return freed

    def nodes(self) -> Iterator[Node]:
        """All nodes but the root, parents before children."""
        stack = list(self.root.children.values())
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())


def _slots(node: Node, device: torch.device) -> torch.Tensor:
    return node.value if node.value is not None else torch.zeros(len(node), dtype=torch.int64, device=device)
