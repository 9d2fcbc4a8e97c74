"""The GPU programme's figures, by hand, and its client against a scripted server."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import httpx
import pytest

from bench import figures
from bench.client import hold_chats
from bench.figures import Turn
from bench.gpu.headlines import GOALS, headlines
from bench.gpu.programme import gpu_programme
from bench.traffic import Load, Picture
from tests.bench.scripted import ScriptedServer, piece

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


def test_headlines_from_made_up_rows():
    def row(part, name, **values):
        return {"part": part, "cell": name, "figures": values}

    rows = [
        row("qwen-tight", "4k at 0.05", answer_tokens_per_s=300.0),
        row("qwen-tight", "4k on stock", answer_tokens_per_s=100.0),
        row("qwen-ample", "4k at 0.05", answer_tokens_per_s=99.0),
        {"part": "qwen-ample", "cell": "4k on stock", "error": "died"},
        row("qwen-ample", "first token, 4k at 0.05", ttft_p50_ms=102.0),
        row("qwen-ample", "first token, 4k at 1", ttft_p50_ms=100.0),
        *(row("qwen-ample", f"text{again} on {side}", answer_tokens_per_s=speed, itl_p50_ms=10.0)
          for again, side, speed in (("", "tgvkv", 98), ("", "stock", 100), (", again", "tgvkv", 51),
                                     (", again", "stock", 50))),
    ]  # fmt: skip
    found = headlines(rows)
    assert set(GOALS) <= set(found)
    assert found.pop("8B, 4k, 5 %, tight memory: throughput over stock") == 3.0
    assert found.pop("selection, share of time to first token, 4k") == 0.02
    assert found.pop("text only: throughput over stock") == 1.0
    assert found.pop("text only: inter-token latency over stock") == 1.0
    assert set(found.values()) == {None}  # one side alone is no comparison


def test_headlines_know_the_programmes_cells():
    """Every name the summary looks for is a cell's: made-up rows of all cells give every figure."""
    rows = [
        {"part": part.name, "cell": cell.name, "figures": {"answer_tokens_per_s": 1.0, "itl_p50_ms": 1.0,
                                                            "ttft_p50_ms": 1.0}}
        for part in gpu_programme() for cell in part.cells
    ]  # fmt: skip
    assert None not in headlines(rows).values()


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


def test_pictures_are_their_seed():
    one, other = Picture(1, 64, jpeg=True), Picture(2, 64, jpeg=True)
    assert one.url() == Picture(1, 64, jpeg=True).url() != other.url() and one.url().startswith("data:image/jpeg")


@pytest.mark.parametrize("bad", [{"users": 0}, {"images": -1}, {"answer": (5, 4)}, {"text": 0}])
def test_bad_loads_are_refused(bad):
    with pytest.raises(ValueError, match="must be positive"):
        Load(**{"users": 1, **bad})
