"""What tests against live servers read out of logs, on lines as SGLang 0.5.17 writes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tgvkv_sglang.testing.log_text import memory_checks, prefills_beside_one, retractions, rounds, slots_by_owner
from tgvkv_sglang.testing.server import Server

CHECK = "[2026-01-01 10:00:00{rank}] [Mem Check (BUSY)] self.max_total_num_tokens=100 {owners}\n"
BUSY = "available=60, evictable=20, protected=12, uncached=8"
IDLE = "available=60, evictable=40, protected=0, uncached=0"
PREFILL = "Prefill batch, #new-seq: 1, #new-token: {new}, #cached-token: {cached}, {usage}#running-req: {running},\n"


def test_memory_checks_by_rank():
    log = "".join(CHECK.format(rank=rank, owners=o) for rank, o in ((" TP0", BUSY), (" TP1", IDLE), (" TP0", IDLE)))
    assert [check.endswith(BUSY) for check in memory_checks(log, 0)] == [True, False]
    assert len(memory_checks(log, 1)) == 1 and not memory_checks(log, 2)
    single = memory_checks(CHECK.format(rank="", owners=BUSY))
    assert slots_by_owner(single[0]) == {
        "max_total_num_tokens": 100, "available": 60, "evictable": 20, "protected": 12, "uncached": 8,
    }  # fmt: skip


def test_retractions_cut_the_log():
    log = "a\nKV cache pool is full. Retract requests. #retracted_reqs: 1\nb\nTesting retraction. #retracted_reqs: 2\nc"
    assert retractions(log) == 2 and retractions("--retract-all") == 0
    assert [letter in part for letter, part in zip("abc", rounds(log), strict=True)] == [True] * 3


def test_prefills_that_took_nothing_from_the_cache_beside_one_other_request():
    usage = "token usage: 0.10, "
    log = "".join(PREFILL.format(new=new, cached=cached, usage=usage, running=running)
                  for new, cached, running in ((40, 0, 1), (39, 0, 2), (38, 7, 1), (12, 0, 1)))  # fmt: skip
    assert prefills_beside_one(log) == [40, 12]


def server(directory: Path, log: str) -> Server:
    (directory / "server.log").write_text(log)
    return Server("http://127.0.0.1:1", directory / "server.log", directory / "traces", tokens=100)


def test_memory_is_that_of_the_last_check(tmp_path):
    log = CHECK.format(rank="", owners=BUSY) + CHECK.format(rank="", owners=IDLE)
    assert server(tmp_path, log).memory()["evictable"] == 40


@pytest.mark.parametrize(
    "log, said",
    [("ready\n", "no memory check"), (CHECK.format(rank="", owners=BUSY), "never became idle.*'uncached': 8")],
)
def test_memory_that_cannot_be_told_says_why(tmp_path, monkeypatch, log, said):
    monkeypatch.setattr("tgvkv_sglang.testing.server.time.sleep", lambda seconds: None)
    with pytest.raises(RuntimeError, match=said):
        server(tmp_path, log).memory()
