"""Hooks that carry per-request state from the scheduler to the backend, and order selection before decode."""

from __future__ import annotations

from typing import Any

from ..errors import WrongBatchError
from ..request.state import RequestState
from .requests import state_of
from .server_args import config_of

_current: list[RequestState | None] | None = None


def current_states() -> list[RequestState | None] | None:
    """States of the batch whose forward is being prepared, by row; None when no request of it has one."""
    return _current


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
    global _current
    states = [state_of(req) for req in batch.reqs] if config_of(model_runner.server_args) is not None else []
    _current = states if any(state is not None for state in states) else None


def is_disable_overlap_for_batch(original: Any, self: Any, batch: Any, last_batch: Any) -> bool:
    """Process a finished prefill before the decode step that would race its selection; all else overlaps as in SGLang.

    With ``--tgvkv-zero-bubble`` that step goes through the selection made on the device, and nothing is held back.
    The queued batch's own copy tells its mode: ``last_batch`` may have been turned into the decode batch already.
    """
    if original(self, batch, last_batch):
        return True
    config = config_of(self.server_args)
    if config is None or config.zero_bubble or not self.result_queue:
        return False
    if batch is None or not batch.forward_mode.is_decode():
        return False
    queued = self.result_queue[0][0]
    return queued.forward_mode.is_extend() and any(_selects(req) and req in batch.reqs for req in queued.reqs)


def _selects(req: Any) -> bool:
    """Whether a request of a queued prefill has scores to select from.

    If it also decodes next, that prefill was its last chunk: SGLang keeps a request out of decode until then.
    """
    state = state_of(req)
    return state is not None and state.grounding is not None
