"""The evictor's work does not grow with what is resident. Counted in function calls, so that no clock is asked."""

import sys
from typing import Callable

import pytest

from tests.unit.kv.radix_engine import Engine
from tests.unit.kv.radix_examples import LAYERS, SYSTEM, WHAT
from tgvkv_sglang.spans import VISION_PAD_BASE

FEW, MANY = 20, 320


def calls(work: Callable[[], object]) -> int:
    """Function calls, Python's and C's, that ``work`` makes."""
    count = 0

    def profile(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def conversations(count: int, one_picture: bool) -> tuple[Engine, list]:
    """``count`` finished conversations of two turns and three running ones, with what each said last."""
    engine, prompts = Engine(capacity=60 * count, layers=LAYERS), []
    for i in range(count + 3):
        image = [VISION_PAD_BASE + (0 if one_picture else i)] * 9
        first = SYSTEM + image + WHAT + [100 + i]
        for prompt in (first, first + [7, 8]) if i < count else (first,):
            req = engine.serve(prompt, [3])
            if i < count:
                engine.finish(req, engine.first_third)
        prompts.append(req.prompt)
    assert engine.evictor.evictable > 0
    return engine, prompts


def cost(count: int, one_picture: bool) -> dict[str, int]:
    engine, prompts = conversations(count, one_picture)
    evictor, tree = engine.evictor, engine.tree
    out = {}
    for name, at in (("oldest", 0), ("middle", count // 2), ("newest", count - 1)):
        node = engine.match(engine.request(prompts[at] + [3, 9])).node
        assert evictor.evictable
        for change in (tree.lock, tree.unlock):
            out[f"{change.__name__} {name}"] = calls(lambda change=change, node=node: (change(node), evictor.evictable))
    out["prefill"] = calls(lambda: (engine.serve(prompts[1] + [3, 9]), evictor.evictable))
    out["finish"] = calls(lambda: (engine.finish(engine.requests[-1], engine.first_third), evictor.evictable))
    held = sum(map(len, evictor.spans()))
    out["trim"] = calls(lambda: evictor.trim(held - 1))
    out["evict"] = calls(lambda: evictor.evict(1))
    evictor.trim(0)
    out["evict a leaf"] = calls(lambda: evictor.evict(1))
    return out


@pytest.mark.parametrize("one_picture", [False, True], ids=["own pictures", "one picture"])
def test_work_does_not_grow_with_the_conversations_that_are_resident(one_picture):
    few, many = cost(FEW, one_picture), cost(MANY, one_picture)
    for name, count in few.items():
        assert many[name] <= 1.2 * count + 10, f"{name}: {count} calls among {FEW}, {many[name]} among {MANY}"
