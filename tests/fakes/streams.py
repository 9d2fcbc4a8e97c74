"""CUDA streams on the CPU: who ran what after whom, and whether two accesses to one place in memory were ordered.

Nothing runs asynchronously here. Each operation gets a vector clock: it comes after what its stream has run, after
what that stream has waited for, and after what the host had waited for when it was issued. Two operations that touch
the same place, at least one of them writing, must be ordered that way; the order in which the host issued them is none.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Iterable

import torch

Clock = dict["Stream", int]


def _join(clock: Clock, other: Clock) -> None:
    for stream, count in other.items():
        clock[stream] = max(clock.get(stream, 0), count)


class Event:
    """``torch.cuda.Event``: what a stream had run and waited for when it was recorded."""

    def __init__(self, device: "Streams"):
        self._device = device
        self.seen: Clock = {}

    def record(self, stream: "Stream | None" = None) -> None:
        self.seen = dict((stream or self._device.current_stream()).seen)

    def wait(self, stream: "Stream | None" = None) -> None:
        (stream or self._device.current_stream()).wait_event(self)

    def synchronize(self) -> None:
        _join(self._device.host, self.seen)


class Stream:
    """``torch.cuda.Stream``. ``seen``: what any operation issued on it from now on comes after."""

    def __init__(self, device: "Streams", name: str):
        self._device, self.name = device, name
        self.seen: Clock = {}

    def __repr__(self) -> str:
        return self.name

    def wait_stream(self, other: "Stream") -> None:
        _join(self.seen, other.seen)

    def wait_event(self, event: Event) -> None:
        _join(self.seen, event.seen)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or self._device.Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        _join(self._device.host, self.seen)


@dataclass
class Operation:
    """Something that ran on a stream."""

    name: str
    stream: Stream
    clock: Clock

    def before(self, other: "Operation") -> bool:
        return other.clock.get(self.stream, 0) >= self.clock[self.stream]

    def __str__(self) -> str:
        return f"{self.name!r} on {self.stream}"


@dataclass
class _Place:
    written: Operation | None = None
    read: list[Operation] = field(default_factory=list)


class _On:
    """``torch.cuda.stream(stream)``; may be entered again and again."""

    def __init__(self, device: "Streams", stream: Stream):
        self._device, self._stream = device, stream

    def __enter__(self) -> Stream:
        self._device.stack.append(self._stream)
        return self._stream

    def __exit__(self, *error: object) -> None:
        self._device.stack.pop()


class Streams:
    """One device. Has the names that SGLang takes from ``torch.cuda`` as its ``device_module``.

    Attributes:
        host: what the host has waited for.
        stack: streams that are current, the innermost last.
        operations: all of them, as issued.
        races: pairs of accesses that nothing orders, in words.
        recorded: tensors given to ``record_stream``, with the stream.
    """

    def __init__(self) -> None:
        self.host: Clock = {}
        self.stack = [Stream(self, "default stream")]
        self.operations: list[Operation] = []
        self.races: list[str] = []
        self.recorded: list[tuple[torch.Tensor, Stream]] = []
        self._places: dict[int, _Place] = {}

    def install(self, monkeypatch) -> None:
        """Stand in for ``torch.cuda``'s streams for the rest of a test."""
        monkeypatch.setattr(torch.cuda, "current_stream", self.current_stream)
        monkeypatch.setattr(torch.cuda, "stream", self.stream)
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, on: self.recorded.append((tensor, on)))

    def Stream(self, priority: int = 0, name: str = "stream") -> Stream:  # noqa: N802 - torch's name
        return Stream(self, name)

    def Event(self) -> Event:  # noqa: N802 - torch's name
        return Event(self)

    def stream(self, stream: Stream) -> _On:
        return _On(self, stream)

    StreamContext = stream

    def current_stream(self, device: object = None) -> Stream:
        return self.stack[-1]

    def run(self, name: str, reads: Iterable[int] = (), writes: Iterable[int] = ()) -> Operation:
        """An operation on the current stream: it reads, then it writes, places named by numbers."""
        stream = self.current_stream()
        _join(stream.seen, self.host)
        stream.seen[stream] = stream.seen.get(stream, 0) + 1
        operation = Operation(name, stream, dict(stream.seen))
        self.operations.append(operation)
        for number in set(reads):
            place = self._places.setdefault(number, _Place())
            self._check(place.written, operation, "reads what is written by")
            place.read.append(operation)
        for number in set(writes):
            place = self._places.setdefault(number, _Place())
            for earlier in place.read:
                self._check(earlier, operation, "writes over what is read by")
            self._check(place.written, operation, "writes over what is written by")
            place.written, place.read = operation, []
        return operation

    def _check(self, earlier: Operation | None, later: Operation, what: str) -> None:
        if earlier is None or earlier is later or earlier.before(later):
            return
        race = f"{later} {what} {earlier}, and nothing orders the two"
        if race not in self.races:
            self.races.append(race)
