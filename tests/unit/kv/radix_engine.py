"""A small stand-in for SGLang's scheduler around the real lifecycle: an allocator, a page table, requests.

Contents are checkable: the K of a unit says which token, after which prefix, in which layer it is the KV of, and a slot
that is freed is poisoned. So a stale row, a view that lost its units, or a prefix that belongs to somebody else shows
as a wrong number.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate
from types import SimpleNamespace
from typing import Callable, Sequence

import numpy as np
import torch

from tests.unit.kv.columns import columns_of
from tgvkv_sglang.config import TgvConfig
from tgvkv_sglang.errors import SelectionError
from tgvkv_sglang.kv.evictor import Evictor
from tgvkv_sglang.kv.nodes import Node
from tgvkv_sglang.kv.radix import Match, SpanTree
from tgvkv_sglang.kv.store import UnitStore
from tgvkv_sglang.namespace import Namespace
from tgvkv_sglang.request.lifecycle import Lifecycle
from tgvkv_sglang.request.state import RequestState
from tgvkv_sglang.selection.choose import Choice
from tgvkv_sglang.spans import VISION_PAD_BASE, vision_spans

RETENTION = 0.5
HOME = Namespace.of(TgvConfig(retention=RETENTION))
PLAIN = Namespace.of(TgvConfig(retention=1.0), "somebody else")
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

    def walk(self, namespace: Namespace, ids: Sequence[int]) -> list[int]:
        at: int | tuple = (namespace,)
        atomic = namespace.evicts
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


Keep = Callable[[int], torch.Tensor]


@dataclass(eq=False)
class Request:
    """One request as SGLang keeps it (a :class:`~tgvkv_sglang.request.lifecycle.Holder`).

    ``page_row[:kv]`` has KV. Phases, the scheduler's: waiting -> prefill -> computed (its last chunk ran, the result is
    not processed) -> decode -> gone.
    """

    name: str
    namespace: Namespace
    prompt: list[int]
    pids: list[int] = field(repr=False)
    state: RequestState | None = field(repr=False)
    output: list[int] = field(default_factory=list)
    page_row: torch.Tensor = field(default_factory=lambda: torch.zeros(64, dtype=torch.int64), repr=False)
    protected_len: int = 0
    kv: int = 0
    stashed: int = 0
    node: Node | None = None
    phase: str = "waiting"

    @property
    def ids(self) -> list[int]:
        return self.prompt + self.output

    @property
    def computed(self) -> np.ndarray:
        """The tokens that have KV."""
        return array(self.ids[: self.kv])

    @property
    def lock_pid(self) -> int | None:
        return self.pids[self.node.end - 1] if self.node is not None and self.node.end else None

    @property
    def private(self) -> int:
        return self.kv - self.protected_len


class Chooser(RequestState):
    """A request whose selection a test makes: of each span what ``keep(tokens) -> [L, tokens]`` says."""

    keep: Keep

    def choose(self) -> Choice:
        assert self.grounding is not None and self.grounding.chosen is None
        kept = torch.cat([self.keep(len(span)) for span in self.plan.select], dim=1)
        self.grounding.chosen = SimpleNamespace(scores=kept.float())
        columns, counts = columns_of(kept)
        bounds = torch.tensor([0, *accumulate(counts)])
        return Choice(columns, bounds, columns.numpy(), bounds.numpy(), kept.shape[1])


class Strict:
    """A witness to which every failure is one of the test's."""

    def selected(self, holder: Request, choice: Choice) -> None:
        assert holder.state.grounding is not None

    def failed(self, state: RequestState, error: SelectionError) -> None:
        raise error


def array(ids: Sequence[int]) -> np.ndarray:
    return np.array(ids, dtype=np.int64)


class Engine:
    """What SGLang's scheduler does around a request's life, in its order."""

    def __init__(self, capacity: int, layers: int, reclaimable_share: float = 1.0, cap: int = 4096) -> None:
        self.pool = Pool(capacity, layers)
        self.prefixes = Prefixes()
        self.tree = SpanTree(self.pool.store, self.pool.free)
        self.evictor = Evictor(self.tree)
        limit = int(reclaimable_share * capacity) if reclaimable_share < 1.0 else None
        self.lifecycle = Lifecycle(self.tree, self.evictor, Strict(), self._allocate, limit)
        self.cap = cap
        self.requests: list[Request] = []
        self.count = 0

    def _allocate(self, n: int) -> torch.Tensor | None:
        return self.pool.alloc(n) if self.make_room(n) else None

    # -- making and admitting ------------------------------------------------------------------------------------

    def request(self, prompt: Sequence[int], namespace: Namespace = HOME) -> Request:
        self.count += 1
        state, name = None, f"r{self.count}"
        spans = vision_spans(array(prompt)) if namespace.evicts else []
        if spans:
            state = Chooser(name, TgvConfig(retention=RETENTION, grounding_cap=self.cap), False, spans, len(prompt))
        return Request(name, namespace, list(prompt), self.prefixes.walk(namespace, prompt), state)

    def match(self, req: Request, limit: int | None = None) -> Match:
        limit = len(req.ids) - 1 if limit is None else limit
        return self.lifecycle.admit(req.namespace, req.state, array(req.ids), limit)

    def admit(self, req: Request, limit: int | None = None) -> Match:
        """Match and lock, as the scheduler does when it picks a waiting request."""
        match = self.match(req, limit)
        self.tree.lock(match.node)
        req.node, req.protected_len, req.kv, req.stashed = match.node, match.length, match.length, match.length
        req.page_row[:] = 0
        req.page_row[: match.length] = match.slots
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
        req.page_row[new] = slots
        req.kv += n

    def forward(self, req: Request, n: int) -> None:
        """Run a chunk of ``n`` prompt tokens."""
        if req.state is not None:
            req.state.begin_chunk(req.kv)
        self._compute(req, n)
        if req.kv == len(req.ids):
            req.phase = "computed"

    def decode(self, req: Request, token: int) -> None:
        """The previous step's token enters the sequence and its KV is written."""
        req.output.append(token)
        req.pids = self.prefixes.walk(req.namespace, req.ids)
        self._compute(req, 1)

    # -- results -------------------------------------------------------------------------------------------------

    def stash_chunk(self, req: Request) -> None:
        self.lifecycle.chunk(req, array(req.ids), req.kv)

    def process_prefill(self, req: Request, keep: Keep) -> None:
        """The last chunk's result arrives; the selection keeps what ``keep(tokens) -> [L, tokens]`` says."""
        self._let_keep(req, keep)
        self.lifecycle.end_prefill(req, req.computed)
        req.phase = "decode"

    def finish(self, req: Request, keep: Keep) -> None:
        """Its last token arrives, which may be its first."""
        self._let_keep(req, keep)
        self.requests.remove(req)  # it no longer counts when spans are trimmed for its leaving
        self.lifecycle.finish(req, req.computed)
        self._forget(req)

    def drop(self, req: Request) -> None:
        """Abort or retraction."""
        self.requests.remove(req)
        self.lifecycle.drop(req, req.kv)
        self._forget(req)

    def _let_keep(self, req: Request, keep: Keep) -> None:
        if req.state is not None:
            req.state.keep = keep

    def _forget(self, req: Request) -> None:
        req.node, req.phase, req.protected_len, req.kv = None, "gone", 0, 0

    def flush(self) -> None:
        assert not self.requests
        self.tree.reset()
        self.pool.clear()
        self.pool.k[:], self.pool.v[:] = POISON, POISON

    # -- whole runs, for example tests ---------------------------------------------------------------------------

    def serve(self, prompt: Sequence[int], output: Sequence[int] = (), keep: Keep | None = None) -> Request:
        """Admit, prefill at once and decode ``output``; the request keeps running."""
        req = self.request(prompt)
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
