"""The two caches that bench/tree.py compares, each driven call by call as SGLang's scheduler drives it."""

from __future__ import annotations

import time
from array import array
from collections import defaultdict
from dataclasses import dataclass
from typing import Any, Callable

import numpy as np
import torch
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, InsertParams, MatchPrefixParams
from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey

from tgvkv_sglang.kv import integrity
from tgvkv_sglang.kv.evictor import Evictor
from tgvkv_sglang.kv.nodes import View
from tgvkv_sglang.kv.radix import Inserted, SpanTree
from tgvkv_sglang.kv.store import UnitStore
from tgvkv_sglang.spans import VISION_PAD_BASE

SYSTEM, IMAGE, QUESTION, ANSWER = 32, 1024, 32, 64  # tokens
LAYERS, KEPT = 4, 51  # 5 % of an image in each layer
NAMESPACE = "tgvkv"


@dataclass(frozen=True)
class Load:
    """``conversations`` are finished and cached, ``running`` under way, ``admissions`` are timed."""

    conversations: int
    one_picture: bool
    running: int
    admissions: int
    seed: int

    @property
    def slots(self) -> int:
        """As many as are ever handed out; what was freed is not handed out again."""
        opened = self.conversations + self.running + self.admissions
        return SYSTEM + opened * (IMAGE + QUESTION + ANSWER)


class Prompts:
    """Token ids of conversations, from a seed: system prompt, image, then turns of a question and an answer."""

    def __init__(self, load: Load):
        rng = np.random.default_rng(load.seed)
        self._one_picture = load.one_picture
        self._system = rng.integers(1, 1000, SYSTEM)
        self._turns = rng.integers(1, 50_000, (load.conversations + load.running, 2 * (QUESTION + ANSWER)))

    def ids(self, conversation: int, answers: int, questions: int = 1) -> np.ndarray:
        image = np.full(IMAGE, VISION_PAD_BASE + (0 if self._one_picture else conversation))
        text = self._turns[conversation, : questions * QUESTION + answers * ANSWER]
        return np.concatenate([self._system, image, text]).astype(np.int64)


class Stopwatch:
    """Microseconds of every call, by operation."""

    def __init__(self) -> None:
        self.times: dict[str, list[float]] = defaultdict(list)

    def __call__(self, operation: str, call: Callable[..., Any], *arguments: Any) -> Any:
        start = time.perf_counter()
        out = call(*arguments)
        self.times[operation].append(1e6 * (time.perf_counter() - start))
        return out


class Slots:
    """Hands out slots and remembers those that come back; in place of SGLang's allocator, whose cost is not asked."""

    device = torch.device("cpu")

    def __init__(self, capacity: int):
        self.capacity, self.given = capacity, 0
        self.freed: list[torch.Tensor] = []

    def take(self, count: int) -> torch.Tensor:
        self.given += count
        return torch.arange(self.given - count + 1, self.given + 1)

    def free(self, slots: torch.Tensor) -> None:
        self.freed.append(slots)

    def free_segment(self, slots: torch.Tensor, *, start_pos: int) -> None:
        self.free(slots)

    def free_list(self) -> torch.Tensor:
        return torch.cat([torch.arange(self.given + 1, self.capacity + 1), *self.freed])


class User:
    """A running request, as far as the tree knows one."""

    def span_reclaimed(self, start: int, end: int) -> None: ...


class Ours:
    """Conversations on our tree."""

    def __init__(self, load: Load):
        self.prompts, self.slots = Prompts(load), Slots(load.slots)
        store = UnitStore(*(torch.zeros(LAYERS, load.slots + 1, 1, 1, dtype=torch.int8) for _ in "kv"))
        self.tree = SpanTree(store, self.slots.free)
        self.evictor = Evictor(self.tree)
        self._kept = torch.arange(KEPT, dtype=torch.int32).repeat(LAYERS), [KEPT] * LAYERS

    def _views(self, match, inserted: Inserted, grounding: tuple[int, int]) -> list[View]:
        """The reclaimed image's view, or a new one of the full image."""
        if match.views:
            return match.views
        span = inserted.span_nodes()[SYSTEM]
        view = View(span, grounding, *self._kept, span.value, self.tree.store)
        return [self.tree.attach(view, inserted.node)]

    def open(self, conversation: int, finish: bool) -> None:
        """Prefill and, to ``finish``, answer."""
        done = self._prefill(self.prompts.ids(conversation, answers=0), Stopwatch())
        if finish:
            inserted, views, user = done
            ids = self.prompts.ids(conversation, answers=1)
            row = torch.cat([inserted.slots, self.slots.take(ANSWER)])
            self.tree.insert(NAMESPACE, ids, row, len(inserted.slots), True)
            self.tree.disuse(views, user)
            self.tree.unlock(inserted.node)

    def _prefill(self, ids: np.ndarray, watch: Stopwatch) -> tuple[Inserted, list[View], User]:
        match = watch("match", self.tree.match, NAMESPACE, ids, len(ids) - 1, True)
        watch("lock", self.tree.lock, match.node)
        watch("evictable", self._evictable)
        row, new = torch.cat([match.slots, self.slots.take(len(ids) - match.length)]), (match.length, len(ids))
        inserted = watch("insert", self.tree.insert, NAMESPACE, ids, row, match.length, True, new)
        views, user = self._views(match, inserted, new), User()
        self.tree.lock(inserted.node)
        self.tree.unlock(match.node)
        watch("use", self.tree.use, views, user)
        return inserted, views, user

    def _evictable(self) -> int:
        return self.evictor.evictable

    def admit(self, conversation: int, watch: Stopwatch) -> None:
        """A follow-up, under pressure."""
        inserted, views, user = self._prefill(self.prompts.ids(conversation, answers=1, questions=2), watch)
        watch("evictable", self._evictable)
        watch("disuse", self.tree.disuse, views, user)
        watch("unlock", self.tree.unlock, inserted.node)
        watch("evictable", self._evictable)
        self._evict(watch)

    def _evict(self, watch: Stopwatch) -> None:
        images = len(self.tree.full_spans)
        watch("evict", self.evictor.evict, 1)
        kind = "image" if len(self.tree.full_spans) < images else "leaf"
        watch.times[f"evict, one {kind}"].append(watch.times["evict"].pop())

    def rest(self, load: Load, watch: Stopwatch) -> None:
        """What happens outside admissions: idle checks, trims, and leaves once all images are packed."""
        free = self.slots.free_list()
        for _ in range(3):
            watch("idle check", integrity.check_sums, self.tree, len(free), self.slots.capacity)
            watch("idle check, slot by slot", integrity.check, self.evictor, free, self.slots.capacity)
        held = sum(map(len, self.evictor.spans()))
        for _ in range(min(load.admissions, held // IMAGE)):
            held -= IMAGE
            watch("trim, one image", self.evictor.trim, held)
        self.evictor.trim(0)
        for _ in range(load.admissions):
            self._evict(watch)
        del watch.times["evict"]


class Stock:
    """The same conversations on SGLang's own cache."""

    def __init__(self, load: Load):
        self.prompts, self.slots = Prompts(load), Slots(load.slots)
        self.cache = RadixCache.create_simulated(mock_allocator=self.slots)

    def _prefill(self, ids: np.ndarray, watch: Stopwatch):
        """Match, lock, insert; returns the node that is locked."""
        key = RadixKey(array("q", ids.tolist()), NAMESPACE)
        match = watch("match", self.cache.match_prefix, MatchPrefixParams(key=key))
        watch("lock", self.cache.inc_lock_ref, match.last_device_node)
        watch("evictable", self.cache.evictable_size)
        row = torch.cat([match.device_indices, self.slots.take(len(ids) - len(match.device_indices))])
        inserted = watch("insert", self.cache.insert, InsertParams(key=key, value=row))
        self.cache.inc_lock_ref(inserted.last_device_node)
        self.cache.dec_lock_ref(match.last_device_node)
        return inserted.last_device_node

    def open(self, conversation: int, finish: bool) -> None:
        node = self._prefill(self.prompts.ids(conversation, answers=0), Stopwatch())
        if finish:
            self.cache.dec_lock_ref(node)
            node = self._prefill(self.prompts.ids(conversation, answers=1), Stopwatch())
            self.cache.dec_lock_ref(node)

    def admit(self, conversation: int, watch: Stopwatch) -> None:
        node = self._prefill(self.prompts.ids(conversation, answers=1, questions=2), watch)
        watch("evictable", self.cache.evictable_size)
        watch("unlock", self.cache.dec_lock_ref, node)
        watch("evictable", self.cache.evictable_size)
        watch("evict, one leaf", self.cache.evict, EvictParams(num_tokens=1))

    def rest(self, load: Load, watch: Stopwatch) -> None:
        """Stock checks sums when idle (in its scheduler) and knows nothing else of these."""
