"""The load generator without a server: seeded traffic, exact figures, and the client against a scripted server."""

from __future__ import annotations

from dataclasses import asdict

import httpx
import pytest

from bench.client import hold_chats
from bench.common import RESULTS, STOCK, Arm, Store, key_of
from bench.figures import Turn, summarise
from bench.load import arguments, planned, settings, write_table
from bench.traffic import Traffic, plan_chats
from tests.bench.scripted import ScriptedServer, piece


def test_traffic_is_its_seed():
    traffic = Traffic(chats=40, rate=2.0)
    chats = plan_chats(traffic)
    assert chats == plan_chats(traffic) and chats != plan_chats(Traffic(chats=40, rate=2.0, seed=1))
    assert [chat.start for chat in chats] == sorted(chat.start for chat in chats) and chats[0].start > 0
    assert all(len(chat.questions) == len(chat.pauses) == traffic.turns for chat in chats)
    assert len({question for chat in chats for question in chat.questions}) == 40 * traffic.turns


@pytest.mark.parametrize("reuse, images", [(0.0, 30), (1.0, 1)])
def test_reuse(reuse, images):
    assert len({chat.pictures for chat in plan_chats(Traffic(chats=30, reuse=reuse))}) == images


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


def letters(body: dict) -> list[dict]:
    """``answer N``, a character a piece; the prompt's earlier tokens are always cached."""
    earlier = len(body["messages"]) - 1
    text = f"answer {earlier}"[: body["max_tokens"]]
    return [piece(letter, 10 * (earlier + 1), i, 10 * earlier) for i, letter in enumerate(text, 1)]


def held(server: ScriptedServer, **settings):
    traffic = Traffic(think=0, side=32, **settings)
    transport = httpx.MockTransport(server)
    return hold_chats("http://scripted", plan_chats(traffic), traffic.at_once, resident=True, transport=transport)


@pytest.mark.parametrize("rate", (0.0, 1000.0))
def test_chats_continue_with_the_servers_own_words(rate):
    server = ScriptedServer(letters)
    done = held(server, users=2, chats=5, turns=3, rate=rate)
    turns = done.turns
    assert len(turns) == 15 and not [turn for turn in turns if turn.error]
    assert done.resident == done.finished == 5 and done.seconds > 0
    last = [body["messages"] for body in server.bodies if len(body["messages"]) == 5]
    assert len(last) == 5
    for messages in last:
        assert [m["role"] for m in messages] == ["user", "assistant"] * 2 + ["user"]
        assert [m["content"] for m in messages[1::2]] == ["answer 0", "answer 2"]
        assert [part["type"] for part in messages[0]["content"]] == ["image_url", "text"]
    assert all(turn.tokens == list(range(1, 9)) and turn.prompt_tokens == 10 * (2 * turn.turn + 1) for turn in turns)
    assert all(turn.before == (0 if turn.turn == 0 else turn.prompt_tokens - 20) for turn in turns)


def test_a_refused_turn_is_an_error_and_ends_its_chat():
    done = held(ScriptedServer(letters, fail_at=1), users=1, chats=2, turns=2)
    assert [turn.error is not None for turn in done.turns] == [False, True, False, False]
    assert "503" in done.turns[1].error and done.resident == done.finished == 1


def test_a_server_that_does_not_count_its_tokens():
    server = ScriptedServer(lambda body: [{"choices": [{"delta": {"content": letter}}]} for letter in "abc"])
    done = held(server, users=1, chats=1, turns=1)
    assert [turn.tokens for turn in done.turns] == [[1, 2, 3]]


def test_finished_runs_are_not_repeated(tmp_path):
    runs = [settings(STOCK, 100, (1.0, 2.0), Traffic(users=users)) for users in (1, 2)]
    path = tmp_path / "load.json"
    assert not Store(path).done
    Store(path).add(key_of(runs[0]), {**runs[0], "ttft_p50_ms": 1.5})
    assert Store(path).done == {key_of(runs[0])} and key_of(runs[1]) != key_of(runs[0])
    assert not Store(path, fresh=True).runs
    write_table(tmp_path / "load.csv", Store(path).runs)
    assert len((tmp_path / "load.csv").read_text().splitlines()) == 2


def test_a_failed_run_is_repeated(tmp_path):
    store = Store(tmp_path / "x.json")
    store.add("a", {"error": "it broke"})
    assert not store.done and list(Store(tmp_path / "x.json").runs) == ["a"]


@pytest.mark.parametrize("content", ["{}", "[]", '{"runs": []}', "{", '{"runs": null}'])
def test_a_file_that_is_no_result_is_refused_and_kept(tmp_path, content):
    path = tmp_path / "load.json"
    path.write_text(content)
    with pytest.raises(SystemExit, match="load.json is no result .*another --out"):
        Store(path)
    assert path.read_text() == content


def test_keys_of_results_that_were_committed_before_are_still_the_same():
    """Else ``bench.load`` would measure again what README shows."""
    for key, row in Store(RESULTS / "load-cpu.json").runs.items():
        traffic = Traffic(**{name: row[name] for name in asdict(Traffic())})
        slo = (row["slo_ttft_ms"], row["slo_itl_ms"])
        assert key_of(settings(Arm(row["server"], tuple(row["flags"])), row["pool"], slo, traffic)) == key


def test_the_runs_that_readme_shows_are_planned_as_they_were():
    words = ["--users", "2", "6", "12", "--rate", "0.5", "1.5"]
    args = arguments().parse_args(words)
    keys = {key_of(settings(arm, args.pool, (args.slo_ttft_ms, args.slo_itl_ms), load))
            for arm, loads in planned(args) for load in loads}  # fmt: skip
    assert keys == Store(RESULTS / "load-cpu.json").done
