"""A policy that is told which vision tokens hold the answer, to compare with.

A request's id ends with their numbers, as ``...-12.45.67`` (:meth:`bench.quality.boards.Chat.name`).
"""

import torch

from tgvkv_sglang.device import upload
from tgvkv_sglang.selection.policies.attention_sums import AttentionSums, attention_sums
from tgvkv_sglang.selection.policy import Asked, BlockScores, LayerBlock


class Evidence(AttentionSums):
    """``score_v`` is 1 for a token of the answer, else 0; layers weigh as the paper's."""

    def score(self, block: LayerBlock) -> BlockScores:
        sums = attention_sums(block)
        scores = upload(torch.cat([_told(request) for request in block.requests]), sums.scores.device)
        return BlockScores(scores.expand_as(sums.scores).contiguous(), sums.mass, sums.extras)


def _told(request: Asked) -> torch.Tensor:
    tokens = [int(number) for number in request.name.rpartition("-")[2].split(".") if number.isdecimal()]
    return torch.zeros(len(request.vision)).index_fill_(0, torch.tensor(tokens, dtype=torch.int64), 1.0)
