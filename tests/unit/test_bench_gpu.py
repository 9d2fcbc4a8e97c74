"""The GPU programme without a GPU, a server or SGLang: plan, budget, resumption, dropping, orchestration."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import replace

import pytest

from bench.gpu import run_all
from bench.gpu.programme import Cell, Load, Part, ServerSpec, choose, cpu_programme, gpu_programme
from bench.gpu.results import Results, copy_results, read
from bench.gpu.servers import Setup, command, environment

SERVER = ServerSpec("one", "demo", "tgvkv", 100)


def cell(name: str, seconds: float, priority: int, group: str = "") -> Cell:
    return Cell(name, "load", seconds, priority, "one", Load(1), group)


PARTS = (
    Part("a", (cell("headline", 10, 1), cell("extra", 10, 3)), (SERVER,), 20),
    Part("b", (cell("second", 10, 2), cell("pair 1", 10, 3, "pair"), cell("pair 2", 10, 3, "pair")), (SERVER,), 20),
)


def names(choice) -> dict[str, list[str]]:
    return {part: [cell.name for cell in cells] for part, cells in choice.cells.items()}


# -- plan ----------------------------------------------------------------------------------------------------------


def test_everything_fits_when_there_is_time():
    choice = choose(PARTS, 90)
    assert names(choice) == {"a": ["headline", "extra"], "b": ["second", "pair 1", "pair 2"]}
    assert choice.seconds == {"a": 40, "b": 50} and choice.total == 90 and choice.dropped == ()


@pytest.mark.parametrize(
    "budget, expected",
    [
        (89, {"a": ["headline", "extra"], "b": ["second"]}),  # the pair does not fit whole, so neither of it is taken
        (69, {"a": ["headline"], "b": ["second"]}),
        (59, {"a": ["headline", "extra"]}),
        (29, {}),
        (0, {}),
        (-5, {}),
    ],
)
def test_what_does_not_fit_is_dropped_by_priority(budget, expected):
    choice = choose(PARTS, budget)
    assert names(choice) == expected and choice.total <= max(budget, 0)
    every = {f"{part.name}/{cell.name}" for part in PARTS for cell in part.cells}
    taken = {f"{part}/{name}" for part, cells in expected.items() for name in cells}
    assert set(choice.dropped) == every - taken


def test_what_is_done_costs_nothing():
    done = {PARTS[0].key(PARTS[0].cells[0])}
    choice = choose(PARTS[:1], 30, done)
    assert names(choice) == {"a": ["extra"]} and choice.seconds == {"a": 30} and choice.dropped == ()


def test_keys_follow_the_settings_and_nothing_else():
    part = PARTS[0]
    key = part.key(part.cells[0])
    assert key == part.key(replace(part.cells[0], seconds=99, priority=9, group="x"))
    assert key != part.key(replace(part.cells[0], load=Load(2)))
    other = Part("a", part.cells, (replace(SERVER, flags=("--x",)),), 20)
    assert key != other.key(part.cells[0])


def test_a_cell_needs_a_server_of_its_part():
    with pytest.raises(ValueError, match="c.*: no such server for cell.*lonely"):
        Part("c", (replace(cell("lonely", 1, 1), server="two"),), (SERVER,))


@pytest.mark.parametrize("bad", [{"users": 0}, {"images": -1}, {"answer": (5, 4)}, {"text": 0}])
def test_bad_loads_are_refused(bad):
    with pytest.raises(ValueError, match="must be positive"):
        Load(**{"users": 1, **bad})


def test_the_programme_fits_its_budget_and_begins_with_the_headline():
    parts = gpu_programme()
    choice = choose(parts, 25 * 60 - 180)
    assert choice.total <= 25 * 60 - 180
    assert list(choice.cells) == ["environment", "kernels", "qwen-tight", "qwen-ample", "stress", "mistral"]
    assert names(choice)["qwen-tight"][:2] == ["4k at 0.05", "4k on stock"]
    assert names(choice)["qwen-ample"][:2] == ["4k at 0.05", "4k on stock"]
    for part in parts:
        keys = [part.key(cell) for cell in part.cells]
        assert len(set(keys)) == len(keys) and len({cell.name for cell in part.cells}) == len(keys)


def test_a_short_lease_still_gives_the_headline():
    choice = choose(gpu_programme(), 360)
    assert names(choice)["qwen-tight"] == ["4k at 0.05", "4k on stock"]
    assert "qwen-ample" not in choice.cells and any(name.startswith("stress/") for name in choice.dropped)


def test_stock_and_ours_differ_in_nothing_but_the_backend():
    for part in gpu_programme():
        for ours in (server for server in part.servers if server.name.startswith("tgvkv")):
            stock = part.server(ours.name.replace("tgvkv", "stock"))
            assert (stock.model, stock.pool, stock.flags) == (ours.model, ours.pool, ())
            pairs = [(c.load, c.name) for c in part.cells if c.server == stock.name and c.kind in ("load", "ttft")]
            for load, name in pairs:
                twin = name.replace("on stock", "at 0.05") if "on stock" in name else name
                same = [c.load for c in part.cells if c.server == ours.name and c.name in (twin, twin + " on tgvkv")]
                assert "text" in name or [replace(load, retention=0.05)] == same


def test_server_commands(tmp_path):
    spec = gpu_programme()[2].server("stock")
    words = command(spec, tmp_path, (1234, 1235), Setup(False, tmp_path, ("--extra",)))
    assert words[1:3] == ["-m", "sglang.launch_server"] and words[-1] == "--extra"
    after = dict(zip(words, words[1:], strict=False))
    assert after["--attention-backend"] == "flashinfer" and after["--max-total-tokens"] == "40960"
    assert after["--load-format"] == "dummy" and "--device" not in words
    assert not any(word.startswith("--disable") for word in words)  # radix cache, overlap and graphs stay on
    on_cpu = command(cpu_programme()[2].server("stock"), tmp_path, (1, 2), Setup(True, tmp_path))
    assert "--device" in on_cpu and "--cuda-graph-max-bs-decode" not in on_cpu
    checked = environment(replace(spec, checked=True), Setup(False, tmp_path, extra_env={"A": "1"}))
    assert checked["SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY"] == "2" and checked["A"] == "1"
    assert "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY" not in environment(spec, Setup(False, tmp_path))


# -- orchestration -------------------------------------------------------------------------------------------------


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def recorder(results, clock, taking=None, failing=()):
    """A stand-in for a part's process: 'measures' every cell, each taking its planned time (or ``taking``)."""
    calls = []

    def run(part, cells, seconds):
        calls.append((part.name, [cell.name for cell in cells], seconds))
        clock.now += part.start_seconds
        store = Results(results)
        for one in cells:
            clock.now += one.seconds if taking is None else taking
            row = {"part": part.name, "cell": one.name, "kind": one.kind}
            row |= {"error": "no"} if one.name in failing else {"figures": {"answer_tokens_per_s": 1.0}}
            store.add(part.key(one), row)

    return run, calls


def test_parts_run_in_order_with_the_time_that_is_planned_for_them(tmp_path):
    clock = Clock()
    run, calls = recorder(tmp_path, clock)
    store = run_all.run_programme(PARTS, 90, tmp_path, run, clock)
    assert [(name, cells) for name, cells, _ in calls] == [
        ("a", ["headline", "extra"]), ("b", ["second", "pair 1", "pair 2"])]  # fmt: skip
    assert [seconds for _, _, seconds in calls] == [40, 50]
    assert len(store.done) == 5 and store.content["dropped"] == {} and store.content["spent_s"] == 90


def test_a_slow_part_costs_later_cells_and_they_are_named(tmp_path):
    clock = Clock()
    run, calls = recorder(tmp_path, clock, taking=15)
    store = run_all.run_programme(PARTS, 90, tmp_path, run, clock)
    assert [cells for _, cells, _ in calls] == [["headline", "extra"], ["second"]]
    assert store.content["dropped"] == dict.fromkeys(("b/pair 1", "b/pair 2"), "did not fit: 5 s were left")


def test_slack_is_what_the_budget_has_left(tmp_path):
    clock = Clock()
    run, calls = recorder(tmp_path, clock)
    run_all.run_programme(PARTS[:1], 70, tmp_path, run, clock)
    assert calls == [("a", ["headline", "extra"], 70)]  # 40 planned, 30 left over
    run, calls = recorder(tmp_path / "more", clock)
    run_all.run_programme(PARTS[:1], 900, tmp_path / "more", run, clock)
    assert calls[0][2] == 40 + run_all.SLACK_S


def test_a_second_run_measures_only_what_is_missing(tmp_path):
    clock = Clock()
    run, _ = recorder(tmp_path, clock, failing=("extra",))
    run_all.run_programme(PARTS[:1], 200, tmp_path, run, clock)
    assert clock.now == 40
    run, calls = recorder(tmp_path, clock)
    store = run_all.run_programme(PARTS[:1], 200, tmp_path, run, clock)
    assert [cells for _, cells, _ in calls] == [["extra"]]  # it had failed; a failed cell is not tried twice in one run
    assert store.content["spent_s"] == 70
    run, calls = recorder(tmp_path, clock)
    run_all.run_programme(PARTS[:1], 200, tmp_path, run, clock)
    assert calls == []


def test_earlier_calls_count_towards_the_budget(tmp_path):
    Results(tmp_path).note("spent_s", 65.0)
    clock = Clock()
    run, calls = recorder(tmp_path, clock)
    store = run_all.run_programme(PARTS, 90, tmp_path, run, clock)
    assert calls == [] and len(store.content["dropped"]) == 5


def test_a_process_that_hangs_is_stopped_and_the_programme_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(run_all, "STOP_S", 1.0)
    stuck = tmp_path / "stuck.py"
    stuck.write_text("import time, signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(600)\n")
    popen = subprocess.Popen
    monkeypatch.setattr(run_all.subprocess, "Popen", lambda words, **k: popen([sys.executable, str(stuck)], **k))
    args = run_all.arguments().parse_args(["--out", str(tmp_path)])
    published = []
    run = run_all.part_runner(args, tmp_path, tmp_path / "work", lambda: published.append(1))
    began = time.monotonic()
    store = run_all.run_programme(PARTS[:1], 31, tmp_path, lambda part, cells, seconds: run(part, cells, 0.5))
    assert time.monotonic() - began < 60 and published
    assert store.done == set() and "== a ==" in (tmp_path / "gpu-log.txt").read_text()


def test_results_of_something_else_are_refused(tmp_path):
    (tmp_path / "gpu-results.json").write_text('{"cells": []}')
    with pytest.raises(SystemExit, match="gpu-results.json is no result"):
        read(tmp_path / "gpu-results.json")


def test_a_detached_run_is_followed_to_its_end(tmp_path, monkeypatch, capsys):
    keep, out = tmp_path / "keep", tmp_path / "out"
    script = tmp_path / "run.py"
    script.write_text(f"""
import os, time
from pathlib import Path
assert "OUT" not in os.environ
keep = Path({str(keep)!r})
(keep / "gpu-results.json").write_text('{{"cells": {{}}}}')
print("measured", flush=True)
(keep / "finished").write_text("")
""")
    monkeypatch.setenv("OUT", str(out))
    popen = subprocess.Popen
    monkeypatch.setattr(run_all.subprocess, "Popen", lambda words, **k: popen([sys.executable, str(script)], **k))
    run_all.detach(["--keep", str(keep), "--detach"], keep)
    assert run_all.follow(keep, out, 30)
    assert "measured" in capsys.readouterr().out and read(out / "gpu-results.json")["cells"] == {}
    assert run_all.running(keep) is None


def test_a_second_detached_run_is_refused(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        (tmp_path / "running.pid").write_text(str(child.pid))
        with pytest.raises(SystemExit, match=f"process {child.pid}"):
            run_all.detach([], tmp_path)
        assert not run_all.follow(tmp_path, tmp_path / "out", 0.1)
    finally:
        child.kill()
        child.wait()


@pytest.mark.parametrize(
    "words, said",
    [
        (["--part", "nothing", "--plan"], "no part nothing; there are environment"),
        (["--minutes", "2", "--plan"], "leaves nothing"),
        (["--detach", "--out", "x"], "need --keep"),
        (["--follow", "5", "--out", "x"], "need --keep"),
        ([], "--out DIR is needed"),
        (["--out", "x", "--server-env", "A"], "NAME=VALUE"),
    ],
)
def test_bad_arguments_name_the_remedy(words, said, capsys, monkeypatch):
    monkeypatch.delenv("OUT", raising=False)
    with pytest.raises(SystemExit) as ended:
        run_all.main(words)
    assert ended.value.code == 2 and said in capsys.readouterr().err


def test_the_plan_is_printed_and_nothing_runs(capsys, tmp_path):
    assert run_all.main(["--plan", "--minutes", "12", "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "qwen-tight (servers: 115 s)" in text and "dropped: mistral/tight, 4k on stock" in text
    assert list(tmp_path.iterdir()) == []


def test_summary_names_what_went_wrong(tmp_path):
    store = Results(tmp_path)
    store.add("1", {"part": "a", "cell": "x", "error": "it broke\nmore"})
    store.add("2", {"part": "a", "cell": "y", "figures": {"failures": ["answers differ"]}})
    store.drop("a/z", "no time")
    store.part("a", {"failed": {"stock": "log\nlast line"}})
    text = run_all.summary(Results(tmp_path))
    for expected in ("FAILED a/x: it broke", "WRONG a/y", "dropped a/z", "NOT STARTED a/stock: last line"):
        assert expected in text


def test_results_are_copied_whole(tmp_path):
    source, target = tmp_path / "a", tmp_path / "b"
    source.mkdir()
    (source / "gpu-results.json").write_text("{}")
    (source / "other").write_text("")
    copy_results(source, target)
    assert [path.name for path in target.iterdir()] == ["gpu-results.json"]
