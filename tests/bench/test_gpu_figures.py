"""The GPU programme's figures, by hand, and its client against a scripted server."""

from __future__ import annotations

import os
import time
from collections import Counter
from dataclasses import replace
from itertools import islice

import httpx
import pytest

from bench import figures
from bench.client import hold_chats
from bench.common import ROOT
from bench.figures import Turn
from bench.gpu import smoke
from bench.gpu.headlines import GOALS, headlines, verdict
from bench.gpu.measure import log_figures
from bench.gpu.programme import gpu_programme
from bench.traffic import Load, Picture
from tests.bench.scripted import ScriptedServer, piece
from tgvkv_sglang.testing.server import Answer

TURNS = [
    Turn(0, 0, 0.0, [1.0, 2.0, 6.0], [1, 9, 17], prompt_tokens=100),
    Turn(1, 0, 1.0, [4.0, 5.0], [1, 9], prompt_tokens=100, cached_tokens=50),
    Turn(2, 0, 3.0),
    Turn(3, 0, 3.0, error="HTTP 500"),
]


def test_load_figures_by_hand():
    row = figures.window(TURNS, 2.0, 6.0)
    assert row["answer_tokens"] == 8 + 1 + 8 and row["answer_tokens_per_s"] == round(17 / 4, 1)
    assert row["concurrency"] == (4 + 1) / 4  # the first the whole window, the second one second
    assert row["requests_started"] == 1 and row["ttft_p50_ms"] == 3000 and row["cached_share"] == 0.5
    assert row["itl_p50_ms"] == 125 and row["errors"] == 1 and row["error_messages"] == ["HTTP 500"]
    assert row["prompt_tokens_per_s"] == 25


def test_figures_of_an_empty_window():
    row = figures.window([], 0, 1)
    assert row["answer_tokens"] == 0 and row["itl_p99_ms"] is None and row["cached_share"] is None
    with pytest.raises(ValueError, match="window"):
        figures.window(TURNS, 3, 3)


def test_first_token_figures_leave_out_the_warm_up():
    turns = [Turn(i, 0, 0.0, [wait], [1]) for i, wait in enumerate((9.0, 9.0, 0.1, 0.2, 0.3))]
    row = figures.first_tokens(turns)
    assert row["requests"] == 3 and row["ttft_p50_ms"] == 200 and row["ttft_mean_ms"] == 200
    assert row["ttft_standard_error_ms"] == pytest.approx(1000 * 0.1 / 3**0.5, abs=1e-3)
    assert figures.first_tokens([])["ttft_p50_ms"] is None


def test_first_token_figures_leave_out_the_rounds_asked():
    turns = [Turn(i, 0, 0.0, [0.1], [1], prompt_tokens=100, cached_tokens=80) for i in range(5)]
    assert figures.first_tokens(turns, warm_up=4)["requests"] == 1
    assert figures.first_tokens(turns, warm_up=4)["cached_share"] == 0.8


LOG = """[2026-11-21 15:00:47] Prefill batch, #new-seq: 1, #new-token: 7, #running-req: 0, cuda graph: False, ...
[2026-11-21 15:00:48 TP0] Decode batch, #running-req: 1, #token: 0, token usage: 0.00, cpu graph: False, #queue-req: 0
[2026-11-21 15:00:50] Decode batch, #running-req: 17, #token: 9, token usage: 0.50, cuda graph: True, gen throughput
[2026-11-21 15:00:51] KV cache pool is full. Retract requests. #retracted_reqs: 3, #new_tokens_gained: 9
[2026-11-21 15:00:51] Decode batch, #running-req: 14, #token: 9, token usage: 0.40, cuda graph: False, gen throughput
"""


def test_what_a_servers_log_says_of_a_window():
    def at(second: int) -> float:
        return time.mktime((2026, 11, 21, 15, 0, second, 0, 0, -1))

    assert log_figures(LOG, at(49), at(52)) == {
        "logged_steps": 2, "running_requests": 15.5, "cuda_graph_share": 0.5, "retracted_requests": 3
    }  # fmt: skip
    assert log_figures(LOG, at(48), at(51))["running_requests"] == 9
    assert log_figures(LOG, at(52), at(60)) == {
        "logged_steps": 0, "running_requests": None, "cuda_graph_share": None, "retracted_requests": 0
    }  # fmt: skip


def test_headlines_from_made_up_rows():
    def row(part, name, **values):
        return {"part": part, "cell": name, "figures": values}

    choice, flashinfer = "stock (SGLang's choice)", "stock (flashinfer)"
    rows = [
        row("short-memory", "chats at 0.05", answer_tokens_per_s=300.0),
        row("short-memory", f"chats on {choice}", answer_tokens_per_s=150.0),
        row("short-memory", f"chats on {flashinfer}", answer_tokens_per_s=100.0),
        row("ample-memory", "chats at 0.05", answer_tokens_per_s=99.0),
        {"part": "ample-memory", "cell": f"chats on {choice}", "error": "died"},
        row("ample-memory", "follow-up, 1 at once at 0.05", ttft_p50_ms=104.0),
        row("ample-memory", "follow-up, 1 at once at 1", ttft_p50_ms=100.0),
        row("kernels", "kernels, the main ones", share_of_roof={"view_attention B=64 kept=205": 0.75}),
        *(row("ample-memory", f"text{again} on {side}", answer_tokens_per_s=speed, itl_p50_ms=10.0)
          for again, side, speed in (("", "tgvkv", 98), ("", flashinfer, 100), (", again", "tgvkv", 51),
                                     (", again", flashinfer, 50))),
    ]  # fmt: skip
    found = headlines(rows)
    assert set(GOALS) <= set(found)
    measured = {name: value for name, value in found.items() if value is not None}  # one side alone is no comparison
    assert measured == {
        f"short memory, 4k at 5 %: throughput over {flashinfer}": 3.0,
        f"short memory, 4k at 5 %: throughput over {choice}": 2.0,
        f"text only: throughput over {flashinfer}": 1.0,
        f"text only: inter-token latency over {flashinfer}": 1.0,
        "scoring, share of a follow-up's time to first token, 1 at once": 0.04,
        "view attention, share of the roof, B=64 kept=205": 0.75,
    }
    said = {name: verdict(name, value) for name, value in found.items()}
    assert said[f"short memory, 4k at 5 %: throughput over {flashinfer}"] == "reached (goal >= 2.5)"
    assert said[f"short memory, 4k at 5 %: throughput over {choice}"] == "missed (goal >= 2.5)"
    assert said[f"ample memory, 4k at 5 %: throughput over {choice}"] == "not measured (goal >= 0.98)"
    assert said["scoring, share of a follow-up's time to first token, 1 at once"] == "reached (goal < 0.1)"
    assert verdict("follow-up's time to first token, 1 at once over " + choice, None) == ""


def test_headlines_know_the_programmes_cells():
    """Every name the summary looks for is a cell's: made-up rows of all cells give every figure."""
    shapes = ("B=64 kept=205", "B=64 kept=205, one 2000")
    shares = {f"view_attention {shape}": 0.5 for shape in shapes}
    rows = [
        {"part": part.name, "cell": cell.name, "figures": {"answer_tokens_per_s": 1.0, "itl_p50_ms": 1.0,
                                                            "ttft_p50_ms": 1.0, "share_of_roof": shares}}
        for part in gpu_programme() for cell in part.cells
    ]  # fmt: skip
    assert None not in headlines(rows).values()


def test_headlines_know_the_kernel_benchmarks_cases(monkeypatch):
    """The shapes that they look for are among the main ones, at the sizes on a GPU."""
    monkeypatch.syspath_prepend(str(ROOT / "triton_kernels"))
    import benchmark

    sizes = replace(benchmark.MAIN, rows=40_000, layers=1)
    flats = tuple(benchmark.torch.zeros(sizes.rows, 1, 1) for _ in "kv")
    shapes = {case.shape for case in benchmark.attention_cases(sizes, flats, "cpu", "reference")}
    assert {name.partition("roof, ")[2] for name in GOALS if name.startswith("view attention")} <= shapes


def answer(ids, cached=0, text="red") -> Answer:
    return Answer(list(ids), text, {"cached_tokens": cached})


def test_smoke_names_what_is_wrong():
    fine = [answer([1, 2], 5), answer([3], 0)]
    assert smoke.wrong(fine, fine, fine) == []
    other = smoke.wrong(fine, [answer([1, 9], 5), answer([3], 1)], [answer([7], text=" "), *fine[1:]])
    assert "2 of 2 answers or their cached tokens are not stock SGLang's; the first, question 0" in other[0]
    assert other[1] == "retention 0.1: no words in the answers to questions [0]"


def test_kernels_compiled_now_are_told_from_those_of_before(tmp_path):
    for folder, name, at in (("a", "view", 100), ("b", "view", 300), ("c", "other", 300), ("d", "old", 100)):
        (tmp_path / folder).mkdir()
        for path in (tmp_path / folder / f"{name}.json", tmp_path / folder / f"__grp__{name}.json"):
            path.write_text("{}")
            os.utime(path, (at, at))
    there, new = smoke.triton_cache(tmp_path, 200.0)
    assert there == Counter(view=1, old=1) and new == Counter(view=1, other=1)
    assert smoke.triton_cache(tmp_path / "none", 200.0) == (Counter(), Counter())


def silent(body: dict, last: int | None = None) -> list[dict]:
    """Counts tokens, two a piece, none of which is text."""
    last = last or body["max_tokens"]
    return [piece("", 7, count) for count in (*range(1, last, 2), last)]


LOAD = Load(users=2, retention=0.05, images=2, side=64, text=10, answer=(4, 6), ramp=0.0)


def held(server: ScriptedServer, load: Load = LOAD) -> list[Turn]:
    transport = httpx.MockTransport(server)
    return hold_chats("http://scripted", load.chats(), load.users, seconds=0.5, transport=transport).turns


def test_requests_are_new_and_as_the_cell_says():
    server = ScriptedServer(silent)
    turns = held(server)
    finished = [turn for turn in turns if turn.arrivals]
    assert len(finished) >= 4 and not any(turn.error for turn in turns)
    assert all(turn.tokens[0] == 1 and turn.tokens[-1] in (4, 5, 6) and turn.prompt_tokens == 7 for turn in finished)
    urls = [part["image_url"]["url"] for body in server.bodies for part in body["messages"][0]["content"][:2]]
    assert len(urls) == 2 * len(server.bodies) == len(set(urls))
    texts = [body["messages"][0]["content"][2]["text"] for body in server.bodies]
    assert len(set(texts)) == len(texts) and {len(text) for text in texts} == {10}
    assert all(body["custom_params"] == {"tgvkv_retention": 0.05} and body["ignore_eos"] for body in server.bodies)
    stock = ScriptedServer(silent)
    held(stock, replace(LOAD, retention=None, images=0))
    assert "custom_params" not in stock.bodies[0] and len(stock.bodies[0]["messages"][0]["content"]) == 1


@pytest.mark.parametrize(
    "server, said",
    [
        (ScriptedServer(silent, fail_at="always"), "503"),
        (ScriptedServer(lambda body: silent(body, body["max_tokens"] - 1)), "ended after"),
        (ScriptedServer(lambda body: [{"error": {"message": "out of luck"}}]), "out of luck"),
    ],
)
def test_refused_and_short_answers_are_errors(server, said):
    turns = held(server)
    assert turns and all(said in turn.error for turn in turns if turn.error) and any(turn.error for turn in turns)


def test_both_sides_of_a_comparison_are_asked_the_same_and_other_loads_something_else():
    def asked(load: Load):
        return [(chat.questions, chat.pictures, chat.max_tokens) for chat in islice(load.chats(), 3)]

    assert asked(LOAD) == asked(replace(LOAD, retention=None))
    pictures = {picture for load in (LOAD, replace(LOAD, seed=1), replace(LOAD, users=3))
                for _, shown, _ in asked(load) for picture in shown}  # fmt: skip
    assert len(pictures) == 3 * 3 * LOAD.images


def test_chats_ask_several_questions_and_rounds_ask_them_one_by_one():
    load = replace(LOAD, questions=3)
    chat = next(load.chats())
    assert len(set(chat.questions)) == 3 == len(chat.pauses) and len(chat.pictures) == 2
    rounds = list(load.rounds())
    assert [[one.questions for one in asked] for asked in rounds] == [
        [(chat.questions[number],) for chat in islice(load.chats(), 2)] for number in range(3)
    ]
    assert len({tuple(one.pictures for one in asked) for asked in rounds}) == 1  # about the same pictures
    turns = held(ScriptedServer(silent), load)
    assert {turn.turn for turn in turns} == {0, 1, 2} and all(turn.before for turn in turns if turn.turn)


def test_pictures_are_their_seed():
    one, other = Picture(1, 64, jpeg=True), Picture(2, 64, jpeg=True)
    assert one.url() == Picture(1, 64, jpeg=True).url() != other.url() and one.url().startswith("data:image/jpeg")


@pytest.mark.parametrize("bad", [{"users": 0}, {"images": -1}, {"answer": (5, 4)}, {"text": 0}, {"questions": 0}])
def test_bad_loads_are_refused(bad):
    with pytest.raises(ValueError, match="must be positive"):
        Load(**{"users": 1, **bad})
