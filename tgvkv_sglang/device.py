"""Small host data to the device, without waiting for the copy."""

from __future__ import annotations

from typing import Sequence

import torch


def upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A host tensor on ``device``. From pageable memory CUDA would make the host wait for the stream."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def to_device(values: Sequence[int], device: torch.device, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    """A small host list on ``device``."""
    return upload(torch.tensor(values, dtype=dtype), device)
