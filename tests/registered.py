"""Policies of packages that are installed for one test only."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

import pytest

from tgvkv_sglang import registry


@contextmanager
def other_packages(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[None]:
    """``folder`` is on the import path; what the registry has found is forgotten before and after."""
    with monkeypatch.context() as patch:
        patch.syspath_prepend(str(folder))
        registry.refresh()
        yield
    registry.refresh()
