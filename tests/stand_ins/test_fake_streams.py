"""The fake streams find what is not ordered, and only that."""

import pytest
import torch

from tests.fakes.streams import Streams


@pytest.fixture
def device() -> Streams:
    return Streams()


def two(device: Streams):
    return device.Stream(name="a"), device.Stream(name="b")


def on(device, stream, name, **places):
    with device.stream(stream):
        return device.run(name, **places)


def test_one_stream_is_in_order(device):
    device.run("write", writes=[1])
    device.run("read", reads=[1])
    device.run("write again", writes=[1])
    assert device.races == []


@pytest.mark.parametrize(
    "first, second, words",
    [
        ({"writes": [1]}, {"reads": [1]}, "reads what is written by 'first' on a"),
        ({"reads": [1]}, {"writes": [1]}, "writes over what is read by 'first' on a"),
        ({"writes": [1]}, {"writes": [1]}, "writes over what is written by 'first' on a"),
    ],
)
def test_two_streams_are_not_and_each_way_of_waiting_orders_them(first, second, words):
    def run(wait) -> list[str]:
        device = Streams()
        a, b = two(device)
        on(device, a, "first", **first)
        wait(device, a, b)
        on(device, b, "second", **second)
        return device.races

    (race,) = run(lambda device, a, b: None)
    assert words in race and race.startswith("'second' on b")
    assert run(lambda device, a, b: a.wait_stream(b)) == [race], "the wrong one waits"
    assert run(lambda device, a, b: b.wait_stream(a)) == []
    assert run(lambda device, a, b: b.wait_event(a.record_event())) == []
    assert run(lambda device, a, b: a.record_event().wait(b)) == []
    assert run(lambda device, a, b: a.synchronize()) == [], "the host waited before it issued the second"
    assert run(lambda device, a, b: a.record_event().synchronize()) == []


def test_reads_do_not_conflict_and_neither_do_other_places(device):
    a, b = two(device)
    on(device, a, "read", reads=[1], writes=[2])
    on(device, b, "read too", reads=[1], writes=[3])
    assert device.races == []


def test_an_event_knows_only_what_was_issued_before_it(device):
    a, b = two(device)
    on(device, a, "early", reads=[1])
    event = a.record_event()
    on(device, a, "late", reads=[2])
    b.wait_event(event)
    on(device, b, "over both", writes=[1, 2])
    assert len(device.races) == 1 and "'late'" in device.races[0]


def test_waiting_is_passed_on(device):
    a, b = two(device)
    c = device.Stream(name="c")
    on(device, a, "first", writes=[1])
    b.wait_stream(a)
    c.wait_stream(b)
    on(device, c, "last", reads=[1])
    assert device.races == []


def test_an_overlapping_move_does_not_conflict_with_itself(device):
    device.run("move", reads=[1, 2], writes=[2, 3])
    assert device.races == []


def test_torch_names_lead_here(device, monkeypatch):
    device.install(monkeypatch)
    stream, tensor = device.Stream(), torch.zeros(1)
    with torch.cuda.stream(stream):
        assert torch.cuda.current_stream("cuda") is stream
        tensor.record_stream(stream)
    assert torch.cuda.current_stream() is not stream and device.recorded == [(tensor, stream)]
