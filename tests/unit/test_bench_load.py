"""The load generator without a server: seeded traffic, exact figures, and the client against a scripted server."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest

from bench.load import Run, missing, read_runs, save
from bench.load_client import LoadClient
from bench.load_traffic import Traffic, plan_chats
from bench.stats import Turn, summarise


def test_traffic_is_its_seed():
    traffic = Traffic(chats=40, rate=2.0)
    chats = plan_chats(traffic)
    assert chats == plan_chats(traffic) and chats != plan_chats(Traffic(chats=40, rate=2.0, seed=1))
    assert [chat.start for chat in chats] == sorted(chat.start for chat in chats) and chats[0].start > 0
    assert all(len(chat.questions) == len(chat.pauses) == traffic.turns for chat in chats)
    assert len({question for chat in chats for question in chat.questions}) == 40 * traffic.turns


@pytest.mark.parametrize("reuse, images", [(0.0, 30), (1.0, 1)])
def test_reuse(reuse, images):
    assert len({chat.image for chat in plan_chats(Traffic(chats=30, reuse=reuse))}) == images


def test_the_mean_rate_is_the_rate_asked_for():
    chats = plan_chats(Traffic(chats=4000, rate=5.0))
    assert chats[-1].start / 4000 == pytest.approx(1 / 5, rel=0.06)


@pytest.mark.parametrize("bad", [{"users": 0}, {"reuse": 1.5}, {"think": -1}, {"rate": -1}])
def test_bad_settings_name_the_value(bad):
    with pytest.raises(ValueError, match=str(*bad.values())):
        Traffic(**bad)


def test_figures_by_hand():
    turns = [
        Turn(0, 0, 1.0, [1.5, 1.7, 2.1], [1, 2, 4], prompt_tokens=100),
        Turn(0, 1, 3.0, [3.1, 3.2], [1, 2], prompt_tokens=150, cached_tokens=100, before=100),
        Turn(1, 1, 3.0, [5.0], [1], prompt_tokens=150, cached_tokens=99, before=100),
        Turn(2, 0, 3.0, error="HTTP 500"),
    ]
    row = summarise(turns, 10.0, slo_first=0.6, slo_between=0.15)
    assert (row["requests"], row["errors"], row["follow_ups"]) == (4, 1, 2)
    assert row["ttft_p50_ms"] == 500 and row["itl_p50_ms"] == 200  # gaps .2, .2, .2 and .1
    assert row["requests_per_s"] == 0.3 and row["answer_tokens_per_s"] == 0.7
    assert row["goodput_per_s"] == 0.1  # the first is too slow between tokens, the third before them
    assert row["cached_share"] == round(199 / 400, 4) and row["follow_ups_resident_share"] == 0.5


def test_figures_of_nothing():
    row = summarise([], 1.0, 1, 1)
    assert row["ttft_p99_ms"] is None and row["cached_share"] is None and row["requests"] == 0
    with pytest.raises(ValueError, match="0"):
        summarise([], 0, 1, 1)


class ScriptedServer:
    """Streams ``answer N``, a character a piece; the prompt's earlier tokens are always cached."""

    def __init__(self, fail_at: int | None = None):
        self.bodies, self.fail_at = [], fail_at

    def __call__(self, request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        self.bodies.append(body)
        if len(self.bodies) - 1 == self.fail_at:
            return httpx.Response(503, text="no")
        earlier = len(body["messages"]) - 1
        pieces = [{"choices": [{"delta": {"role": "assistant", "content": ""}}]}]
        for i, letter in enumerate(f"answer {earlier}"[: body["max_tokens"]], 1):
            usage = {"prompt_tokens": 10 * (earlier + 1), "completion_tokens": i,
                     "prompt_tokens_details": {"cached_tokens": 10 * earlier}}  # fmt: skip
            pieces.append({"choices": [{"delta": {"content": letter}}], "usage": usage})
        lines = [f"data: {json.dumps(piece)}\n\n" for piece in pieces] + ["data: [DONE]\n\n"]
        return httpx.Response(200, text="".join(lines), headers={"content-type": "text/event-stream"})


def held(server: ScriptedServer, **settings):
    traffic = Traffic(think=0, side=32, **settings)

    async def run():
        client = LoadClient("http://scripted", traffic, transport=httpx.MockTransport(server))
        return await client.run(plan_chats(traffic))

    return asyncio.run(run())


@pytest.mark.parametrize("rate", (0.0, 1000.0))
def test_chats_continue_with_the_servers_own_words(rate):
    server = ScriptedServer()
    turns, seconds, resident = held(server, users=2, chats=5, turns=3, rate=rate)
    assert len(turns) == 15 and not [turn for turn in turns if turn.error]
    assert resident == 5 and seconds > 0
    last = [body["messages"] for body in server.bodies if len(body["messages"]) == 5]
    assert len(last) == 5
    for messages in last:
        assert [m["role"] for m in messages] == ["user", "assistant"] * 2 + ["user"]
        assert [m["content"] for m in messages[1::2]] == ["answer 0", "answer 2"]
        assert [part["type"] for part in messages[0]["content"]] == ["image_url", "text"]
    assert all(turn.tokens == list(range(1, 9)) and turn.prompt_tokens == 10 * (2 * turn.turn + 1) for turn in turns)
    assert all(turn.before == (0 if turn.turn == 0 else turn.prompt_tokens - 20) for turn in turns)


def test_a_refused_turn_is_an_error_and_ends_its_chat():
    turns, _, resident = held(ScriptedServer(fail_at=1), users=1, chats=2, turns=2)
    assert [turn.error is not None for turn in turns] == [False, True, False, False]
    assert "503" in turns[1].error and resident == 1


def test_finished_runs_are_not_repeated(tmp_path):
    runs = [Run("stock", ("--x",), 100, (1.0, 2.0), Traffic(users=users)) for users in (1, 2)]
    path = tmp_path / "load.json"
    assert missing(runs, read_runs(path)) == runs
    save(path, {runs[0].key: {**runs[0].settings(), "ttft_p50_ms": 1.5}})
    assert missing(runs, read_runs(path)) == [runs[1]]
    assert len(path.with_suffix(".csv").read_text().splitlines()) == 2
    path.write_text("{}")
    with pytest.raises(SystemExit, match="load.json"):
        read_runs(path)
