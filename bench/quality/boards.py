"""Chats about two kinds of board, functions of their seeds alone; the last word of a chat is never the server's.

**sparse**: 5 to 10 objects, as the bundled model was trained on. A tenth of the vision tokens would hold everything.
**crowded**: 20 to 24 objects, more than 5 % of the tokens, so that a policy that merely tells objects from background
keeps the wrong ones. The model never saw such boards; it reads them well where digits in a row differ, which they do.

Seeds below :data:`REPORTED` are for developing policies, those from it on for reporting.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from tgvkv_sglang.demo import questions as Q
from tgvkv_sglang.demo.scenes import (
    COLORS,
    DEFAULT_SIZE,
    GRID,
    SHAPES,
    TOKEN_PX,
    Scene,
    SceneObject,
    make_scene,
    tokens_of_tile,
)

REPORTED = 10_000
TURNS = 3
# Classes that the model card calls fit to measure: prefill alone does not settle their answers.
CLASSES = {"sparse": ("at", "numbers", "row", "colorlist", "describe"), "crowded": ("at", "numbers", "row")}
BOARDS = tuple(CLASSES)


@dataclass(frozen=True)
class Chat:
    """Questions about one board, in order, with their true answers."""

    board: str
    seed: int
    scene: Scene
    turns: tuple[Q.Question, ...]

    def name(self, turn: int) -> str:
        """Request id of a turn: the same in every cell. Ends with the tokens of the picture that hold the answer."""
        tokens = evidence(self.scene, self.turns[turn])
        return f"quality-{self.board}-{self.seed}-{turn}-" + ".".join(map(str, tokens))


def evidence(scene: Scene, question: Q.Question) -> list[int]:
    """Vision tokens that the answer is read from, counted from the picture's first."""
    _, columns = scene.token_grid
    objects = sorted({index for read in question.evidence for index in read})
    return [scene.objects[i].token_row * columns + scene.objects[i].token_column for i in objects]


def chat(board: str, seed: int) -> Chat:
    """Turns ask in different classes, which come equally often in each turn over consecutive seeds."""
    rng = random.Random(f"quality/{board}/{seed}")
    scene = make_scene(seed, rng=rng) if board == "sparse" else crowded_scene(seed, rng)
    classes = CLASSES[board]
    step = 1 + seed // len(classes) % 2
    asked = [Q.ask(scene, rng, classes[(seed + step * turn) % len(classes)]) for turn in range(TURNS)]
    return Chat(board, seed, scene, tuple(asked))


def crowded_scene(seed: int, rng: random.Random) -> Scene:
    """20 to 24 objects of different looks; digits differ within a row."""
    count = rng.randint(20, 24)
    tiles = sorted(rng.sample([(row, column) for row in range(GRID) for column in range(GRID)], count))
    looks = rng.sample([(color, shape) for color in COLORS for shape in SHAPES], count)
    digits = [rng.sample(range(10), GRID) for _ in range(GRID)]
    width, height = DEFAULT_SIZE
    token_rows = [rng.choice(tokens_of_tile(height, row)) for row in range(GRID)]
    objects = []
    for (row, column), (color, shape) in zip(tiles, looks, strict=True):
        place = token_rows[row], rng.choice(tokens_of_tile(width, column))
        shift = rng.randint(-1, 1), rng.randint(-1, 1)
        objects.append(SceneObject(row, column, color, shape, digits[row].pop(), *place, *shift))
    return Scene(seed, width, height, rng.randrange(5), tuple(objects))


def vision_tokens(scene: Scene) -> int:
    return scene.width * scene.height // TOKEN_PX**2
