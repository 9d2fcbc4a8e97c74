"""Comparing a live server with the oracle, with argued tolerances.

The server computes in float32, the oracle in float64. Scores and masses of the two differ by some 1e-6 relative (read
off traces); decisions closer than ``EPS`` are excused one by one, and a test fails when more than a few are. A greedy
token is compared as long as no earlier logit gap of the oracle was below ``GAP``: from there on either continuation
is right.
"""

from __future__ import annotations

import numpy as np

from tests.oracle.oracle import Oracle, Turn
from tests.oracle.selection import Selection, budgets, check_kept
from tgvkv_sglang.testing.server import Answer, Server

EPS = 1e-4
GAP = 1e-3


def assert_tokens(answer: Answer, turn: Turn, gap: float = GAP, eps: float = EPS) -> int:
    """Compare greedy tokens (and their log probabilities, if asked for) up to the oracle's first toss-up.

    Log probabilities tell what a step attended to where its token does not. Returns how many were compared.
    """
    sure = next((i for i, one in enumerate(turn.gaps) if one < gap), len(turn.gaps))
    assert answer.ids[:sure] == turn.token_ids[:sure]
    if answer.logprobs:
        np.testing.assert_allclose(answer.logprobs[:sure], turn.logprobs[:sure], atol=eps, rtol=0)
    return sure


def assert_selection(server: Server, rid: str, selection: Selection, number: int = 0, eps: float = EPS) -> dict:
    """Compare a trace with the oracle's selection: what was scored, by what, how, and what was kept."""
    arrays, meta = server.trace(rid, number)
    assert arrays["vision_positions"].tolist() == list(selection.vision_positions)
    assert arrays["grounding_positions"].tolist() == list(selection.grounding_positions)
    np.testing.assert_allclose(arrays["text_weights"], selection.text_weights, rtol=eps)
    np.testing.assert_allclose(arrays["scores"], selection.scores, rtol=eps)
    np.testing.assert_allclose(arrays["layer_mass"], selection.layer_mass, rtol=eps)
    check_kept(arrays["kept"], selection, eps)
    assert_budget(arrays, meta, selection)
    return {**arrays, "meta": meta}


def assert_budget(arrays: dict, meta: dict, selection: Selection) -> None:
    """A trace's budgets are the oracle's for the trace's own masses, exactly, and they are what was kept.

    The device makes them in float64 and the trace counts what was kept: this is where they meet exact arithmetic.
    """
    tokens = len(selection.vision_positions), selection.num_text
    _, budget = budgets(arrays["layer_mass"].tolist(), meta["retention"], *tokens, meta["scope"])
    assert arrays["budget"].tolist() == budget
    assert arrays["kept"].sum(1).tolist() == budget


def ids_of(oracle: Oracle, text: str) -> list[int]:
    return oracle.tokenizer.encode(text, add_special_tokens=False)
