"""Hooks that let a server with our backend run on a machine without a GPU."""

from __future__ import annotations

from typing import Any

from ..flags import BACKEND


def support_triton(original: Any, backend: str) -> bool:
    """Our backend supports Triton where CUDA does; the stock gate knows names only."""
    import torch

    if backend == BACKEND:
        return torch.cuda.is_available()
    return original(backend)
