"""Seeded scenes for the bundled demo model, and their pictures.

A scene is a board of 8 x 8 tiles, whatever the picture's size, with a few coloured shapes on it, each with a digit
in a badge. Every object lies inside **one** merged vision token (32 x 32 px), because a tiny vision tower does not
learn evidence that is split over several (see tgvkv_sglang/data/demo_model/MODEL_CARD.md).
"""

from __future__ import annotations

import functools
import math
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

GRID = 8
TOKEN_PX = 32
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "green": (46, 158, 70),
    "blue": (38, 84, 214),
    "yellow": (244, 205, 30),
    "orange": (245, 130, 20),
    "purple": (125, 50, 175),
    "pink": (247, 120, 190),
    "cyan": (30, 195, 215),
}
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "heart", "ring")
ROWS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
COLUMNS = tuple("abcdefgh")
MAX_OBJECTS = 10
DEFAULT_SIZE = (512, 512)
SIZES = ((512, 512), (384, 384), (512, 384), (384, 512), (640, 512), (512, 640), (256, 512), (512, 256), (768, 384))
"""(width, height) in px the model was trained on; any multiple of 128 px from 256 px on is a legal size."""

_BOARDS = (  # two tile tints a board: light enough that every colour stands out
    ((250, 247, 240), (238, 233, 222)),
    ((243, 246, 250), (228, 234, 243)),
    ((246, 246, 246), (232, 232, 232)),
    ((243, 249, 243), (228, 240, 229)),
    ((252, 244, 246), (243, 231, 235)),
)


@dataclass(frozen=True, order=True)
class SceneObject:
    """One object: ``row``/``column`` name its tile (0-7), ``token_row``/``token_column`` its merged token."""

    row: int
    column: int
    color: str
    shape: str
    digit: int
    token_row: int
    token_column: int
    dx: int = 0
    dy: int = 0

    def __post_init__(self) -> None:
        if not (0 <= self.row < GRID and 0 <= self.column < GRID and 0 <= self.digit <= 9):
            raise ValueError(f"object outside of the board or no digit: {self}")
        if self.color not in COLORS or self.shape not in SHAPES:
            raise ValueError(f"unknown colour or shape: {self.color!r} {self.shape!r}")


@dataclass(frozen=True)
class Scene:
    """A board of ``width`` x ``height`` px; ``objects`` are in reading order (row, then column), one a tile."""

    seed: int
    width: int
    height: int
    board: int
    objects: tuple[SceneObject, ...]

    @property
    def token_grid(self) -> tuple[int, int]:
        """(rows, columns) of merged vision tokens."""
        return self.height // TOKEN_PX, self.width // TOKEN_PX


@functools.cache
def tokens_of_tile(extent_px: int, tile: int) -> tuple[int, ...]:
    """Merged-token indices along one axis that lie wholly inside tile ``tile`` of a board ``extent_px`` long."""
    size = extent_px // GRID
    first = math.ceil(tile * size / TOKEN_PX)
    return tuple(t for t in range(first, (tile + 1) * size // TOKEN_PX))


@functools.cache
def tile_of_token(extent_px: int, token: int) -> int:
    """Tile in which the centre of merged token ``token`` lies, along one axis."""
    return min(GRID - 1, int((token + 0.5) * TOKEN_PX * GRID / extent_px))


def check_size(size: tuple[int, int]) -> None:
    """Raise ``ValueError`` unless both sides are multiples of 128 px and at least 256 px."""
    if any(side % 128 or side < 256 for side in size):
        raise ValueError(f"scene size {size} px: both sides must be multiples of 128 and at least 256 (say 512, 512)")


def make_scene(
    seed: int, size: tuple[int, int] = DEFAULT_SIZE, n_objects: int | None = None, rng: random.Random | None = None
) -> Scene:
    """Draw a scene. Same ``seed`` (and arguments) -> same scene.

    Digits are all different, and so are (colour, shape) pairs; one row is often crowded and one colour often frequent,
    so that lists have something to list. ``n_objects`` is 1-10 (default: 5-10 at random).
    """
    check_size(size)
    if n_objects is not None and not 1 <= n_objects <= MAX_OBJECTS:
        raise ValueError(f"n_objects={n_objects}: must be 1 to {MAX_OBJECTS} (each object has a digit of its own)")
    rng = rng or random.Random(seed)
    n = n_objects or rng.randint(5, MAX_OBJECTS)
    tiles = _draw_tiles(rng, n)
    looks = _draw_looks(rng, n)
    digits = rng.sample(range(10), n)
    width, height = size
    token_rows = [rng.choice(tokens_of_tile(height, r)) for r in range(GRID)]  # a row shares its height: tidy to read
    objects = []
    for (row, column), (color, shape), digit in zip(sorted(tiles), looks, digits, strict=True):
        token_column = rng.choice(tokens_of_tile(width, column))
        jitter = rng.randint(-1, 1), rng.randint(-1, 1)
        objects.append(SceneObject(row, column, color, shape, digit, token_rows[row], token_column, *jitter))
    return Scene(seed, width, height, rng.randrange(len(_BOARDS)), tuple(objects))


def _draw_tiles(rng: random.Random, n: int) -> set[tuple[int, int]]:
    tiles: set[tuple[int, int]] = set()
    if n >= 4 and rng.random() < 0.6:
        row = rng.randrange(GRID)
        tiles |= {(row, c) for c in rng.sample(range(GRID), rng.randint(3, min(6, n)))}
    while len(tiles) < n:
        tiles.add((rng.randrange(GRID), rng.randrange(GRID)))
    return tiles


def _draw_looks(rng: random.Random, n: int) -> list[tuple[str, str]]:
    colors = list(COLORS)
    favourite = rng.choice(colors)
    looks: list[tuple[str, str]] = []
    while len(looks) < n:
        color = favourite if rng.random() < 0.25 else rng.choice(colors)
        look = (color, rng.choice(SHAPES))
        if look not in looks:
            looks.append(look)
    return looks


@functools.cache
def sprite(color: str, shape: str, digit: int) -> Image.Image:
    """32 x 32 RGBA picture of an object with its badge, drawn at four times the size."""
    s = 4
    image = Image.new("RGBA", (TOKEN_PX * s, TOKEN_PX * s), (0, 0, 0, 0))
    draw = ImageDraw.Draw(image)
    fill = COLORS[color]
    edge = tuple(int(v * 0.55) for v in fill)
    _draw_shape(draw, shape, fill, edge, s)
    x0, y0, d = 16.5 * s, 16.5 * s, 14 * s
    draw.ellipse((x0, y0, x0 + d, y0 + d), fill=(255, 255, 255), outline=(30, 30, 30), width=s)
    draw.text((x0 + d / 2, y0 + d / 2), str(digit), fill=(15, 15, 15), font=_font(11 * s), anchor="mm")
    return image.resize((TOKEN_PX, TOKEN_PX), Image.Resampling.LANCZOS)


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size=size)


def _draw_shape(draw: ImageDraw.ImageDraw, shape: str, fill: tuple, edge: tuple, s: int) -> None:
    cx = cy = 14.5 * s
    r = 13 * s
    style = {"fill": fill, "outline": edge, "width": s + 1}
    if shape == "circle":
        draw.ellipse((cx - r, cy - r, cx + r, cy + r), **style)
    elif shape == "ring":
        draw.ellipse((cx - r, cy - r, cx + r, cy + r), **style)
        hole = r * 0.5
        draw.ellipse((cx - hole, cy - hole, cx + hole, cy + hole), fill=(0, 0, 0, 0), outline=edge, width=s + 1)
    elif shape == "square":
        q = r * 0.88
        draw.rectangle((cx - q, cy - q, cx + q, cy + q), **style)
    else:
        draw.polygon([(cx + x * r, cy + y * r) for x, y in _outline(shape)], **style)


@functools.cache
def _outline(shape: str) -> tuple[tuple[float, float], ...]:
    """Corner points of a shape in units of its radius, y downwards."""
    if shape == "triangle":
        return ((0, -1), (1, 0.85), (-1, 0.85))
    if shape == "diamond":
        return ((0, -1.05), (0.78, 0), (0, 1.05), (-0.78, 0))
    if shape == "star":
        turns = [(k * math.pi / 5 - math.pi / 2, 1.08 if k % 2 == 0 else 0.45) for k in range(10)]
        return tuple((radius * math.cos(a), radius * math.sin(a)) for a, radius in turns)
    if shape == "cross":
        w = 0.36
        return (
            (-w, -1),
            (w, -1),
            (w, -w),
            (1, -w),
            (1, w),
            (w, w),
            (w, 1),
            (-w, 1),
            (-w, w),
            (-1, w),
            (-1, -w),
            (-w, -w),
        )
    if shape == "heart":
        points = []
        for k in range(40):
            t = 2 * math.pi * k / 40
            x = 16 * math.sin(t) ** 3
            y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
            points.append((x / 16, -y / 15.5))
        return tuple(points)
    raise ValueError(f"unknown shape {shape!r}: must be one of {SHAPES}")


@functools.cache
def _board(width: int, height: int, board: int) -> np.ndarray:
    rows = (np.arange(height) * GRID // height)[:, None]
    columns = (np.arange(width) * GRID // width)[None, :]
    tints = np.array(_BOARDS[board], dtype=np.uint8)
    return tints[(rows + columns) % 2]


def render(scene: Scene) -> Image.Image:
    """RGB picture of ``scene``, ``scene.width`` x ``scene.height`` px."""
    image = Image.fromarray(_board(scene.width, scene.height, scene.board))
    for o in scene.objects:
        # The sprite's own margin (1 px on the tight side) takes the jitter, so the object stays in its token.
        patch = sprite(o.color, o.shape, o.digit)
        box = (o.token_column * TOKEN_PX, o.token_row * TOKEN_PX)
        patch = patch if (o.dx, o.dy) == (0, 0) else _shifted(o.color, o.shape, o.digit, o.dx, o.dy)
        image.paste(patch, box, patch)
    return image


@functools.cache
def _shifted(color: str, shape: str, digit: int, dx: int, dy: int) -> Image.Image:
    canvas = Image.new("RGBA", (TOKEN_PX, TOKEN_PX), (0, 0, 0, 0))
    canvas.paste(sprite(color, shape, digit), (dx, dy))
    return canvas
