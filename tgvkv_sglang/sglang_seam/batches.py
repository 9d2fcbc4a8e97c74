"""The hook that carries per-request state from the scheduler to the backend."""

from __future__ import annotations

from typing import Any

from ..errors import WrongBatchError
from ..request.state import RequestState
from .requests import state_of
from .server_args import config_of

_current: list[RequestState | None] | None = None
_page_rows: list[int] = []


def current_states() -> list[RequestState | None] | None:
    """States of the batch whose forward is being prepared, by row; None when no request of it has one."""
    return _current


def page_rows() -> list[int]:
    """Page-table rows of the same batch, as the host knows them; empty when no request of it has a state."""
    return _page_rows


def states_of(forward_batch: Any) -> list[RequestState | None] | None:
    """:func:`current_states` for a batch that a backend is given; None also for an idle batch.

    Raises:
        WrongBatchError: the batch is another one than :func:`after_init_new` saw.
    """
    if _current is None or forward_batch.forward_mode.is_idle():
        return None
    if len(_current) != forward_batch.batch_size:
        raise WrongBatchError(
            f"{len(_current)} request states for a batch of {forward_batch.batch_size}: this is not the batch that was "
            "prepared last; please report this with the server's flags"
        )
    return _current


def after_init_new(result: Any, cls: type, batch: Any, model_runner: Any, **kwargs: Any) -> None:
    """Runs right before the forward of ``batch``, in the same thread."""
    global _current, _page_rows
    states = [state_of(req) for req in batch.reqs] if config_of(model_runner.server_args) is not None else []
    _current = states if any(state is not None for state in states) else None
    _page_rows = [req.req_pool_idx for req in batch.reqs] if _current is not None else []
