"""What the right answer to a question about a scene is, found by brute force."""

from __future__ import annotations

import re

from tgvkv_sglang.demo import scenes as S

NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def answer(scene: S.Scene, text: str) -> str:
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
