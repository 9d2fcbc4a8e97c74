"""Start-up of the worker processes. Imports nothing that could import Triton before the environment is set."""

import os
import sys


def _start() -> None:
    assert "triton" not in sys.modules, "Triton was imported before its environment was set"
    import torch

    torch.set_num_threads(1)


def start_interpreter() -> None:
    """Triton interprets, and torch fills what `empty` returns with NaN (floats) or the largest value (integers)."""
    os.environ["TRITON_INTERPRET"] = "1"
    _start()
    import torch

    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    poisoned = torch.empty(3)
    assert bool(poisoned.isnan().all()), "torch.empty is not poisoned: the tests would miss reads of stale memory"


def start_compiler() -> None:
    """Triton compiles; nothing runs."""
    os.environ.pop("TRITON_INTERPRET", None)
    _start()
