"""The GPU programme's figures, by hand, and its client against a scripted server."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

import httpx
import pytest

from bench.gpu import figures, run_all
from bench.gpu.client import TimedClient, jpeg_url
from bench.gpu.programme import Load, gpu_programme
from bench.stats import Turn

TURNS = [
    Turn(0, 0, 0.0, [1.0, 2.0, 6.0], [1, 9, 17], prompt_tokens=100),
    Turn(1, 0, 1.0, [4.0, 5.0], [1, 9], prompt_tokens=100, cached_tokens=50),
    Turn(2, 0, 3.0),
    Turn(3, 0, 3.0, error="HTTP 500"),
]


def test_load_figures_by_hand():
    row = figures.load_figures(TURNS, 2.0, 6.0)
    assert row["answer_tokens"] == 8 + 1 + 8 and row["answer_tokens_per_s"] == round(17 / 4, 1)
    assert row["concurrency"] == (4 + 1) / 4  # the first the whole window, the second one second
    assert row["requests_started"] == 1 and row["ttft_p50_ms"] == 3000 and row["cached_share"] == 0.5
    assert row["itl_p50_ms"] == 125 and row["errors"] == 1 and row["error_messages"] == ["HTTP 500"]
    assert row["prompt_tokens_per_s"] == 25


def test_figures_of_an_empty_window():
    row = figures.load_figures([], 0, 1)
    assert row["answer_tokens"] == 0 and row["itl_p99_ms"] is None and row["cached_share"] is None
    with pytest.raises(ValueError, match="window"):
        figures.load_figures(TURNS, 3, 3)


def test_first_token_figures_leave_out_the_warm_up():
    turns = [Turn(i, 0, 0.0, [wait], [1]) for i, wait in enumerate((9.0, 9.0, 0.1, 0.2, 0.3))]
    row = figures.first_token_figures(turns)
    assert row["requests"] == 3 and row["ttft_p50_ms"] == 200 and row["ttft_mean_ms"] == 200
    assert row["ttft_standard_error_ms"] == pytest.approx(1000 * 0.1 / 3**0.5, abs=1e-3)
    assert figures.first_token_figures([])["ttft_p50_ms"] is None


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
    found = figures.headlines(rows)
    assert set(run_all.GOALS) <= set(found)
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
    assert None not in figures.headlines(rows).values()


class ScriptedServer:
    """Streams as SGLang does with ``--stream-interval 2``: usage in every piece, some pieces without text."""

    def __init__(self, status: int = 200, short: bool = False):
        self.bodies, self.status, self.short = [], status, short

    def __call__(self, request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        self.bodies.append(body)
        if self.status != 200:
            return httpx.Response(self.status, text="no")
        last = body["max_tokens"] - (1 if self.short else 0)
        counts = [*range(1, last, 2), last]
        pieces = [{"choices": [{"delta": {"role": "assistant", "content": ""}}]}]
        pieces += [{"choices": [{"delta": {"content": ""}}],
                    "usage": {"prompt_tokens": 7, "completion_tokens": count}} for count in counts]  # fmt: skip
        lines = [f"data: {json.dumps(piece)}\n\n" for piece in pieces] + ["data: [DONE]\n\n"]
        return httpx.Response(200, text="".join(lines), headers={"content-type": "text/event-stream"})


LOAD = Load(users=2, retention=0.05, images=2, side=64, text=10, answer=(4, 6), ramp=0.0)


def held(server: ScriptedServer, load: Load = LOAD) -> list[Turn]:
    client = TimedClient("http://scripted", load, "cell", transport=httpx.MockTransport(server))
    return asyncio.run(client.run(0.5))


def test_requests_are_new_and_as_the_cell_says():
    server = ScriptedServer()
    turns = held(server)
    finished = [turn for turn in turns if turn.arrivals]
    assert len(finished) >= 4 and not any(turn.error for turn in turns)
    assert all(turn.tokens[0] == 1 and turn.tokens[-1] in (4, 5, 6) and turn.prompt_tokens == 7 for turn in finished)
    urls = [part["image_url"]["url"] for body in server.bodies for part in body["messages"][0]["content"][:2]]
    assert len(urls) == 2 * len(server.bodies) == len(set(urls))
    texts = [body["messages"][0]["content"][2]["text"] for body in server.bodies]
    assert len(set(texts)) == len(texts) and {len(text) for text in texts} == {10}
    assert all(body["custom_params"] == {"tgvkv_retention": 0.05} and body["ignore_eos"] for body in server.bodies)
    stock = ScriptedServer()
    held(stock, replace(LOAD, retention=None, images=0))
    assert "custom_params" not in stock.bodies[0] and len(stock.bodies[0]["messages"][0]["content"]) == 1


@pytest.mark.parametrize("server, said", [(ScriptedServer(503), "503"), (ScriptedServer(short=True), "ended after")])
def test_refused_and_short_answers_are_errors(server, said):
    turns = held(server)
    assert turns and all(said in turn.error for turn in turns if turn.error) and any(turn.error for turn in turns)


def test_pictures_are_their_seed():
    assert jpeg_url((1, 2), 64) == jpeg_url((1, 2), 64) != jpeg_url((1, 3), 64)
