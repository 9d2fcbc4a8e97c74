"""Selection on the device, before the scheduler knows of the prefill: the same choice as the scheduler's own."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.selection.random_prompt import LAYERS, Q_HEADS, SPANS, Prompt
from tgvkv_sglang.config import TgvConfig
from tgvkv_sglang.errors import ConfigError, SelectionError
from tgvkv_sglang.kv.nodes import Node, View
from tgvkv_sglang.kv.radix import Match
from tgvkv_sglang.request.state import Phase, RequestState
from tgvkv_sglang.selection.budget import VisionBudget
from tgvkv_sglang.selection.choose import choose, choose_on_device
from tgvkv_sglang.selection.grounding import Scores
from tgvkv_sglang.selection.policy import Model
from tgvkv_sglang.types import Span


@given(st.data())
def test_the_device_chooses_what_the_host_would(data):
    layers, tokens = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 30))
    numbers = st.integers(0, 5).map(float)
    scores = torch.tensor(data.draw(st.lists(st.lists(numbers, min_size=tokens, max_size=tokens), min_size=layers,
                                             max_size=layers)))  # fmt: skip
    mass = data.draw(st.lists(st.integers(0, 9).map(float), min_size=layers, max_size=layers))
    retention = Fraction(data.draw(st.integers(1, 99)), 100)
    known = Scores(scores, torch.tensor(mass), {})
    early = choose_on_device(known, VisionBudget(), retention)
    assert early.mask(tokens).tolist() == choose(known, VisionBudget(), retention, tokens).kept.tolist()


BAD = [float("nan"), float("inf"), float("-inf")]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("where", ["score", "layer", "mass", "everything"])
def test_a_choice_on_bad_numbers_has_the_right_size_and_stays_inside(bad, where):
    """The device cannot refuse: one decode step goes through this choice before the scheduler sees the numbers."""
    layers, tokens, retention = 5, 17, Fraction(2, 5)
    scores, mass = torch.rand(layers, tokens), torch.rand(layers)
    if where in ("score", "layer"):
        scores[2, slice(None) if where == "layer" else 3] = bad
    else:
        mass[slice(None) if where == "everything" else 2] = bad
        scores[:] = bad if where == "everything" else scores
    early = choose_on_device(Scores(scores, mass, {}), VisionBudget(), retention)
    counts = early.layer_ptr.diff()
    assert early.layer_ptr[0] == 0 and counts.sum() == len(early.columns) == retention * layers * tokens
    assert counts.min() >= 0 and counts.max() <= tokens
    assert early.columns.min() >= 0 and early.columns.max() < tokens
    assert early.mask(tokens).sum(1).tolist() == counts.tolist(), "no column twice"


def nothing_cached(*views: View) -> Match:
    """Nothing of the prompt is in the cache but spans of which ``views`` are left."""
    return Match(0, torch.empty(0, dtype=torch.int64), None, views=list(views))


def selected(prompt: Prompt, *kept_views: View) -> RequestState:
    """A request whose prefill has just been scored."""
    vision = sorted([*SPANS, *(Span(view.span.start, view.span.end) for view in kept_views)])
    request = RequestState("r", TgvConfig(retention=0.4, zero_bubble=True), False, vision, 23)
    request.matched(nothing_cached(*kept_views))
    assert request.begin_chunk(0, Model(LAYERS, Q_HEADS)) is not None and request.phase is Phase.SCORING
    request.grounding = prompt.ground([])
    request.scored(prompt.store)
    assert request.phase is Phase.CHOSEN
    return request


def as_sets(table, layer: int) -> set[tuple[int, int]]:
    units, positions = table.layer(layer)
    return set(zip(units.tolist(), positions.tolist(), strict=True))


def test_the_early_table_is_what_the_trees_views_will_be():
    prompt = Prompt()
    prompt.store.k_flat, prompt.store.v_flat = prompt.store.k_flat.float(), prompt.store.v_flat.float()
    prompt.q = prompt.q.float()
    request = selected(prompt)
    early = request.table(decode=True)
    assert early.spans == [(span.start, span.end) for span in SPANS]
    kept = choose(request.grounding.result(), VisionBudget(), Fraction("0.4"), 23).kept
    assert request.choose().kept.tolist() == kept.tolist()
    views, at = [], 0
    assert 0 < kept.sum() == len(early.parts[0]) < kept.numel()
    for span in SPANS:
        slots = prompt.row[span.start : span.end].long()
        node = Node(torch.zeros(len(span), dtype=torch.int64).numpy(), slots, start=span.start, atom=True)
        views.append(View(node, (0, 23), kept[:, at : at + len(span)], slots, prompt.store))
        at += len(span)
    request.decode_through(views, prompt.row)
    assert request.phase is Phase.DECODING and request.table(decode=True).parts == views
    for layer in range(LAYERS):
        assert as_sets(early, layer) == as_sets(request.table(decode=True), layer)


def test_a_decode_step_before_the_result_goes_through_kept_views_too():
    prompt = Prompt()
    prompt.store.k_flat, prompt.q = prompt.store.k_flat.float(), prompt.q.float()
    slots = torch.arange(3)
    kept_view = View(Node(slots.numpy(), slots, start=0, atom=True), (3, 5), torch.ones(LAYERS, 3, dtype=torch.bool),
                     slots, prompt.store)  # fmt: skip
    request = selected(prompt, kept_view)
    table = request.table(decode=True)
    assert table.spans == [(0, 3), *((span.start, span.end) for span in SPANS)]
    assert request.table(decode=True) is table, "made once, so that the batch's tables stay as they are"
    assert request.table(decode=False).parts == [kept_view]


def test_a_new_prefill_forgets_the_early_choice():
    prompt = Prompt()
    prompt.store.k_flat, prompt.q = prompt.store.k_flat.float(), prompt.q.float()
    request = selected(prompt)
    assert request.table(decode=True) is not None
    request.matched(nothing_cached())
    assert request.phase is Phase.PLANNED and request.table(decode=True) is None


def test_after_bad_numbers_decode_leaves_the_early_choice_for_the_spans_in_full():
    prompt = Prompt()
    prompt.store.k_flat, prompt.q = prompt.store.k_flat.float(), prompt.q.float()
    prompt.q[1] = float("nan")
    request = selected(prompt)
    early = request.table(decode=True)
    assert early.spans == [(span.start, span.end) for span in SPANS]
    with pytest.raises(SelectionError, match=r"layers \[1\]"):
        request.choose()
    request.decode_through([], prompt.row)  # what the scheduler does then
    assert request.table(decode=True) is None and request.phase is Phase.DECODING


def test_zero_bubble_needs_totals_that_are_known_beforehand():
    with pytest.raises(ConfigError, match="--tgvkv-zero-bubble cannot be used with --tgvkv-scope total"):
        TgvConfig(zero_bubble=True, scope="total")
    with pytest.raises(ConfigError, match="--tgvkv-zero-bubble must be true or false, got 1"):
        TgvConfig(zero_bubble=1)
