"""A choice by chance: what any policy must beat."""

from __future__ import annotations

import hashlib

import torch

from ...device import upload
from ..policy import Asked, BlockScores, LayerBlock
from .attention_sums import AttentionSums, attention_sums

SEED = 0


class Random(AttentionSums):
    """``score_v`` uniform in [0, 1), a function of the seed, the request's name and the layer: the same on every rank,
    in every batch, and when a request is prefilled again."""

    budget = "uniform"

    def score(self, block: LayerBlock) -> BlockScores:
        sums = attention_sums(block)
        layers = range(block.first, block.first + block.layers)
        drawn = torch.stack([torch.cat([_draw(request, layer) for request in block.requests]) for layer in layers])
        return BlockScores(upload(drawn, sums.scores.device), sums.mass, sums.extras)


def _draw(request: Asked, layer: int) -> torch.Tensor:
    key = f"{SEED}/{layer}/{request.name}".encode("utf-8", "surrogatepass")
    seed = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest()) >> 1
    return torch.rand(len(request.vision), generator=torch.Generator().manual_seed(seed))
