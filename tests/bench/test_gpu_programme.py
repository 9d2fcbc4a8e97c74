"""The GPU programme without a GPU, a server or SGLang: plan, budget, resumption, what goes wrong."""

from __future__ import annotations

import importlib
import sys
import time
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest

from bench.client import Held
from bench.common import Store
from bench.figures import Turn
from bench.gpu import measure
from bench.gpu import parts as running_parts
from bench.gpu.measure import Context
from bench.gpu.parts import HungError, RunEndedError, measure_part, needed, time_limit, warm_up
from bench.gpu.programme import STOCKS, Cell, Part, ServerSpec, choose, cpu_programme, gpu_programme, part_seconds
from bench.gpu.servers import Setup, command, environment
from bench.traffic import Load
from tgvkv_sglang.trace import write_trace

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


def test_the_programme_begins_with_what_must_be_right_and_the_headline():
    parts = gpu_programme()
    sides = ["chats at 0.05", *(f"chats on {side}" for side in STOCKS.values())]
    assert names(choose(parts, 500)) == {
        "environment": ["environment"], "smoke": ["smoke"], "short-memory": sides
    }  # fmt: skip
    default = names(choose(parts, 60 * run.MINUTES))
    assert list(default) == ["environment", "smoke", "short-memory", "ample-memory", "kernels", "soak"]
    assert default["ample-memory"][:3] == sides
    for asked in ("text on tgvkv", "follow-up, 1 at once at 0.05", "follow-up, 8 at once at 0.05", "first token at 1"):
        assert asked in default["ample-memory"]


def test_smoke_takes_a_minute_and_a_half_at_most():
    smoke = next(part for part in gpu_programme() if part.name == "smoke")
    assert part_seconds(smoke, smoke.cells) <= 90


def test_cells_and_the_pictures_that_one_server_is_shown_are_all_different():
    for part in gpu_programme():
        assert len({part.key(cell) for cell in part.cells}) == len(part.cells)
        assert len({cell.name for cell in part.cells}) == len(part.cells)
        for server in part.servers:
            loads = [cell.load for cell in part.cells if cell.load and cell.server == server.name]
            assert len({replace(load, retention=None) for load in loads}) == len(loads), server


def test_stock_and_ours_differ_in_nothing_but_the_backend():
    for part in gpu_programme():
        for ours in (server for server in part.servers if server.name == "tgvkv"):
            for name, side in STOCKS.items():
                stock = part.server(name)
                assert (stock.model, stock.pool, stock.flags) == (ours.model, ours.pool, ())
                for cell in (cell for cell in part.cells if cell.server == name):
                    twins = [cell.name.replace(f"on {side}", other) for other in ("at 0.05", "on tgvkv")]
                    same = [c.load for c in part.cells if c.server == ours.name and c.name in twins]
                    assert [replace(load, retention=None) for load in same] == [cell.load]


def test_server_commands(tmp_path):
    short = next(part for part in gpu_programme() if part.name == "short-memory")
    spec, setup = short.server("stock-flashinfer"), Setup(False, tmp_path, ("--extra",))
    words = command(spec, tmp_path, 1234, setup)
    assert words[1:3] == ["-m", "sglang.launch_server"] and words[-1] == "--extra"
    after = dict(zip(words, words[1:], strict=False))
    assert after["--attention-backend"] == "flashinfer" and after["--max-total-tokens"] == "40960"
    assert after["--load-format"] == "dummy" and "--device" not in words and "--tgvkv-trace-dir" not in words
    assert not any(word.startswith("--disable") for word in words)  # radix cache, overlap and graphs stay on
    assert "--attention-backend" not in command(short.server("stock-choice"), tmp_path, 1, setup)
    ours = command(short.server("tgvkv"), tmp_path, 1, setup)
    assert ours[ours.index("--tgvkv-trace-dir") + 1] == str(setup.directory(short.server("tgvkv")) / "traces")
    small = next(part for part in cpu_programme() if part.name == "small")
    on_cpu = command(small.server("stock-torch"), tmp_path, 1, Setup(True, tmp_path))
    assert "--device" in on_cpu and "--cuda-graph-max-bs-decode" not in on_cpu
    checked = environment(replace(spec, checked=True), Setup(False, tmp_path))
    assert checked["SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY"] == "2"
    assert "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY" not in environment(spec, Setup(False, tmp_path))


def test_the_smoke_part_needs_both_sides():
    smoke = next(part for part in gpu_programme() if part.name == "smoke")
    assert [server.name for server in needed(smoke, smoke.cells)] == ["demo-stock", "demo"]
    short = next(part for part in gpu_programme() if part.name == "short-memory")
    assert needed(short, short.cells[1:2]) == [short.server("stock-flashinfer")]


# -- the run -------------------------------------------------------------------------------------------------------


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def recorder(clock, taking=None, failing=()):
    """A stand-in for :func:`measure_part`: each cell takes its planned time (or ``taking``)."""
    calls = []

    def measured(part, cells, setup, store, failures):
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


def test_a_run_that_ends_early_says_why_and_measures_no_more(tmp_path):
    def ends(part, cells, setup, store, failures):
        raise RunEndedError("the run ends here: a, headline: it broke")

    store = Store(tmp_path / "r.json")
    assert run.run_programme(PARTS, 90, Setup(True, tmp_path), store, ends, Clock()).endswith("it broke")
    assert len(store.content["dropped"]) == 5 and run.summary(store).endswith("ends here: a, headline: it broke")


class Alive:
    """A server that answers, or does not any more."""

    def __init__(self, alive: bool = True):
        self.up = alive

    def alive(self) -> bool:
        return self.up

    def log_tail(self) -> str:
        return "the end of its log"


def serve(monkeypatch, failed: dict[str, str], servers: dict[str, Alive], warm: str | None = None):
    """Put servers in place of live ones; those in ``failed`` do not start."""

    @contextmanager
    def running(specs, setup):
        wanted = [spec.name for spec in specs]
        yield {name: servers[name] for name in wanted if name not in failed}, dict(failed)

    monkeypatch.setattr(running_parts, "running", running)
    monkeypatch.setattr(running_parts, "warm_up", lambda *_: warm)


def measures(monkeypatch, **kinds):
    monkeypatch.setattr(running_parts, "MEASURES", kinds)


STOCK = ServerSpec("stock", "demo", "flashinfer", 100)


def test_cells_of_a_server_that_did_not_start_say_so(tmp_path, monkeypatch):
    serve(monkeypatch, {"one": "log\nlast line"}, {})
    store, failures = Store(tmp_path / "r.json"), []
    measure_part(PARTS[0], PARTS[0].cells, Setup(True, tmp_path), store, failures)
    said = "server one did not start, or died: see parts and its log"
    assert [row["error"] for row in store.runs.values()] == [said] * 2
    assert "NOT STARTED a/one: last line" in run.summary(store)
    assert failures == ["a, server one did not start: last line"]  # once, however many cells it costs


def test_the_run_ends_when_ours_fails_twice(tmp_path, monkeypatch):
    part = Part("p", tuple(Cell(str(i), "breaks", 1, 0, "one") for i in range(4)), (SERVER,))
    serve(monkeypatch, {}, {"one": Alive()})
    measures(monkeypatch, breaks=lambda *_: 1 // 0)
    store = Store(tmp_path / "r.json")
    with pytest.raises(RunEndedError, match="p, 0: ZeroDivisionError.*\np, 1: Zero.*\n.*logs are in .*servers"):
        measure_part(part, part.cells, Setup(True, tmp_path), store, [])
    assert len(store.runs) == 2


def test_stock_may_fail_as_often_as_it_likes(tmp_path, monkeypatch):
    part = Part("p", tuple(Cell(str(i), "breaks", 1, 0, "stock") for i in range(4)), (STOCK,))
    serve(monkeypatch, {}, {"stock": Alive()})
    measures(monkeypatch, breaks=lambda *_: 1 // 0)
    store, failures = Store(tmp_path / "r.json"), []
    measure_part(part, part.cells, Setup(True, tmp_path), store, failures)
    assert len(store.runs) == 4 and failures == []


def test_a_server_that_dies_costs_its_cells_and_counts_once(tmp_path, monkeypatch):
    part = Part("p", tuple(Cell(str(i), "breaks", 1, 0, "one") for i in range(3)), (SERVER,))
    serve(monkeypatch, {}, {"one": Alive(False)})
    measures(monkeypatch, breaks=lambda *_: 1 // 0)
    store, failures = Store(tmp_path / "r.json"), []
    measure_part(part, part.cells, Setup(True, tmp_path), store, failures)
    errors = [row["error"][:20] for row in store.runs.values()]
    assert errors == ["ZeroDivisionError: i", "server one did not s", "server one did not s"]
    assert len(failures) == 1


@pytest.mark.parametrize("failed", ["demo", "demo-stock", None])
def test_the_run_ends_when_the_smoke_part_fails(tmp_path, monkeypatch, failed):
    smoke = next(part for part in gpu_programme() if part.name == "smoke")
    serve(monkeypatch, {failed: "log"} if failed else {}, {"demo": Alive(), "demo-stock": Alive()})
    measures(monkeypatch, smoke=lambda *_: 1 // 0)
    said = f"server {failed} did not start" if failed else "smoke: ZeroDivisionError"
    with pytest.raises(RunEndedError, match=f"smoke, {said}.*\n.*logs are in"):
        measure_part(smoke, smoke.cells, Setup(False, tmp_path), Store(tmp_path / "r.json"), [])


def test_a_warm_up_that_fails_costs_the_server(tmp_path, monkeypatch):
    serve(monkeypatch, {}, {"one": Alive()}, warm="warm-up: no answer")
    store, failures = Store(tmp_path / "r.json"), []
    measure_part(PARTS[0], PARTS[0].cells, Setup(True, tmp_path), store, failures)
    assert store.content["parts"]["a"]["failed"] == {"one": "warm-up: no answer"} and len(failures) == 1


@pytest.mark.parametrize("slow, trouble", [(0, False), (1, False), (2, True)])
def test_a_first_request_is_asked_once_more_and_all_users_at_once_afterwards(monkeypatch, slow, trouble):
    asked = []

    def hold(url, chats, users, seconds):
        chats = list(chats)
        asked.append((users, chats[0].pictures, len(chats), seconds))
        return Held([], 0 if len(asked) <= slow else len(chats), 1.0, None)

    monkeypatch.setattr(running_parts, "hold_chats", hold)
    server = Alive()
    server.url = "http://nowhere"
    said = warm_up(server, [Load(8, retention=0.05), Load(20, retention=0.05, seed=3)])
    assert (said or "").startswith("warm-up: no answer in 180 s") == trouble
    firsts = [one for one in asked if one[0] == 1]
    assert len(firsts) == min(slow + 1, 2) and len({pictures for _, pictures, *_ in firsts}) == len(firsts)
    if not trouble:
        users, pictures, chats, seconds = asked[-1]
        assert (users, chats, pictures[0].side, seconds) == (20, 20, 256, 180.0)


def test_a_server_without_loads_needs_no_warm_up():
    assert warm_up(Alive(), []) is None


def test_a_cell_that_fails_or_hangs_does_not_cost_the_next_its_turn(tmp_path, monkeypatch):
    part = Part("p", tuple(Cell(kind, kind, 0.1, 0) for kind in ("breaks", "hangs", "works")))
    monkeypatch.setattr(running_parts, "LIMIT_S", 0.1)
    measures(monkeypatch, breaks=lambda *_: 1 // 0, hangs=lambda *_: time.sleep(60), works=lambda *_: {"fine": 1})
    store = Store(tmp_path / "r.json")
    measure_part(part, part.cells, Setup(True, tmp_path, commit="c0ffee"), store, [])
    rows = {row["cell"]: row for row in store.runs.values()}
    assert "ZeroDivisionError" in rows["breaks"]["error"] and "HungError: not done after" in rows["hangs"]["error"]
    assert rows["works"]["figures"] == {"fine": 1} and rows["works"]["measured"]["commit"] == "c0ffee"


class Quiet:
    """A server as far as a measurement knows it; ``hold`` stands for the chats held with it."""

    url, log = "http://nowhere", ""

    def __init__(self, path):
        self.traces = path

    def flush(self) -> None: ...

    def log_text(self) -> str:
        return self.log


def context(path, monkeypatch, hold) -> Context:
    monkeypatch.setattr(measure, "hold_chats", hold)
    return Context(Setup(True, path), {}, Quiet(path), Store(path / "r.json"))


@pytest.mark.parametrize(
    "kind, said", [("load", "no answers: "), ("ttft", "too few answers: "), ("follow-up", "too few answers: ")]
)
def test_a_cell_without_answers_has_no_figures(tmp_path, monkeypatch, kind, said):
    def hold(url, chats, users, seconds=None):
        return Held([Turn(i, 0, 0.0, error="HTTP 503") for i in range(5)], 0, 1.0, None)

    with pytest.raises(RuntimeError, match=f"{said}.'HTTP 503'"):
        measure.MEASURES[kind](Cell("x", kind, 10, 0, "one", Load(1, ramp=1.0)), context(tmp_path, monkeypatch, hold))


def test_follow_ups_are_asked_in_rounds_about_the_same_pictures(tmp_path, monkeypatch):
    asked = []

    def hold(url, chats, users, seconds=None):
        asked.append([(chat.pictures, chat.questions) for chat in chats])
        wait = 9.0 if len(asked) <= 2 else 0.1
        return Held([Turn(i, 0, 0.0, [wait], [1], 100, 80) for i in range(len(chats))], len(chats), 1.0, None)

    load = Load(2, retention=0.05, side=64, questions=4, answer=(1, 1), ramp=0.0)
    row = measure.measure_follow_up(Cell("x", "follow-up", 60, 0, "one", load), context(tmp_path, monkeypatch, hold))
    assert [len(chats) for chats in asked] == [2] * 4 and row["requests"] == 4 and row["ttft_p50_ms"] == 100
    assert len({pictures for chats in asked for pictures, _ in chats}) == 2
    assert len({questions for chats in asked for _, questions in chats}) == 8


def test_units_a_step_are_a_traced_requests_times_those_running(tmp_path, monkeypatch):
    def hold(url, chats, users, seconds=None):
        chats = [next(iter(chats))]
        if chats[0].options.get("custom_params", {}).get("tgvkv_trace"):
            write_trace(tmp_path, "x", 0, {"budget": np.array([3, 5])}, {})
        now = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time.time() + 1))
        server.log += f"[{now}] Decode batch, #running-req: 10, cuda graph: True, ...\n"
        return Held([Turn(0, 0, 0.5, [1.2, 1.4], [1, 9], 100)], 1, 1.0, None)

    found = context(tmp_path, monkeypatch, hold)
    server = found.server
    monkeypatch.setattr(measure, "information", lambda server: {"attention_backend": "tgvkv"})
    load = Load(1, retention=0.05, side=64, ramp=0.0)
    row = measure.measure_load(Cell("x", "load", 10, 0, "one", load), found)
    assert (row["units_per_request"], row["units_per_step"], row["cuda_graph_share"]) == (8, 80, 1.0)
    assert row["answer_tokens"] == 9 and row["server"] == {"attention_backend": "tgvkv"}
    stock = measure.measure_load(Cell("x", "load", 10, 0, "one", replace(load, retention=None)), found)
    assert stock["units_per_step"] is None


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
        (["--only", "nothing", "--plan"], "no part nothing; there are environment, smoke"),
        (["--minutes", "0", "--plan"], "--minutes must be positive"),
        (["--only", "kernels"], "no CUDA device is found here; --plan"),
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
    assert "short-memory (starting servers: 120 s)" in text and "no time for soak/soak" in text
    assert run.main(["--plan", "--only", "smoke", "--out", str(tmp_path)]) == 0
    assert "in all" in (text := capsys.readouterr().out) and "short-memory" not in text
    assert list(tmp_path.iterdir()) == []


def test_summary_names_what_went_wrong(tmp_path):
    store = Store(tmp_path / "r.json")
    store.add("1", {"part": "a", "cell": "x", "error": "it broke\nmore"})
    store.add("2", {"part": "a", "cell": "y", "figures": {"failures": ["answers differ"]}})
    load = {"running_requests": 17.5, "cuda_graph_share": 1.0, "units_per_step": 130, "retracted_requests": 2}
    store.add("3", {"part": "a", "cell": "z", "figures": {"answer_tokens_per_s": 9.5, **load}})
    found = {"ample memory, 4k at 5 %: throughput over stock (flashinfer)": 0.5, "other": None}
    store.note(dropped=["a/w"], headlines=found)
    text = run.summary(store)
    for expected in ("FAILED a/x: it broke", "WRONG a/y", "not measured: a/w", "missed (goal >= 0.98)", "-  other",
                     "a/z: answer tokens per s 9.5, running requests 17.5, cuda graph share 1.0, units per step 130, "
                     "retracted requests 2"):  # fmt: skip
        assert expected in text
