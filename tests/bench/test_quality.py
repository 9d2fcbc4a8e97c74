"""The quality benchmark without a server: boards, cells, figures, the client against a scripted server, and the replay
in transformers against the oracle."""

from __future__ import annotations

import json
from collections import Counter

import httpx
import numpy as np
import pytest
import torch

from bench.client import RefusedError
from bench.quality import cells as C
from bench.quality.__main__ import Bench, agreement, arguments, cells_of, settings
from bench.quality.boards import BOARDS, CLASSES, REPORTED, TURNS, chat, evidence, vision_tokens
from bench.quality.evidence_policy.tgvkv_evidence import Evidence
from bench.quality.live import EVIDENCE_POLICY, SLACK, ask
from bench.quality.report import policies_table, retentions_table, rules_table, tables
from bench.quality.score import exact_of, mark, paired, share_of, wilson, word_share
from tests.registered import other_packages
from tests.unit.selection.random_prompt import LAYERS, Prompt
from tgvkv_sglang.config import RequestOptions
from tgvkv_sglang.registry import BUDGETS, POLICIES

# -- boards ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("board", BOARDS)
def test_chats_are_their_seeds_and_ask_each_class_equally_often_in_each_turn(board):
    count = len(CLASSES[board])
    chats = [chat(board, REPORTED + i) for i in range(4 * count)]
    assert chats == [chat(board, REPORTED + i) for i in range(4 * count)]
    assert len({one.scene for one in chats}) == len(chats)
    for turn in range(TURNS):
        assert Counter(one.turns[turn].cls for one in chats) == dict.fromkeys(CLASSES[board], 4)
    assert all(len({question.text for question in one.turns}) == TURNS for one in chats)
    names = [one.name(turn) for one in chats for turn in range(TURNS)]
    assert len(set(names)) == len(names)


def test_a_crowded_board_has_more_objects_than_a_layer_keeps_and_digits_that_differ_in_a_row():
    for seed in range(30):
        scene = chat("crowded", seed).scene
        assert 20 <= len(scene.objects) <= 24 and len(scene.objects) > 0.05 * vision_tokens(scene)
        assert len({(o.row, o.column) for o in scene.objects}) == len(scene.objects)
        assert len({(o.row, o.digit) for o in scene.objects}) == len(scene.objects)
        assert len({(o.color, o.shape) for o in scene.objects}) == len(scene.objects)


def test_the_evidence_is_where_the_answers_words_come_from():
    for seed in range(10):
        one = chat("sparse", seed)
        for question in one.turns:
            tokens = evidence(one.scene, question)
            assert tokens == sorted(set(tokens))
            seen = {(o.token_row * 16 + o.token_column): o for o in one.scene.objects}
            said = {str(value) for token in tokens for o in [seen[token]] for value in (o.color, o.shape, o.digit)}
            assert set(question.answer_words) <= said or question.answer == "nothing"


def test_the_evidence_policy_keeps_what_the_requests_name_says():
    grounding = Prompt().ground([], policy=Evidence(), name="quality-sparse-7-0-2.11.5")
    assert grounding.chosen.scores.nonzero()[:, 1].view(LAYERS, 3).tolist() == [[2, 5, 11]] * LAYERS
    assert not Prompt().ground([], policy=Evidence(), name="quality-sparse-7-0-").chosen.scores.any()


# -- cells -----------------------------------------------------------------------------------------------------------


def test_the_default_plan_has_every_policy_and_all_its_options_are_valid(monkeypatch):
    plan = C.unique(C.default_plan())
    assert {cell.policy for cell in plan} >= {*POLICIES, C.EVIDENCE, C.FULL, C.FLOOR}
    assert {cell.budget for cell in plan} <= set(BUDGETS) and {cell.reclaim for cell in plan} == {"pressure", "eager"}
    with other_packages(monkeypatch, EVIDENCE_POLICY):
        for cell in plan:
            RequestOptions.from_custom_params(cell.options())
    assert set(plan) <= set(C.full_plan())


def test_cells_of_the_command_line():
    flags = ["--policies", "tgv", "peak", "--retentions", "0.1", "0.2", "--budgets", "own", "tvb"]
    args = arguments().parse_args(flags)
    assert len(cells_of(args)) == 8 and C.Cell("peak", "0.2", "tvb") in cells_of(args)
    assert cells_of(arguments().parse_args([])) == C.unique(C.default_plan())


# -- figures ---------------------------------------------------------------------------------------------------------


def run_of(*exact: str) -> dict:
    return {"exact": list(exact), "words": [" ".join(f"{3 * int(c)}/3" for c in turn) for turn in exact]}


def test_marks_by_hand():
    chats = [chat("sparse", seed) for seed in range(2)]
    right = [question.answer for question in chats[0].turns]
    wrong = ["", chats[1].turns[1].answer + " too", "x " + chats[1].turns[2].answer]
    run = mark(chats, [right, wrong])
    assert run["exact"] == ["10", "10", "10"]
    lengths = [[len(question.answer_words) for question in one.turns] for one in chats]
    assert run["words"][0] == f"{lengths[0][0]}/{lengths[0][0]} 0/{lengths[1][0]}"
    assert run["words"][1] == f"{lengths[0][1]}/{lengths[0][1]} {lengths[1][1]}/{lengths[1][1] + 1}"
    assert word_share(run, 0) == lengths[0][0] / (lengths[0][0] + lengths[1][0])


def test_shares_and_intervals_by_hand():
    run = run_of("1110", "1100")
    assert exact_of(run).tolist() == [[1, 1], [1, 1], [1, 0], [0, 0]]
    assert share_of(run)[0] == 5 / 8 and share_of(run, 1)[0] == 0.5 and word_share(run) == 15 / 24
    # textbook values: 8 of 10 is 0.490 to 0.943; nothing of 10 is 0 to 0.278
    np.testing.assert_allclose(wilson(0.8, 10), (0.4902, 0.9433), atol=1e-4)
    np.testing.assert_allclose(wilson(0.0, 10), (0.0, 0.2775), atol=1e-4)
    assert wilson(1.0, 10)[1] == pytest.approx(1.0)


def test_paired_differences_are_those_of_the_same_chats():
    rng = np.random.default_rng(0)
    base = rng.random((300, 1)) < 0.5
    better = base | (rng.random((300, 1)) < 0.2)
    as_run = lambda marks: run_of("".join(map(str, marks[:, 0].astype(int))))  # noqa: E731
    difference, low, high = paired(as_run(better), as_run(base))
    assert difference == pytest.approx((better & ~base).mean())
    spread = 1.96 * np.sqrt((better & ~base).mean() * (1 - (better & ~base).mean()) / 300)
    np.testing.assert_allclose((low, high), (difference - spread, difference + spread), atol=0.01)
    assert paired(as_run(base), as_run(base)) == (0, 0, 0)


def test_tables_name_every_policy_and_order_them():
    runs = {("sparse", C.ALL): run_of("1111"), ("sparse", C.NONE): run_of("0000"),
            ("sparse", C.Cell("tgv")): run_of("1100"), ("sparse", C.Cell("peak")): run_of("1110"),
            ("sparse", C.Cell("peak", "0.02")): run_of("1000")}  # fmt: skip
    runs = {pair: {key: rows * TURNS for key, rows in run.items()} for pair, run in runs.items()}
    lines = policies_table(runs, "sparse").splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["full", "peak", "tgv", "floor"]
    assert "+25.0" in lines[3] and lines[3].split("|")[3].strip() == "75.0"
    assert "| peak |  |  |  | 75.0 | 25.0 |  |" in retentions_table(runs, "sparse")
    for rule in C.RULES:
        runs["sparse", C.Cell("tgv", budget=rule)] = runs["sparse", C.Cell("tgv")]
    assert "| tgv | 50.0 | 50.0 | 50.0 | 50.0 |" in rules_table(runs, "sparse") and "peak" in tables(runs)
    other = {pair: runs["sparse", C.Cell("peak")] for pair in [("sparse", C.Cell("tgv"))]}
    assert list(agreement(runs, other)) == ["sparse tgv 0.05 pressure: 75.0 % alike, exact 50.0 and 75.0"]


# -- the client ------------------------------------------------------------------------------------------------------


def test_every_question_comes_after_the_true_answers_whatever_was_said():
    bodies = []

    def server(request: httpx.Request) -> httpx.Response:
        bodies.append(json.loads(request.content))
        return httpx.Response(200, json={"choices": [{"message": {"content": f" said {len(bodies)} "}}]})

    one = chat("crowded", 3)
    answers = ask("http://x", C.Cell("peak", "0.02"), [one], 1, transport=httpx.MockTransport(server))
    assert answers == [["said 1", "said 2", "said 3"]]
    for turn, body in enumerate(bodies):
        said = [message["content"] for message in body["messages"] if message["role"] == "assistant"]
        assert said == [question.answer for question in one.turns[:turn]]
        assert body["messages"][-1]["content"][-1]["text"] == one.turns[turn].text and body["rid"] == one.name(turn)
        assert body["custom_params"] == {"tgvkv_retention": 0.02, "tgvkv_policy": "peak", "tgvkv_budget": "own"}
        assert body["max_tokens"] == len(one.turns[turn].answer_words) + SLACK


def test_a_refused_question_is_told_with_its_cell():
    refuse = httpx.MockTransport(lambda request: httpx.Response(400, text="no such policy"))
    with pytest.raises(ExceptionGroup) as error:
        ask("http://x", C.Cell("nobodys"), [chat("sparse", 0)], 1, transport=refuse)
    assert error.group_contains(RefusedError, match="nobodys.*HTTP 400: no such policy")


def test_what_is_done_is_not_repeated(tmp_path):
    flags = ["--policies", "tgv", "peak", "--boards", "sparse", "--chats", "2", "--out", str(tmp_path / "out.json")]
    bench = Bench(arguments().parse_args(flags))
    assert [cell.policy for _, cell in bench.left] == ["tgv", "peak"]
    bench.add("sparse", C.Cell("tgv"), [["a", "b", "c"]] * 2)
    again = Bench(arguments().parse_args(flags))
    assert [cell.policy for _, cell in again.left] == ["peak"]
    assert list(again.runs("server")) == [("sparse", C.Cell("tgv"))] and not again.runs("transformers")
    more = Bench(arguments().parse_args([*flags, "--chats", "3"]))
    assert len(more.left) == 2 and not more.runs("server"), "other chats are another run"
    assert settings("server", "sparse", C.Cell("tgv"), 0, 2) != settings("server", "sparse", C.Cell("tgv"), 1, 2)


# -- the replay ------------------------------------------------------------------------------------------------------


@pytest.mark.model
def test_the_replay_says_what_the_oracle_says(monkeypatch):
    """Turn by turn, both ways to reclaim: decoded KV stays as it is as far as the answer was the true one."""
    from bench.quality.replay import Replay
    from tests.oracle.oracle import load
    from tgvkv_sglang.demo.bundle import DEMO_MODEL
    from tgvkv_sglang.demo.scenes import render
    from training.demo_model.probes import Probe, chat_messages

    cells = [C.ALL, C.Cell("tgv", "0.05"), C.Cell("tgv", "0.02", reclaim="eager")]
    oracle = load(DEMO_MODEL, dtype=torch.float32, image_backend="pil")
    compared = 0
    for seed in range(3):
        one = chat("sparse", seed)
        with other_packages(monkeypatch, EVIDENCE_POLICY):
            held = Replay(cells).hold(one)
        for cell, said in zip(cells, held, strict=True):
            retention = None if cell.policy == "full" else cell.retention
            state = None
            for turn, question in enumerate(one.turns):
                messages = chat_messages(Probe("sparse", (one.scene,), one.turns[: turn + 1]))
                prompt = oracle.prepare(messages, [render(one.scene)])
                most = len(question.answer_words) + SLACK
                if state is None:
                    answered = oracle.greedy(prompt, most, retention=retention, stop_at_eos=True)
                else:
                    cached = _agreeing(state.token_ids[: state.num_computed], prompt.token_ids[:-1])
                    view = "kept" if cell.reclaim == "eager" else "full"
                    answered = oracle.continue_(state, prompt, most, view=view, retention=retention, cached_len=cached,
                                                stop_at_eos=True)  # fmt: skip
                state = answered.state
                text = oracle.tokenizer.decode([t for t in answered.token_ids if t != oracle.eos_token_id]).strip()
                if min(answered.gaps) > 1e-3:
                    assert said[turn] == text, (cell, seed, turn)
                    compared += 1
    assert compared >= 20


def _agreeing(first: list[int], second: list[int]) -> int:
    count = 0
    while count < min(len(first), len(second)) and first[count] == second[count]:
        count += 1
    return count
