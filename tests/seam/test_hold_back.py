"""Which decode steps wait for a queued prefill's result: SGLang's own method, its batches, requests and our cache."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace
from typing import Iterator

import pytest
from sglang.srt.environ import envs
from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.server_args import ServerArgs
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from tests.seam.one_process import OneProcess, arguments, configured, picture
from tgvkv_sglang.sglang_seam.requests import state_of

PROMPT = [1, 2, *picture(0, 30), 3, 4, 5]
OTHER = [6, 7, *picture(1, 20), 8, 9]
TEXT = [11, 12, 13]


@pytest.fixture(scope="module", autouse=True)
def server_args(model_dir) -> Iterator[ServerArgs]:
    with configured(model_dir) as args:
        yield args


@pytest.fixture
def engine() -> OneProcess:
    return OneProcess()


@pytest.fixture
def held_back(server_args):
    def held_back(
        decodes: list[Req], queued: list[Req], mode=ForwardMode.DECODE, behind=ForwardMode.EXTEND, args=server_args
    ) -> bool:
        """Whether the batch that comes next waits until the queued one is processed."""
        last, batch = (ScheduleBatch(reqs=reqs, forward_mode=of, spec_algorithm=SpeculativeAlgorithm.NONE)
                       for reqs, of in ((queued, behind), (decodes, mode)))  # fmt: skip
        scheduler = object.__new__(Scheduler)
        scheduler.server_args, scheduler.require_mlp_sync = args, False
        scheduler.result_queue = deque([(last.copy(), SimpleNamespace())])
        return scheduler.is_disable_overlap_for_batch(batch, last_batch=last)

    return held_back


def started(engine: OneProcess, rid: str, ids: list[int], until: int | None = None) -> Req:
    """A request whose prefill runs; its result is queued."""
    req = engine.request(rid, ids)
    engine.schedule(req, until)
    engine.run(req)
    return req


def test_a_request_waits_for_its_own_selection(engine, held_back):
    req, other = started(engine, "a", PROMPT), started(engine, "b", TEXT)
    assert held_back([req], [req])
    assert held_back([other, req], [other, req]) and held_back([other, req], [req])
    engine.take_result(req)
    assert not held_back([req], [req]), "it has been made"


def test_nobody_waits_for_a_middle_chunk(engine, held_back):
    """The prompt is not at its end: nothing is selected when this chunk's result is processed."""
    chunked = started(engine, "chunked", PROMPT, until=33)
    running = engine.prefill("running", OTHER)
    assert state_of(chunked).grounding is not None
    assert not held_back([running], [chunked])
    last = started(engine, "last", [*OTHER[:-1], 21, 22])
    assert held_back([running, last], [last, chunked]), "another request's last chunk is in the same batch"


def test_nobody_waits_for_views_that_are_there_already(engine, held_back):
    """The same prompt again replays its view; a retracted request goes on with its own."""
    first = engine.prefill("first", PROMPT)
    again = started(engine, "again", PROMPT)
    assert state_of(again).plan.kept_views and not held_back([first, again], [again])
    engine.take_result(again)
    engine.decode(first)
    engine.retract(first)
    engine.schedule(first)
    engine.run(first)
    assert state_of(first).plan.kept_views and not held_back([first, again], [first])


def test_nobody_waits_where_nothing_is_grounded(engine, held_back):
    """No text after the image; no image at all."""
    bare, text = started(engine, "bare", PROMPT[:-3]), started(engine, "text", TEXT)
    assert state_of(bare) is not None and state_of(text) is None
    assert not held_back([bare, text], [bare, text])


def test_only_decode_waits_and_only_for_a_prefill(engine, held_back):
    req = started(engine, "a", PROMPT)
    assert not held_back([req], [req], mode=ForwardMode.EXTEND)
    assert not held_back([req], [req], behind=ForwardMode.DECODE)
    with envs.SGLANG_DISABLE_CONSECUTIVE_PREFILL_OVERLAP.override(True):
        assert held_back([req], [req], mode=ForwardMode.EXTEND), "where SGLang itself says so"


def test_zero_bubble_holds_nothing_back(engine, held_back, model_dir):
    req = started(engine, "a", PROMPT)
    assert held_back([req], [req]) and not held_back([req], [req], args=arguments(model_dir, "--tgvkv-zero-bubble"))
