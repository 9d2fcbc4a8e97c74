"""The held-out probes of the demo model: fixed, many, and scored by word."""

import pytest

from tests.unit.demo.answers import answer
from tgvkv_sglang.demo import questions as Q
from training.demo_model import probes as P


def test_probes_are_fixed_and_many():
    probes = list(P.probes())
    assert len(probes) >= 2000 and len({p.cls for p in probes}) >= 6
    assert probes == list(P.probes())
    other = list(P.probes(3, seed=1))
    assert other != list(P.probes(3))
    for probe in probes:
        if probe.cls not in ("two_images", "second_turn"):
            assert probe.cls == probe.question.cls and len(probe.turns) == len(probe.scenes) == 1
            assert probe.question.answer == answer(probe.scenes[0], probe.question.text)
        elif probe.cls == "second_turn":
            assert len(probe.turns) == 2 and probe.turns[0].text != probe.turns[1].text


def test_chat_has_six_different_turns_about_one_picture():
    probe = P.chat(3)
    assert len(probe.turns) >= 6 and len({t.text for t in probe.turns}) == len(probe.turns)
    messages = P.chat_messages(probe)
    assert [m["role"] for m in messages] == ["user", "assistant"] * 5 + ["user"]
    assert [part["type"] for m in messages if m["role"] == "user" for part in m["content"]].count("image_url") == 1
    assert messages[0]["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")
    assert messages[1]["content"] == probe.turns[0].answer


@pytest.mark.parametrize(
    ("said", "exact", "right", "words"),
    [
        ("red star 4", 1, 3, 3),
        ("red star 5", 0, 2, 3),
        ("red star", 0, 2, 3),
        ("red star 4 blue", 0, 3, 4),
        ("", 0, 0, 3),
    ],
)
def test_tally(said, exact, right, words):
    tally = P.Tally()
    tally.add(Q.Question("at", "", "red star 4"), said)
    assert (tally.n, tally.exact, tally.words_right, tally.words) == (1, exact, right, words)


def test_a_floor_above_half_of_the_full_score_is_unfit():
    full, floor = P.Tally(words=100, words_right=90), P.Tally(words=100, words_right=45)
    assert P.fit_to_measure(full, floor)
    assert not P.fit_to_measure(full, P.Tally(words=100, words_right=46))


def test_bad_input_is_refused_with_its_value():
    with pytest.raises(ValueError, match="smell"):
        list(P.probes(1, classes=("smell",)))
    with pytest.raises(ValueError, match="2 answers for 5"):
        P.chat_messages(P.chat(1, turns=6), answers=["red", "blue"])
