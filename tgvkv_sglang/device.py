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


class HostCopy:
    """Device tensors on their way to the host. The copies start now, behind what the current stream has to do."""

    def __init__(self, *tensors: torch.Tensor):
        self._tensors = [tensor.to("cpu", non_blocking=True) for tensor in tensors]
        self._arrived: torch.cuda.Event | None = None
        if any(tensor.device.type == "cuda" for tensor in tensors):
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def tensors(self) -> list[torch.Tensor]:
        """The tensors on the host. Waits for the copies, which is no wait once a later event of that stream is over."""
        if self._arrived is not None:
            self._arrived.synchronize()
            self._arrived = None
        return self._tensors
