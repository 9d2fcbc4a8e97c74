"""SGLang plugin for tests: memory is pinned in name only, since that needs CUDA. SGLang's LoRA layers ask for it."""

from __future__ import annotations

from functools import wraps
from typing import Any, Callable

import torch


def _unpinned(make: Callable) -> Callable:
    @wraps(make)
    def made(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        return make(*args, **kwargs)

    return made


def activate() -> None:
    torch.Tensor.pin_memory = lambda tensor, *_: tensor
    for name in ("tensor", "empty", "zeros"):
        setattr(torch, name, _unpinned(getattr(torch, name)))
