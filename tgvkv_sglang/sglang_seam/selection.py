"""Turning a finished prefill's scores into views on the tree, and into a trace when the request asked for one."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from sglang.srt.environ import envs

from .. import __version__
from ..attention.grounding import Grounding, Scores
from ..attention.state import RequestState
from ..errors import NeverScoredError, SelectionError
from ..kv.nodes import View
from ..kv.radix import Inserted, SpanTree
from ..scoring.select import keep_top, layer_budgets, usable_masses
from ..spans import with_text
from ..trace import try_write_trace
from .ledger import SGLANG_VERSION
from .requests import image_grids
from .tensor_parallel import is_first_rank

logger = logging.getLogger(__name__)

failed_requests = 0
"""Requests of this process that decode on whole images because a selection of theirs failed."""


def select_views(tree: SpanTree, state: RequestState, inserted: Inserted, req: Any) -> list[View]:
    """Select for every span of the finished grounding; attach the views where the grounding ends.

    To be called once the whole prompt has run. Scores that cannot be used cost the request its views: nothing is
    attached, so that it attends to the spans in full, and they stay where they are as long as it runs.

    Returns:
        The new views (or equal ones that were there already); empty when nothing was to be selected, or it failed.

    Raises:
        NeverScoredError: a layer was not scored, and SGLang's strict memory checks are on (as in tests). Without them
            that too costs the request its views only.
    """
    if not len(state.grounding_text()):
        return []
    try:
        grounding = _grounding(state)
        scores = grounding.result()
        kept, budget = _choose(state, scores)
    except SelectionError as error:
        if isinstance(error, NeverScoredError) and envs.SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY.get():
            raise
        _go_on_in_full(state, error)
        return []
    if state.trace and state.config.trace_dir and is_first_rank():
        _trace(state, grounding, scores, budget, kept, req)
    state.selections += 1
    nodes, views, at = inserted.span_nodes(), [], 0
    for span in grounding.spans:
        node = nodes[span.start]
        view = View(node, grounding.new_text, kept[:, at : at + len(span)], node.value, tree.store)
        views.append(tree.attach(view, inserted.node))
        at += len(span)
    return views


def _grounding(state: RequestState) -> Grounding:
    if state.grounding is None:
        raise NeverScoredError(f"no layer was scored, {len(state.grounding_text())} tokens of text should have been")
    return state.grounding


def _go_on_in_full(state: RequestState, error: SelectionError) -> None:
    """Count and report a request without a view, once, however often it is retracted and selects again."""
    global failed_requests
    if state.selection_failed:
        return
    state.selection_failed = True
    failed_requests += 1
    if is_first_rank():
        spans = ", ".join(f"[{span.start}, {span.end})" for span in state.plan.select)
        logger.error(
            "tgvkv: request %r decodes on its whole images at tokens %s, nothing was selected: %s. Such requests so "
            "far: %d. If it recurs, serve with --dtype bfloat16 (float16 overflows), or report it with this log.",
            state.rid, spans, error, failed_requests,
        )  # fmt: skip


def _choose(state: RequestState, scores: Scores) -> tuple[torch.Tensor, list[int]]:
    """(``kept [L, V]`` bool, budget of each layer); what was chosen early stays chosen. Raises SelectionError."""
    masses = usable_masses(scores.scores, scores.layer_mass)
    if state.early is not None:
        kept = state.early.mask(scores.scores.shape[1])
        return kept, kept.sum(1).tolist()
    config = state.config
    budget = layer_budgets(
        masses,
        vision_tokens=scores.scores.shape[1],
        tokens=state.prompt_len - sum(len(view.span) for view in state.plan.kept_views),
        retention=config.exact_retention,
        scope=config.scope,
    )
    return keep_top(scores.scores, budget), budget


def _trace(
    state: RequestState, grounding: Grounding, scores: Scores, budget: list[int], kept: torch.Tensor, req: Any
) -> None:
    ids = np.asarray(req.origin_input_ids, dtype=np.int64)
    arrays = {
        "token_ids": ids,
        "spans": np.array([(s.kind, s.start, s.end) for s in with_text(state.vision, len(ids))], dtype=np.int64),
        "vision_positions": grounding.vision_positions.numpy(),
        "grounding_positions": grounding.text_positions.numpy(),
        "text_weights": scores.text_weights.float().cpu().numpy(),
        "scores": scores.scores.float().cpu().numpy(),
        "layer_mass": scores.layer_mass.float().cpu().numpy(),
        "budget": np.asarray(budget, dtype=np.int64),
        "kept": kept.cpu().numpy(),
    }
    config = state.config
    meta = {
        "rid": state.rid,
        "retention": config.retention,
        "scope": config.scope,
        "policy": config.policy,
        "grounding_cap": config.grounding_cap,
        "grids": image_grids(req.multimodal_inputs),
        "versions": {"tgvkv-sglang": __version__, "sglang": SGLANG_VERSION, "torch": torch.__version__},
    }
    try_write_trace(config.trace_dir, state.rid, state.selections, arrays, meta)
