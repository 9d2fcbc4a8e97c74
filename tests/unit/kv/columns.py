"""Kept tokens said as a mask, as what a view is made of."""

import torch


def columns_of(kept: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
    """``[L, V]`` bool -> the kept columns layer by layer, int32, and how many of each layer."""
    return kept.nonzero()[:, 1].to(torch.int32), kept.sum(1).tolist()
