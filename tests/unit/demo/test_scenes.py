"""Scenes, pictures and questions of the demo model, against an oracle that knows only text and objects."""

from __future__ import annotations

import random
import re

import numpy as np
import pytest

from tests.unit.demo.answers import NUMBER_WORDS, answer
from tgvkv_sglang.demo import questions as Q
from tgvkv_sglang.demo import scenes as S


@pytest.mark.parametrize("cls", Q.CLASSES)
def test_answers_follow_from_the_scene(cls):
    rng = random.Random(5)
    for seed in range(150):
        scene = S.make_scene(seed)
        question = Q.ask(scene, rng, cls)
        assert question.answer == answer(scene, question.text), (seed, question.text)


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
        assert m and question.answer == answer(pair[m[2] == "two"], m[1] + m[3])


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
