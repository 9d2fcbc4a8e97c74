"""Scenes, pictures, questions and probes of the demo model, against an oracle that knows only text and objects."""

from __future__ import annotations

import random
import re

import numpy as np
import pytest

from tgvkv_sglang.demo import probes as P
from tgvkv_sglang.demo import questions as Q
from tgvkv_sglang.demo import scenes as S

NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def oracle(scene: S.Scene, text: str) -> str:
    """The answer to ``text``, from a linear search over the scene: shares no code with the generator."""
    everything = sorted(scene.objects, key=lambda o: (o.row, o.column))

    def matching(phrase: str) -> list[S.SceneObject]:
        words = re.sub(r"\b(the|object|objects|number)\b", " ", phrase).split()
        return [o for o in everything if all(w in (o.color, o.shape, str(o.digit)) for w in words)]

    def only(phrase: str) -> S.SceneObject:
        found = matching(phrase)
        assert len(found) == 1, f"{phrase!r} means {len(found)} objects"
        return found[0]

    if m := re.fullmatch(r"what color is (.*)\?", text):
        return only(m[1]).color
    if m := re.fullmatch(r"what shape is (.*)\?", text):
        return only(m[1]).shape
    if m := re.fullmatch(r"what number is on (.*)\?", text):
        return str(only(m[1]).digit)
    if m := re.fullmatch(r"where is (.*)\?", text):
        o = only(m[1])
        return f"{S.ROWS[o.row]} row column {'abcdefgh'[o.column]}"
    if m := re.fullmatch(r"how many (\w+) objects\?", text):
        return NUMBER_WORDS[len(matching(m[1]))]
    if m := re.fullmatch(r"what is in the (\w+) row column (\w)\?", text):
        for o in everything:
            if (S.ROWS[o.row], "abcdefgh"[o.column]) == (m[1], m[2]):
                return f"{o.color} {o.shape} {o.digit}"
        return "nothing"
    if m := re.fullmatch(r"read the numbers in the (\w+) row\.", text):
        return " ".join(str(o.digit) for o in everything if S.ROWS[o.row] == m[1])
    if m := re.fullmatch(r"list the objects in the (\w+) row\.", text):
        return " ".join(f"{o.color} {o.shape} {o.digit}" for o in everything if S.ROWS[o.row] == m[1])
    if m := re.fullmatch(r"list the (\w+) objects\.", text):
        return " ".join(f"{o.shape} {o.digit}" for o in everything if o.color == m[1])
    assert text == "describe the image.", text
    return " ".join(f"{o.color} {o.shape} {o.digit}" for o in everything)


@pytest.mark.parametrize("cls", Q.CLASSES)
def test_answers_follow_from_the_scene(cls):
    rng = random.Random(5)
    for seed in range(150):
        scene = S.make_scene(seed)
        question = Q.ask(scene, rng, cls)
        assert question.answer == oracle(scene, question.text), (seed, question.text)


@pytest.mark.parametrize("cls", Q.CLASSES)
def test_evidence_names_the_objects_each_word_is_read_from(cls):
    rng = random.Random(6)
    for seed in range(60):
        scene = S.make_scene(seed)
        question = Q.ask(scene, rng, cls)
        assert len(question.evidence) == len(question.answer_words)
        if cls == "count":
            assert len(question.evidence[0]) == NUMBER_WORDS.index(question.answer)
            continue
        for word, evidence in zip(question.answer_words, question.evidence, strict=True):
            if word in ("row", "column", "nothing"):
                assert evidence == ()
                continue
            (index,) = evidence
            o = scene.objects[index]
            assert word in (o.color, o.shape, str(o.digit), S.ROWS[o.row], S.COLUMNS[o.column])


def test_questions_about_two_images_are_about_the_named_one():
    rng = random.Random(7)
    for seed in range(100):
        pair = S.make_scene(seed), S.make_scene(seed + 1000)
        question = Q.compare(*pair, rng)
        m = re.fullmatch(r"(.*) in image (one|two)([?.])", question.text)
        assert m and question.answer == oracle(pair[m[2] == "two"], m[1] + m[3])


@pytest.mark.parametrize("size", [(512, 512), (256, 256), (384, 512), (768, 384), (640, 512)])
def test_scene_invariants(size):
    for seed in range(60):
        scene = S.make_scene(seed, size)
        assert scene == S.make_scene(seed, size)
        assert 5 <= len(scene.objects) <= S.MAX_OBJECTS
        assert len({o.digit for o in scene.objects}) == len(scene.objects)
        assert len({(o.color, o.shape) for o in scene.objects}) == len(scene.objects)
        assert len({(o.row, o.column) for o in scene.objects}) == len(scene.objects)
        reading = [(o.row, o.column) for o in scene.objects]
        raster = [(o.token_row, o.token_column) for o in scene.objects]
        assert reading == sorted(reading) and raster == sorted(raster)
        for o in scene.objects:  # the token lies wholly inside the tile
            for token, tile, extent in ((o.token_row, o.row, size[1]), (o.token_column, o.column, size[0])):
                assert tile * extent <= token * 32 * 8 and (token + 1) * 32 * 8 <= (tile + 1) * extent
                assert S.tile_of_token(extent, token) == tile
    assert S.make_scene(1, size) != S.make_scene(2, size)


def test_every_object_is_drawn_inside_its_one_token():
    for seed in range(30):
        scene = S.make_scene(seed)
        picture = np.asarray(S.render(scene)).astype(int)
        assert picture.shape == (512, 512, 3)
        empty = np.asarray(S.render(S.Scene(scene.seed, 512, 512, scene.board, ()))).astype(int)
        touched = np.abs(picture - empty).sum(-1).reshape(16, 32, 16, 32).sum((1, 3)) > 0
        assert {(int(r), int(c)) for r, c in np.argwhere(touched)} == {
            (o.token_row, o.token_column) for o in scene.objects
        }


def test_sprites_are_all_different():
    seen = {}
    for color in S.COLORS:
        for shape in S.SHAPES:
            for digit in range(10):
                pixels = np.asarray(S.sprite(color, shape, digit)).astype(int)
                key = pixels.tobytes()
                assert key not in seen, (color, shape, digit, seen.get(key))
                seen[key] = (color, shape, digit)
    assert len(seen) == 8 * 8 * 10


def test_bad_input_is_refused_with_its_value():
    with pytest.raises(ValueError, match="500"):
        S.make_scene(1, (500, 512))
    with pytest.raises(ValueError, match="n_objects=11"):
        S.make_scene(1, n_objects=11)
    with pytest.raises(ValueError, match="smell"):
        Q.ask(S.make_scene(1), random.Random(0), "smell")
    with pytest.raises(ValueError, match="smell"):
        list(P.probes(1, classes=("smell",)))
    with pytest.raises(ValueError, match="2 answers for 5"):
        P.chat_messages(P.chat(1, turns=6), answers=["red", "blue"])


def test_probes_are_fixed_and_many():
    probes = list(P.probes())
    assert len(probes) >= 2000 and len({p.cls for p in probes}) >= 6
    assert probes == list(P.probes())
    other = list(P.probes(3, seed=1))
    assert other != list(P.probes(3))
    for probe in probes:
        if probe.cls not in ("two_images", "second_turn"):
            assert probe.cls == probe.question.cls and len(probe.turns) == len(probe.scenes) == 1
            assert probe.question.answer == oracle(probe.scenes[0], probe.question.text)
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
