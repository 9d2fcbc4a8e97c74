"""What becomes known of selections: a trace for requests that ask for one, a log line for failures."""

from __future__ import annotations

import logging

import numpy as np
import torch
from sglang.srt.environ import envs

from .. import __version__
from ..errors import NeverScoredError, SelectionError
from ..request.state import RequestState
from ..selection.choose import Choice
from ..spans import with_text
from ..trace import try_write_trace
from .held_request import HeldRequest
from .ledger import SGLANG_VERSION
from .requests import image_grids
from .tensor_parallel import is_first_rank

logger = logging.getLogger(__name__)


class Selections:
    """Told of each selection (:class:`tgvkv_sglang.request.lifecycle.Witness`).

    Attributes:
        failed_requests: requests that decode on whole images because a selection of theirs failed.
    """

    def __init__(self) -> None:
        self.failed_requests = 0

    def selected(self, held: HeldRequest, choice: Choice) -> None:
        state = held.state
        if state.trace and state.config.trace_dir and is_first_rank():
            write_trace(held, choice)

    def failed(self, state: RequestState, error: SelectionError) -> None:
        """Count and report a request without a view, once, however often it is retracted and selects again.

        Raises:
            NeverScoredError: where SGLang's strict memory checks are on, as in tests: that is a bug.
        """
        if isinstance(error, NeverScoredError) and envs.SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY.get():
            raise error
        if state.selection_failed:
            return
        state.selection_failed = True
        self.failed_requests += 1
        if is_first_rank():
            spans = ", ".join(f"[{span.start}, {span.end})" for span in state.plan.select)
            logger.error(
                "tgvkv: request %r decodes on its whole images at tokens %s, nothing was selected: %s. Such requests "
                "so far: %d. If it recurs, serve with --dtype bfloat16 (float16 overflows), or report it with this "
                "log.",
                state.rid, spans, error, self.failed_requests,
            )  # fmt: skip


def write_trace(held: HeldRequest, choice: Choice) -> None:
    """Write a selection's trace; one that cannot be written costs the trace alone."""
    state, req, config = held.state, held.req, held.state.config
    grounding, ids = state.grounding, np.asarray(req.origin_input_ids, dtype=np.int64)
    asked, chosen = grounding.asked, grounding.chosen
    arrays = {
        "token_ids": ids,
        "spans": np.array([(s.kind, s.start, s.end) for s in with_text(state.vision, len(ids))], dtype=np.int64),
        "vision_positions": asked.vision.numpy(),
        "grounding_positions": asked.text.numpy(),
        "scores": chosen.scores.float().cpu().numpy(),
        "layer_mass": chosen.mass.float().cpu().numpy(),
        "layer_weights": chosen.weights.float().cpu().numpy(),
        "budget": np.asarray(choice.budget, dtype=np.int64),
        "kept": choice.mask(),
        **{name: extra.float().cpu().numpy() for name, extra in chosen.extras.items()},
    }
    meta = {
        "rid": state.rid,
        "retention": config.retention,
        "scope": config.scope,
        "policy": config.policy,
        "budget_rule": config.rule,
        "grounding_cap": config.grounding_cap,
        "grids": image_grids(req.multimodal_inputs),
        "versions": {"tgvkv-sglang": __version__, "sglang": SGLANG_VERSION, "torch": torch.__version__},
    }
    try_write_trace(config.trace_dir, state.rid, state.selections, arrays, meta)
