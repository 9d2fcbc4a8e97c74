"""Emulated CUDA graphs: a replay repeats operations on the addresses it saw, and what a capture refuses is refused."""

from types import SimpleNamespace

import pytest
import torch

from tests.fakes import steps_without_graph
from tests.fakes.graphs import RecordedGraph, opaque, telling_of_decode

X = torch.arange(4.0)
READS = {
    "cpu": lambda: X.cpu(),
    "tolist": lambda: X.tolist(),
    "numpy": lambda: X.numpy(),
    "item": lambda: X[0].item(),
    "int": lambda: int(X[1]),
    "if": lambda: 1 if X.sum() > 0 else 0,
    "pin_memory": lambda: X.pin_memory(),
    "an upload": lambda: torch.tensor([1, 2], device=X.device),
    "another": lambda: torch.as_tensor([1, 2], device="cpu"),
    "nonzero": lambda: X.nonzero(),
    "a mask": lambda: X[X > 1],
    "writing through a mask": lambda: X.clone().__setitem__(X > 1, torch.zeros(2)),
    "unique": lambda: X.unique(),
    "equal": lambda: torch.equal(X, X),
    "repeat_interleave": lambda: X.repeat_interleave(torch.ones(4, dtype=torch.int64)),
}


@pytest.mark.parametrize("kind", READS)
def test_reading_back_and_uploading_cannot_be_captured(kind):
    with pytest.raises(RuntimeError, match="CUDA graph cannot be captured"):
        RecordedGraph().record(READS[kind])
    if kind != "pin_memory":  # which needs a GPU
        RecordedGraph().record(opaque(READS[kind]))


def test_the_rest_can():
    def forward():
        table = torch.full((4,), 2.0, device=X.device)
        table[X > 1] = 0.0
        torch.tensor([1, 2])  # the host's own
        return table.repeat_interleave(torch.ones(4, dtype=torch.int64), output_size=4) + X[torch.tensor([0, 1, 2, 3])]

    assert RecordedGraph().record(forward).tolist() == [2, 3, 2, 3]


def test_a_replay_reads_the_same_addresses_and_runs_no_python():
    given, calls = torch.ones(3), []

    def forward():
        calls.append(1)
        return given * 2 + torch.ones(3)

    graph = RecordedGraph()
    out = graph.record(forward)
    given.fill_(5)
    graph.replay()
    assert out.tolist() == [11, 11, 11] and calls == [1]
    given = torch.zeros(3)  # another tensor: the graph does not know of it
    graph.replay()
    assert out.tolist() == [11, 11, 11]


def test_decode_steps_without_a_graph_are_told(capsys):
    run = telling_of_decode(lambda runner, batch: batch.batch_size)
    batch = lambda size, decode: SimpleNamespace(  # noqa: E731
        batch_size=size, forward_mode=SimpleNamespace(is_decode=lambda: decode)
    )
    assert [run(None, batch(3, True)), run(None, batch(7, False)), run(None, batch(2, True))] == [3, 7, 2]
    assert steps_without_graph(capsys.readouterr().out) == [3, 2]
