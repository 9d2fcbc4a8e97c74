"""Decode before the scheduler has seen the prefill's result: through what was chosen on the device."""

from fractions import Fraction

import pytest
import torch

from tests.unit.selection.random_prompt import LAYERS, SPANS, N, Prompt, run
from tgvkv_sglang.config import TgvConfig
from tgvkv_sglang.errors import SelectionError
from tgvkv_sglang.kv.nodes import Node, View
from tgvkv_sglang.kv.radix import Match
from tgvkv_sglang.kv.views import ViewTable
from tgvkv_sglang.request.state import Phase, RequestState
from tgvkv_sglang.types import Span


def nothing_cached(*views: View) -> Match:
    """Nothing of the prompt is in the cache but spans of which ``views`` are left."""
    return Match(0, torch.empty(0, dtype=torch.int64), None, views=list(views))


def selected(prompt: Prompt, *kept_views: View) -> RequestState:
    """A request whose prefill has just run."""
    vision = sorted([*SPANS, *(Span(view.span.start, view.span.end) for view in kept_views)])
    request = RequestState("r", TgvConfig(retention=0.4), False, vision, N)
    request.matched(nothing_cached(*kept_views))
    grounding = request.begin_chunk(0)
    assert grounding.quota.retention == Fraction("0.4") and request.phase is Phase.SCORING
    run([(prompt, grounding)], 0, N)
    return request


def as_sets(table: ViewTable, layer: int) -> set[tuple[int, int]]:
    units, positions = table.layer(layer)
    return set(zip(units.tolist(), positions.tolist(), strict=True))


def test_the_early_table_is_what_the_trees_views_will_be():
    prompt = Prompt()
    request = selected(prompt)
    early = request.table(decode=True)
    assert early.spans == [(span.start, span.end) for span in SPANS]
    choice, views, at = request.choose(), [], 0
    assert 0 < choice.mask().sum() == len(early.parts[0]) < choice.mask().size
    for span in SPANS:
        slots = prompt.row[span.start : span.end].long()
        node = Node(torch.zeros(len(span), dtype=torch.int64).numpy(), slots, start=span.start, atom=True)
        views.append(View(node, (0, N), *choice.part(at, len(span)), slots, prompt.store))
        at += len(span)
    request.decode_through(views, prompt.row)
    assert request.phase is Phase.DECODING and request.table(decode=True).parts == views
    for layer in range(LAYERS):
        assert as_sets(early, layer) == as_sets(request.table(decode=True), layer)


def test_a_decode_step_before_the_result_goes_through_kept_views_too():
    prompt = Prompt()
    slots = torch.arange(3)
    kept_view = View(Node(slots.numpy(), slots, start=0, atom=True), (3, 5), slots.repeat(LAYERS).to(torch.int32),
                     [3] * LAYERS, slots, prompt.store)  # fmt: skip
    request = selected(prompt, kept_view)
    table = request.table(decode=True)
    assert table.spans == [(0, 3), *((span.start, span.end) for span in SPANS)]
    assert request.table(decode=True) is table, "made once, so that the batch's tables stay as they are"
    assert request.table(decode=False).parts == [kept_view]


def test_a_new_prefill_forgets_the_early_choice():
    request = selected(Prompt())
    assert request.table(decode=True) is not None
    request.matched(nothing_cached())
    assert request.phase is Phase.PLANNED and request.table(decode=True) is None


def test_after_bad_numbers_decode_leaves_the_early_choice_for_the_spans_in_full():
    prompt = Prompt()
    prompt.q[1] = float("nan")
    request = selected(prompt)
    early = request.table(decode=True)
    assert early.spans == [(span.start, span.end) for span in SPANS]
    with pytest.raises(SelectionError, match=r"layers \[1\]"):
        request.choose()
    request.decode_through([], prompt.row)  # what the scheduler does then
    assert request.table(decode=True) is None and request.phase is Phase.DECODING
