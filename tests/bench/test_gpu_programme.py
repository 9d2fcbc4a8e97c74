"""The GPU programme without a GPU, a server or SGLang: plan, budget, resumption, what goes wrong."""

from __future__ import annotations

import importlib
import sys
import time
from contextlib import contextmanager
from dataclasses import replace

import pytest

from bench.common import Store
from bench.figures import Turn
from bench.gpu import measure
from bench.gpu.measure import HungError, measure_part, needed, time_limit
from bench.gpu.programme import Cell, Part, ServerSpec, choose, cpu_programme, gpu_programme, part_seconds
from bench.gpu.servers import Setup, command, environment
from bench.traffic import Load

run = importlib.import_module("bench.gpu.__main__")
SERVER = ServerSpec("one", "demo", "tgvkv", 100)


def cell(name: str, seconds: float, priority: int) -> Cell:
    return Cell(name, "load", seconds, priority, "one", Load(1))


PARTS = (
    Part("a", (cell("headline", 10, 1), cell("extra", 10, 3)), (SERVER,), 20),
    Part("b", (cell("second", 10, 2), cell("pair 1", 10, 4), cell("pair 2", 10, 4)), (SERVER,), 20),
)


def names(choice) -> dict[str, list[str]]:
    return {part: [cell.name for cell in cells] for part, cells in choice.items()}


# -- plan ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "seconds, expected",
    [
        (float("inf"), {"a": ["headline", "extra"], "b": ["second", "pair 1", "pair 2"]}),
        (90, {"a": ["headline", "extra"], "b": ["second", "pair 1", "pair 2"]}),
        (89, {"a": ["headline", "extra"], "b": ["second"]}),  # one side of a comparison is worth nothing
        (69, {"a": ["headline"], "b": ["second"]}),
        (59, {"a": ["headline"]}),
        (29, {}),
        (0, {}),
        (-5, {}),
    ],
)
def test_what_does_not_fit_is_left_out_by_priority(seconds, expected):
    choice = choose(PARTS, seconds)
    assert names(choice) == expected
    assert sum(part_seconds(part, choice.get(part.name, ())) for part in PARTS) <= max(seconds, 0)
    every = {f"{part.name}/{cell.name}" for part in PARTS for cell in part.cells}
    taken = {f"{part}/{name}" for part, cells in expected.items() for name in cells}
    assert set(run.missing(PARTS, choice, ())) == every - taken


def test_what_is_done_costs_nothing():
    done = {PARTS[0].key(PARTS[0].cells[0])}
    assert names(choose(PARTS[:1], 30, done)) == {"a": ["extra"]}
    assert choose(PARTS[:1], 29, done) == {}


def test_keys_follow_the_settings_and_nothing_else():
    part = PARTS[0]
    key = part.key(part.cells[0])
    assert key == part.key(replace(part.cells[0], seconds=99, priority=9))
    assert key != part.key(replace(part.cells[0], load=Load(2)))
    other = Part("a", part.cells, (replace(SERVER, flags=("--x",)),), 20)
    assert key != other.key(part.cells[0])


def test_a_cell_needs_a_server_of_its_part():
    with pytest.raises(ValueError, match="c.*: no such server for cell.*lonely"):
        Part("c", (replace(cell("lonely", 1, 1), server="two"),), (SERVER,))


def test_the_programme_begins_with_the_headline():
    parts = gpu_programme()
    assert [part.name for part in parts][2:4] == ["qwen-tight", "qwen-ample"]
    for part in parts[2:4]:
        assert [cell.name for cell in part.cells[:2]] == ["4k at 0.05", "4k on stock"]
    assert names(choose(parts, 360)) == {
        "environment": ["environment"],
        "kernels": ["kernels, the main ones"],
        "qwen-tight": ["4k at 0.05", "4k on stock"],
    }


def test_cells_and_the_pictures_that_one_server_is_shown_are_all_different():
    for part in gpu_programme():
        assert len({part.key(cell) for cell in part.cells}) == len(part.cells)
        assert len({cell.name for cell in part.cells}) == len(part.cells)
        for server in part.servers:
            loads = [cell.load for cell in part.cells if cell.load and cell.server == server.name]
            assert len({replace(load, retention=None) for load in loads}) == len(loads), server


def test_stock_and_ours_differ_in_nothing_but_the_backend():
    for part in gpu_programme():
        for ours in (server for server in part.servers if server.name.startswith("tgvkv")):
            stock = part.server(ours.name.replace("tgvkv", "stock"))
            assert (stock.model, stock.pool, stock.flags) == (ours.model, ours.pool, ())
            pairs = [(c.load, c.name) for c in part.cells if c.server == stock.name and c.kind in ("load", "ttft")]
            for load, name in pairs:
                twin = name.replace("on stock", "at 0.05") if "on stock" in name else name
                same = [c.load for c in part.cells if c.server == ours.name and c.name == twin]
                assert "text" in name or [replace(load, retention=0.05)] == same


def test_server_commands(tmp_path):
    spec = gpu_programme()[2].server("stock")
    words = command(spec, tmp_path, 1234, Setup(False, tmp_path, ("--extra",)))
    assert words[1:3] == ["-m", "sglang.launch_server"] and words[-1] == "--extra"
    after = dict(zip(words, words[1:], strict=False))
    assert after["--attention-backend"] == "flashinfer" and after["--max-total-tokens"] == "40960"
    assert after["--load-format"] == "dummy" and "--device" not in words
    assert not any(word.startswith("--disable") for word in words)  # radix cache, overlap and graphs stay on
    on_cpu = command(cpu_programme()[2].server("stock"), tmp_path, 1, Setup(True, tmp_path))
    assert "--device" in on_cpu and "--cuda-graph-max-bs-decode" not in on_cpu
    checked = environment(replace(spec, checked=True), Setup(False, tmp_path, env=(("A", "1"),)))
    assert checked["SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY"] == "2" and checked["A"] == "1"
    assert "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY" not in environment(spec, Setup(False, tmp_path))


def test_equal_answers_need_what_they_are_compared_with():
    stress = next(part for part in gpu_programme() if part.name == "stress")
    chosen = [cell for cell in stress.cells if cell.name == "zero bubble equals"]
    assert [server.name for server in needed(stress, chosen)] == ["demo-stock", "demo", "demo-zero-bubble"]
    assert needed(stress, stress.cells[1:2]) == [stress.server("soak")]


# -- the run -------------------------------------------------------------------------------------------------------


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def recorder(clock, taking=None, failing=()):
    """A stand-in for :func:`measure_part`: each cell takes its planned time (or ``taking``)."""
    calls = []

    def measured(part, cells, setup, store):
        calls.append((part.name, [cell.name for cell in cells]))
        clock.now += part.start_seconds
        for one in cells:
            clock.now += one.seconds if taking is None else taking
            row = {"part": part.name, "cell": one.name}
            store.add(part.key(one), row | ({"error": "no"} if one.name in failing else {"figures": {}}))

    return measured, calls


def go(parts, seconds, path, **how):
    clock = Clock()
    measured, calls = recorder(clock, **how)
    store = Store(path / "r.json")
    run.run_programme(parts, seconds, Setup(True, path), store, measured, clock)
    return Store(path / "r.json"), calls


def test_parts_run_in_order(tmp_path):
    store, calls = go(PARTS, 90, tmp_path)
    assert calls == [("a", ["headline", "extra"]), ("b", ["second", "pair 1", "pair 2"])]
    assert len(store.done) == 5 and store.content["dropped"] == [] and store.content["seconds"] == 90


def test_a_slow_part_costs_later_cells_and_they_are_named(tmp_path):
    store, calls = go(PARTS, 90, tmp_path, taking=15)
    assert [cells for _, cells in calls] == [["headline", "extra"], ["second"]]
    assert store.content["dropped"] == ["b/pair 1", "b/pair 2"]


def test_a_second_run_measures_only_what_is_missing(tmp_path):
    store, _ = go(PARTS[:1], 200, tmp_path, failing=("extra",))
    assert len(store.runs) == 2 and len(store.done) == 1
    store, calls = go(PARTS[:1], 200, tmp_path)
    assert calls == [("a", ["extra"])] and len(store.done) == 2  # it had failed
    assert go(PARTS[:1], 200, tmp_path)[1] == []


@contextmanager
def no_servers(specs, setup):
    yield {}, {spec.name: "log\nlast line" for spec in specs}


def test_cells_of_a_server_that_did_not_start_say_so(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "running", no_servers)
    store = Store(tmp_path / "r.json")
    measure_part(PARTS[0], PARTS[0].cells, Setup(True, tmp_path), store)
    assert [row["error"] for row in store.runs.values()] == ["server one did not start: see parts"] * 2
    assert "NOT STARTED a/one: last line" in run.summary(store)


def test_a_cell_that_fails_or_hangs_does_not_cost_the_next_its_turn(tmp_path, monkeypatch):
    part = Part("p", tuple(Cell(kind, kind, 0.1, 0) for kind in ("breaks", "hangs", "works")))
    monkeypatch.setattr(measure, "LIMIT_S", 0.1)
    kinds = {"breaks": lambda *_: 1 // 0, "hangs": lambda *_: time.sleep(60), "works": lambda *_: {"fine": 1}}
    monkeypatch.setattr(measure, "MEASURES", kinds)
    store = Store(tmp_path / "r.json")
    measure_part(part, part.cells, Setup(True, tmp_path, commit="c0ffee"), store)
    rows = {row["cell"]: row for row in store.runs.values()}
    assert "ZeroDivisionError" in rows["breaks"]["error"] and "HungError: not done after" in rows["hangs"]["error"]
    assert rows["works"]["figures"] == {"fine": 1} and rows["works"]["measured"]["commit"] == "c0ffee"


@pytest.mark.parametrize("kind, said", [("load", "no answers: .'HTTP 503'"), ("ttft", "too few answers: .'HTTP 503'")])
def test_a_cell_without_answers_has_no_figures(tmp_path, monkeypatch, kind, said):
    turns = [Turn(i, 0, 0.0, error="HTTP 503") for i in range(5)]
    monkeypatch.setattr(measure, "run_load", lambda *_: turns)
    context = measure.Context(Setup(True, tmp_path), {}, None, Store(tmp_path / "r.json"))
    with pytest.raises(RuntimeError, match=said):
        measure.MEASURES[kind](Cell("x", kind, 10, 0, "one", Load(1, ramp=1.0)), context)


def test_a_time_limit_ends_with_its_block():
    with time_limit(0.2):
        pass
    time.sleep(0.3)
    with pytest.raises(HungError), time_limit(0.05):
        time.sleep(10)


def test_a_command_that_cannot_run_says_why():
    assert "FileNotFoundError" in measure.output("/no/such/program")
    assert "TimeoutExpired" in measure.output(sys.executable, "-c", "import time; time.sleep(60)", timeout=0.2)


# -- the command ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, said",
    [
        (["--part", "nothing", "--plan"], "no part nothing; there are environment"),
        (["--minutes", "0", "--plan"], "--minutes must be positive"),
        (["--server-env", "A", "--plan"], "NAME=VALUE"),
        (["--part", "kernels"], "no CUDA device is found here; --plan"),
    ],
)
def test_bad_arguments_name_the_remedy(words, said, capsys, monkeypatch):
    monkeypatch.setattr(run, "cuda_usable", lambda: False)
    with pytest.raises(SystemExit) as ended:
        run.main(words)
    assert ended.value.code == 2 and said in capsys.readouterr().err


def test_the_plan_is_printed_and_nothing_runs(capsys, tmp_path):
    assert run.main(["--plan", "--minutes", "12", "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "qwen-tight (starting servers: 115 s)" in text and "no time for mistral/tight, 4k on stock" in text
    assert list(tmp_path.iterdir()) == []


def test_summary_names_what_went_wrong(tmp_path):
    store = Store(tmp_path / "r.json")
    store.add("1", {"part": "a", "cell": "x", "error": "it broke\nmore"})
    store.add("2", {"part": "a", "cell": "y", "figures": {"failures": ["answers differ"]}})
    store.note(dropped=["a/z"], headlines={"text only: throughput over stock": 0.5, "other": None})
    text = run.summary(store)
    for expected in ("FAILED a/x: it broke", "WRONG a/y", "no time for a/z", "0.5  text only", "(goal >= 0.99)"):
        assert expected in text
