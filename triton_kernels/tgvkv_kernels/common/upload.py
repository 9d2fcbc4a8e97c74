"""Small host tables to the device without waiting for it."""

import torch


def upload(table: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """``table`` (on the host) on the device; a CUDA copy is queued from pinned memory."""
    pinned = table.pin_memory() if torch.device(device).type == "cuda" else table
    return pinned.to(device, non_blocking=True)
