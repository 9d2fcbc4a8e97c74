"""Prompts and small steps for the examples of the rules: requests that run on the stand-in engine."""

import torch

from tests.unit.kv.radix_engine import Engine, Request
from tgvkv_sglang.spans import VISION_PAD_BASE

IMAGE, OTHER = [VISION_PAD_BASE + 1] * 9, [VISION_PAD_BASE + 2] * 6
SYSTEM, WHAT, WHERE = [1, 2, 3, 4], [11, 12, 13], [11, 22, 23]
LAYERS = 3


def new_engine() -> Engine:
    return Engine(capacity=100, layers=LAYERS)


def finished(engine: Engine, prompt: list[int], output: list[int] = ()) -> Request:
    req = engine.serve(prompt, output)
    engine.finish(req, engine.first_third)
    return req


def reclaim(engine: Engine) -> int:
    return engine.evictor.trim(0)


def evict(engine: Engine, slots: int) -> int:
    """Evict, and check that the tree promises that much less afterwards."""
    before = engine.evictor.evictable
    freed = engine.evictor.evict(slots)
    assert engine.evictor.evictable == before - freed
    return freed


def keep_everything(tokens: int) -> torch.Tensor:
    return torch.ones(LAYERS, tokens, dtype=torch.bool)


def span_nodes(engine: Engine) -> list:
    return [node for node in engine.tree.nodes() if node.atom]


def match(engine: Engine, prompt: list[int]):
    return engine.match(engine.request(prompt))
