"""A small stand-in for SGLang around a SpanTree: an allocator, requests, and the order in which the seam calls.

Contents are checkable: the K of a unit says which token, after which prefix, in which layer it is the KV of, and a slot
that is freed is poisoned. So a stale row, a view that lost its units, or a prefix that belongs to somebody else shows
as a wrong number.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Callable, Sequence

import numpy as np
import torch

from tgvkv_sglang.attention.plan import plan_prefill
from tgvkv_sglang.attention.state import RequestState
from tgvkv_sglang.config import TgvConfig
from tgvkv_sglang.kv.evictor import Evictor
from tgvkv_sglang.kv.matching import whole_prefix
from tgvkv_sglang.kv.nodes import Node, View
from tgvkv_sglang.kv.radix import Inserted, Match, SpanTree
from tgvkv_sglang.kv.store import UnitStore
from tgvkv_sglang.spans import VISION_PAD_BASE, vision_spans

POISON = -1


class Prefixes:
    """Gives every prefix of every namespace a number: ``pid`` of a token stands for it and all before it.

    A vision token of an atomic namespace is known by (pad id, length of its run, offset in it): a run of another length
    is another image.
    """

    def __init__(self) -> None:
        self._ids: dict[tuple, int] = {}
        self.parent: dict[int, int | None] = {}
        self.depth: dict[int, int] = {}
        self.span: dict[int, tuple[int, ...]] = {}  # pids of the whole run, keyed by the pid of its last token

    def step(self, parent: int | tuple, symbol) -> int:
        pid = self._ids.setdefault((parent, symbol), len(self._ids) + 1)
        above = parent if isinstance(parent, int) else None
        self.parent[pid], self.depth[pid] = above, 1 + (self.depth[above] if above else 0)
        return pid

    def walk(self, namespace: str, ids: Sequence[int], atomic: bool) -> list[int]:
        at: int | tuple = (namespace,)
        pids: list[int] = []
        for run in equal_runs(ids) if atomic else [(i, i + 1) for i in range(len(ids))]:
            pids.extend(self.run(pids[-1] if pids else at, ids[run[0] : run[1]], atomic))
        return pids

    def run(self, parent: int | tuple, ids: Sequence[int], atomic: bool) -> list[int]:
        """pids of a run of text, or (atomic) of one whole run of vision tokens."""
        out, vision = [], atomic and ids[0] >= VISION_PAD_BASE
        for offset, token in enumerate(ids):
            symbol = (int(token), len(ids), offset) if vision else int(token)
            parent = self.step(parent, symbol)
            out.append(parent)
        if vision:
            self.span[out[-1]] = tuple(out)
        return out

    def above(self, pid: int | None) -> set[int]:
        """``pid`` and all prefixes before it."""
        out = set()
        while pid is not None:
            out.add(pid)
            pid = self.parent[pid]
        return out


def equal_runs(ids: Sequence[int]) -> list[tuple[int, int]]:
    """Vision runs whole, every text token by itself."""
    runs, start = [], 0
    for i in range(1, len(ids) + 1):
        if i == len(ids) or ids[i] != ids[start] or ids[start] < VISION_PAD_BASE:
            runs.append((start, i))
            start = i
    return runs


class Pool:
    """Slots ``1..capacity`` and their contents: K of (pid, layer) is ``pid * layers + layer``, V is its negative."""

    def __init__(self, capacity: int, layers: int) -> None:
        self.capacity, self.layers = capacity, layers
        self.store = UnitStore(*(torch.full((layers, capacity + 1, 1, 1), POISON) for _ in "kv"))
        self.k, self.v = self.store.k_flat.view(layers, capacity + 1), self.store.v_flat.view(layers, capacity + 1)
        self.clear()

    def clear(self) -> None:
        self.free_slots = list(range(1, self.capacity + 1))
        self.freed: list[int] = []

    def alloc(self, n: int) -> torch.Tensor:
        if n > len(self.free_slots):
            raise MemoryError(f"{n} slots wanted, {len(self.free_slots)} free")
        taken, self.free_slots = self.free_slots[:n], self.free_slots[n:]
        return torch.tensor(taken, dtype=torch.int64)

    def free(self, slots: torch.Tensor) -> None:
        freed = slots.tolist()
        assert slots.dtype == torch.int64 and 0 not in freed, f"freed {freed}"
        assert not set(freed) & set(self.free_slots) and len(set(freed)) == len(freed), f"freed twice: {freed}"
        self.k[:, slots] = self.v[:, slots] = POISON
        self.free_slots += freed
        self.freed += freed

    def write(self, slots: torch.Tensor, pids: Sequence[int]) -> None:
        code = torch.tensor(pids)[None] * self.layers + torch.arange(self.layers)[:, None]
        self.k[:, slots], self.v[:, slots] = code, -code

    def check_slots(self, slots: Sequence[int], pids: Sequence[int], what: str) -> None:
        """Every slot holds all layers of the token its pid stands for."""
        code = torch.tensor(pids, dtype=torch.int64)[None] * self.layers + torch.arange(self.layers)[:, None]
        index = torch.tensor(slots, dtype=torch.int64)
        held_k, held_v = self.k[:, index], self.v[:, index]
        assert torch.equal(held_k, code) and torch.equal(held_v, -code), f"{what}: {slots} hold\n{held_k}\nnot\n{code}"

    def check_units(self, units: torch.Tensor, pids: Sequence[int], layers: torch.Tensor, what: str) -> None:
        code = torch.tensor(pids, dtype=torch.int64) * self.layers + layers
        held_k, held_v = self.store.k_flat[units, 0, 0], self.store.v_flat[units, 0, 0]
        assert torch.equal(held_k, code) and torch.equal(held_v, -code), f"{what}: {units} hold {held_k}, not {code}"


@dataclass(eq=False)
class Request:
    """One request as SGLang and the seam see it. ``row[:kv]`` is its page-table row, ``prot`` SGLang's
    ``cache_protected_len``; phases: waiting -> prefill -> computed (last chunk ran, not processed) -> decode."""

    name: str
    namespace: str
    atomic: bool
    prompt: list[int]
    pids: list[int] = field(repr=False)
    state: RequestState | None = field(repr=False)
    output: list[int] = field(default_factory=list)
    row: torch.Tensor = field(default_factory=lambda: torch.zeros(64, dtype=torch.int64), repr=False)
    prot: int = 0
    kv: int = 0
    stashed: int = 0
    node: Node | None = None
    phase: str = "waiting"

    @property
    def ids(self) -> list[int]:
        return self.prompt + self.output

    @property
    def lock_pid(self) -> int | None:
        return self.pids[self.node.end - 1] if self.node is not None and self.node.end else None

    @property
    def private(self) -> int:
        return self.kv - self.prot


def array(ids: Sequence[int]) -> np.ndarray:
    return np.array(ids, dtype=np.int64)


class Engine:
    """The calls of ``sglang_seam/radix_cache.py`` and of SGLang's scheduler, in their order, without either."""

    def __init__(self, capacity: int, layers: int, reclaimable_share: float = 1.0, cap: int = 4096) -> None:
        self.pool = Pool(capacity, layers)
        self.prefixes = Prefixes()
        self.tree = SpanTree(self.pool.store, self.pool.free)
        self.evictor = Evictor(self.tree)
        self.share, self.cap = reclaimable_share, cap
        self.requests: list[Request] = []
        self.count = 0

    # -- making and admitting ------------------------------------------------------------------------------------

    def request(self, prompt: Sequence[int], namespace: str = "", atomic: bool = True) -> Request:
        self.count += 1
        state, name = None, f"r{self.count}"
        spans = vision_spans(array(prompt)) if atomic else []
        if spans:
            state = RequestState(name, TgvConfig(retention=0.5, grounding_cap=self.cap), False, spans, len(prompt))
        pids = self.prefixes.walk(namespace, prompt, atomic)
        return Request(name, namespace, atomic, list(prompt), pids, state)

    def match(self, req: Request, limit: int | None = None) -> Match:
        limit = len(req.ids) - 1 if limit is None else limit
        return self.tree.match(req.namespace, array(req.ids), limit, req.atomic)

    def admit(self, req: Request, limit: int | None = None) -> Match:
        """Match and lock, as the scheduler does when it picks a waiting request."""
        match = self.match(req, limit)
        if req.state is not None:
            req.state.begin(plan_prefill(req.state, match))
        self.tree.lock(match.node)
        req.node, req.prot, req.kv, req.stashed = match.node, match.length, match.length, match.length
        req.row[:] = 0
        req.row[: match.length] = match.slots
        req.phase = "prefill"
        self.requests.append(req)
        return match

    def dismiss(self, req: Request) -> None:
        """Undo :meth:`admit` of a request that turned out not to fit."""
        self.tree.unlock(req.node)
        self.requests.remove(req)
        req.phase, req.node = "waiting", None

    def make_room(self, n: int) -> bool:
        """Evict what is missing for ``n`` slots; False if there is not so much."""
        missing = n - len(self.pool.free_slots)
        if missing > self.evictor.evictable:
            return False
        if missing > 0:
            self.evictor.evict(missing)
        return True

    # -- running -------------------------------------------------------------------------------------------------

    def _compute(self, req: Request, n: int) -> None:
        new = slice(req.kv, req.kv + n)
        slots = self.pool.alloc(n)
        self.pool.write(slots, req.pids[new])
        req.row[new] = slots
        req.kv += n

    def forward(self, req: Request, n: int) -> None:
        """Run a chunk of ``n`` prompt tokens."""
        if req.state is not None:
            req.state.begin_grounding(self.pool.layers, 1, lambda t: t)
        self._compute(req, n)
        if req.kv == len(req.ids):
            req.phase = "computed"

    def decode(self, req: Request, token: int) -> None:
        """The previous step's token enters the sequence and its KV is written."""
        req.output.append(token)
        req.pids = self.prefixes.walk(req.namespace, req.ids, req.atomic)
        self._compute(req, 1)

    # -- the seam's radix cache ----------------------------------------------------------------------------------

    def _insert(self, req: Request, length: int) -> Inserted:
        state = req.state
        grounding = (state.plan.start, state.prompt_len) if state is not None else None
        inserted = self.tree.insert(
            req.namespace, array(req.ids[:length]), req.row[:length].clone(), req.prot, req.atomic, grounding
        )
        req.row[req.prot : length] = inserted.slots[req.prot : length]
        req.prot = max(req.prot, length)
        return inserted

    def _relock(self, req: Request, node: Node) -> None:
        if req.node.is_below(node):  # a repeated prompt holds the node of the views it replays
            return
        self.tree.lock(node)
        self.tree.unlock(req.node)
        req.node = node

    def stash_chunk(self, req: Request) -> None:
        """``cache_unfinished_req(chunked=True)``: give whole spans to the tree, keep the tail private."""
        length = whole_prefix(array(req.ids), req.kv, req.atomic)
        if length > req.prot:
            self._relock(req, self._insert(req, length).node)
        self._trim()

    def _insert_prompt(self, req: Request, keep: Callable[[int], torch.Tensor]) -> tuple[Inserted, list[View]]:
        state = req.state
        if state is None:
            return self._insert(req, req.kv), []
        inserted = self._insert(req, min(req.kv, state.prompt_len))
        views = [*state.plan.kept_views, *self._select(state, inserted, keep)]
        if req.kv > state.prompt_len:
            inserted = self._insert(req, req.kv)
        return inserted, views

    def _select(self, state: RequestState, inserted: Inserted, keep: Callable[[int], torch.Tensor]) -> list[View]:
        if state.grounding is None:
            return []
        nodes, views = inserted.span_nodes(), []
        for span in state.grounding.spans:
            node = nodes[span.start]
            view = View(node, state.grounding.new_text, keep(len(span)), node.value, self.pool.store)
            views.append(self.tree.attach(view, inserted.node))
        return views

    def process_prefill(self, req: Request, keep: Callable[[int], torch.Tensor]) -> None:
        """``cache_unfinished_req(chunked=False)``: insert, select with ``keep(tokens) -> [L, tokens]``, decode."""
        inserted, views = self._insert_prompt(req, keep)
        self._relock(req, inserted.node)
        if req.state is not None:

            def zero_row(start: int, end: int) -> None:
                req.row[start:end] = 0

            req.state.zero_row = zero_row
            req.state.decode_through(views)
            self.tree.use(views, req.state)
        req.phase = "decode"
        self._trim()

    def finish(self, req: Request, keep: Callable[[int], torch.Tensor]) -> None:
        """``cache_finished_req`` with insertion."""
        state = req.state
        if state is not None and state.grounding is not None:
            _, views = self._insert_prompt(req, keep)
            state.decode_through(views)
            state.views = []
        else:
            self._insert(req, req.kv)
        self._leave(req)

    def drop(self, req: Request) -> None:
        """``cache_finished_req(is_insert=False)``: abort or retraction; private slots are freed."""
        if req.private:
            self.pool.free(req.row[req.prot : req.kv].clone())
        self._leave(req)

    def _leave(self, req: Request) -> None:
        if req.state is not None:
            self.tree.disuse(req.state.stop(), req.state)
        self.tree.unlock(req.node)
        self.requests.remove(req)
        req.node, req.phase, req.prot, req.kv = None, "gone", 0, 0
        self._trim()

    def _trim(self) -> None:
        if self.share < 1.0:
            self.evictor.trim(int(self.share * self.pool.capacity))

    def flush(self) -> None:
        assert not self.requests
        self.tree.reset()
        self.pool.clear()
        self.pool.k[:], self.pool.v[:] = POISON, POISON

    # -- whole runs, for example tests ---------------------------------------------------------------------------

    def serve(self, prompt: Sequence[int], output: Sequence[int] = (), keep=None, namespace: str = "") -> Request:
        """Admit, prefill at once and decode ``output``; the request keeps running."""
        req = self.request(prompt, namespace)
        self.admit(req)
        assert self.make_room(len(prompt) - req.kv)
        self.forward(req, len(prompt) - req.kv)
        self.process_prefill(req, keep or self.first_third)
        for token in output:
            assert self.make_room(1)
            self.decode(req, token)
        return req

    def first_third(self, tokens: int) -> torch.Tensor:
        """A selection: each layer keeps the first third of the tokens."""
        kept = torch.zeros(self.pool.layers, tokens, dtype=torch.bool)
        kept[:, : tokens // 3] = True
        return kept
