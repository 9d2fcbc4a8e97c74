"""Questions about a scene, with their answers, and multi-turn and two-image chats built from them.

Every answer follows from the scene alone; ``tests/unit/demo/test_scenes.py`` derives each one again by brute force.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass

from .scenes import COLORS, COLUMNS, GRID, ROWS, SHAPES, Scene, SceneObject

COUNTS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
IMAGE_NAMES = ("one", "two")
SINGLE_TOKEN_CLASSES = ("color", "shape", "digit", "count")
MULTI_TOKEN_CLASSES = ("at", "where", "numbers", "row", "colorlist", "describe")
CLASSES = SINGLE_TOKEN_CLASSES + MULTI_TOKEN_CLASSES


@dataclass(frozen=True)
class Question:
    """One question of class ``cls``; ``answer`` is words separated by single spaces.

    ``evidence[i]`` are the indices into ``scene.objects`` that word ``i`` of the answer is read from (may be empty).
    """

    cls: str
    text: str
    answer: str
    evidence: tuple[tuple[int, ...], ...] = ()

    @property
    def answer_words(self) -> list[str]:
        return self.answer.split()


def name_of(o: SceneObject) -> str:
    return f"{o.color} {o.shape} {o.digit}"


def _references(scene: Scene, o: SceneObject, hidden: str) -> list[str]:
    """Phrases that single ``o`` out in ``scene`` without naming its attribute ``hidden``."""
    colors = Counter(x.color for x in scene.objects)
    shapes = Counter(x.shape for x in scene.objects)
    found = []
    if hidden != "shape" and shapes[o.shape] == 1:
        found.append(f"the {o.shape}")
    if hidden != "color" and colors[o.color] == 1:
        found.append(f"the {o.color} object")
    if hidden != "digit":
        found.append(f"number {o.digit}")
    if hidden not in ("color", "shape"):
        found.append(f"the {o.color} {o.shape}")
    return found


def _ask_attribute(scene: Scene, rng: random.Random, cls: str) -> Question | None:
    index, o = rng.choice(list(enumerate(scene.objects)))
    references = _references(scene, o, cls)
    if not references:
        return None
    reference = rng.choice(references)
    if cls == "digit":
        return Question(cls, f"what number is on {reference}?", str(o.digit), ((index,),))
    return Question(cls, f"what {cls} is {reference}?", o.color if cls == "color" else o.shape, ((index,),))


def _ask_at(scene: Scene, rng: random.Random) -> Question:
    tiles = {(o.row, o.column): i for i, o in enumerate(scene.objects)}
    tile = rng.choice(list(tiles)) if rng.random() < 0.85 else (rng.randrange(GRID), rng.randrange(GRID))
    text = f"what is in the {ROWS[tile[0]]} row column {COLUMNS[tile[1]]}?"
    if tile not in tiles:
        return Question("at", text, "nothing", ((),))
    return Question("at", text, name_of(scene.objects[tiles[tile]]), ((tiles[tile],),) * 3)


def _ask_where(scene: Scene, rng: random.Random) -> Question:
    index, o = rng.choice(list(enumerate(scene.objects)))
    reference = rng.choice(_references(scene, o, "where"))
    answer = f"{ROWS[o.row]} row column {COLUMNS[o.column]}"
    return Question("where", f"where is {reference}?", answer, ((index,), (), (), (index,)))


def _ask_count(scene: Scene, rng: random.Random) -> Question:
    present = rng.random() < 0.85
    if rng.random() < 0.5:
        word = rng.choice([o.color for o in scene.objects] if present else list(COLORS))
        found = tuple(i for i, o in enumerate(scene.objects) if o.color == word)
    else:
        word = rng.choice([o.shape for o in scene.objects] if present else list(SHAPES))
        found = tuple(i for i, o in enumerate(scene.objects) if o.shape == word)
    return Question("count", f"how many {word} objects?", COUNTS[len(found)], (found,))


def _crowded_row(scene: Scene, rng: random.Random) -> int:
    rows = Counter(o.row for o in scene.objects)
    most = max(rows.values())
    if rng.random() < 0.7:
        return rng.choice([r for r, n in rows.items() if n == most])
    return rng.choice(list(rows))


def _listing(cls: str, text: str, items: list[tuple[int, str]]) -> Question:
    """A list answer: ``items`` are (object index, words said about it)."""
    evidence = tuple((i,) for i, said in items for _ in said.split())
    return Question(cls, text, " ".join(said for _, said in items), evidence)


def _ask_numbers(scene: Scene, rng: random.Random) -> Question:
    row = _crowded_row(scene, rng)
    digits = [(i, str(o.digit)) for i, o in enumerate(scene.objects) if o.row == row]
    return _listing("numbers", f"read the numbers in the {ROWS[row]} row.", digits)


def _ask_row(scene: Scene, rng: random.Random) -> Question:
    row = _crowded_row(scene, rng)
    names = [(i, name_of(o)) for i, o in enumerate(scene.objects) if o.row == row]
    return _listing("row", f"list the objects in the {ROWS[row]} row.", names)


def _ask_colorlist(scene: Scene, rng: random.Random) -> Question:
    color = rng.choice([o.color for o in scene.objects])
    names = [(i, f"{o.shape} {o.digit}") for i, o in enumerate(scene.objects) if o.color == color]
    return _listing("colorlist", f"list the {color} objects.", names)


def _ask_describe(scene: Scene, rng: random.Random) -> Question:
    return _listing("describe", "describe the image.", [(i, name_of(o)) for i, o in enumerate(scene.objects)])


_ASK = {
    "color": lambda s, r: _ask_attribute(s, r, "color"),
    "shape": lambda s, r: _ask_attribute(s, r, "shape"),
    "digit": lambda s, r: _ask_attribute(s, r, "digit"),
    "at": _ask_at,
    "where": _ask_where,
    "count": _ask_count,
    "numbers": _ask_numbers,
    "row": _ask_row,
    "colorlist": _ask_colorlist,
    "describe": _ask_describe,
}


def ask(scene: Scene, rng: random.Random, cls: str) -> Question:
    """One question of class ``cls`` about ``scene``. Raises ``ValueError`` for an unknown class."""
    if cls not in _ASK:
        raise ValueError(f"unknown question class {cls!r}: must be one of {CLASSES}")
    while (question := _ASK[cls](scene, rng)) is None:
        continue
    return question


def questions(scene: Scene, rng: random.Random, n: int = 8, classes: tuple[str, ...] = CLASSES) -> list[Question]:
    """``n`` questions with different texts about ``scene``: the turns of a chat about one image."""
    asked: dict[str, Question] = {}
    for attempt in range(50 * n):
        question = ask(scene, rng, classes[attempt % len(classes)] if attempt < len(classes) else rng.choice(classes))
        asked.setdefault(question.text, question)
        if len(asked) == n:
            break
    turns = list(asked.values())
    rng.shuffle(turns)
    return turns


def about_image(question: Question, image: int) -> Question:
    """The same question, asked in a chat with two images about image ``image`` (0 or 1)."""
    mark = question.text[-1]
    return Question(
        question.cls, f"{question.text[:-1]} in image {IMAGE_NAMES[image]}{mark}", question.answer, question.evidence
    )


def compare(first: Scene, second: Scene, rng: random.Random, classes: tuple[str, ...] = CLASSES) -> Question:
    """A question of class "compare" about one of two images (each chat turn names the image it is about)."""
    image = rng.randrange(2)
    question = about_image(ask((first, second)[image], rng, rng.choice(classes)), image)
    return Question("compare", question.text, question.answer, question.evidence)
