"""Training batches: scenes with many question turns, tokens, positions and (if asked for) the pixels of kept tokens.

Token dropping happens before the tower: a sequence holds the tokens of all objects and a few empty ones, at their
absolute positions, so neither the tower nor the text layers ever see the other tokens of the picture.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, fields

import numpy as np
import torch

from tgvkv_sglang.demo import questions as Q
from tgvkv_sglang.demo import scenes as S

from .build import word_ids

PATCH = 16


@dataclass
class Batch:
    """One batch of right-padded sequences with N kept vision tokens in all.

    ``ids``/``labels`` [B, S]; ``positions`` [3, B, S]; ``vision`` [N, 2] (batch, place); ``targets`` [N, 5] word ids
    whose sum describes a token; ``image`` [N] image index in the batch, ``ordinal`` [N] in the chat; ``grids`` [N, 2]
    patches a side; ``patch_rc`` [N, 4, 2] patch coordinates; ``pixels`` [N, 4, 768] in [-1, 1] or None; ``classes`` and
    ``answers`` [B, S] question class and turn of the token to come (-1: none).
    """

    ids: torch.Tensor
    labels: torch.Tensor
    classes: np.ndarray
    answers: np.ndarray
    positions: torch.Tensor
    vision: torch.Tensor
    targets: torch.Tensor
    image: torch.Tensor
    ordinal: torch.Tensor
    grids: torch.Tensor
    patch_rc: torch.Tensor
    pixels: torch.Tensor | None
    looks: torch.Tensor  # [P, 3] (batch, query position, key position): where the evidence of the next token lies

    def to(self, device: str) -> Batch:
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, torch.Tensor):
                setattr(self, f.name, value.to(device))
        return self


@dataclass
class Recipe:
    """What to draw; edited through the control file while a run goes on."""

    classes: dict[str, float] = field(default_factory=lambda: dict.fromkeys(Q.CLASSES, 1.0))
    text_tokens: int = 170
    empties: tuple[int, int] = (6, 24)
    all_tokens: float = 0.0
    two_images: float = 0.0
    other_sizes: float = 0.4
    objects: tuple[int, int] = (5, 10)


class Encoder:
    """Text to ids with a cache (questions repeat)."""

    def __init__(self, tokenizer) -> None:
        self.tokenizer, self.words, self.cache = tokenizer, word_ids(tokenizer), {}
        (self.start, self.end, self.vision_start, self.vision_end, self.pad) = tokenizer.convert_tokens_to_ids(
            ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
        )
        self.user, self.assistant = tokenizer.convert_tokens_to_ids(["user", "assistant"])

    def __call__(self, text: str) -> list[int]:
        if text not in self.cache:
            self.cache[text] = self.tokenizer.encode(" " + text, add_special_tokens=False)
        return self.cache[text]


def token_words(scene: S.Scene, token: tuple[int, int], objects: dict) -> tuple[str, ...]:
    """The words a vision token is taught to be the sum of: its object's attributes (or nothing), its row and column."""
    o = objects.get(token)
    place = (
        S.ROWS[S.tile_of_token(scene.height, token[0])],
        S.COLUMNS[S.tile_of_token(scene.width, token[1])],
    )
    return (o.color, o.shape, str(o.digit), *place) if o else ("nothing", "nothing", "nothing", *place)


def kept_tokens(scene: S.Scene, rng: random.Random, recipe: Recipe, whole: bool) -> list[tuple[int, int]]:
    rows, columns = scene.token_grid
    if whole:
        return [(r, c) for r in range(rows) for c in range(columns)]
    kept = {(o.token_row, o.token_column) for o in scene.objects}
    for _ in range(rng.randint(*recipe.empties)):
        if rng.random() < 0.3:  # a neighbour of an object: the same tile, but empty
            o = rng.choice(scene.objects)
            r, c = o.token_row + rng.choice((-1, 0, 1)), o.token_column + rng.choice((-1, 0, 1))
            if 0 <= r < rows and 0 <= c < columns:
                kept.add((r, c))
        else:
            kept.add((rng.randrange(rows), rng.randrange(columns)))
    return sorted(kept)


def pixels_of(scene: S.Scene, tokens: list[tuple[int, int]]) -> np.ndarray:
    """[K, 4, 768] float32: the four patches of each token, channel first, as the processor normalises them."""
    picture = np.asarray(S.render(scene))
    rows, columns = scene.token_grid
    blocks = picture.reshape(rows, 2, PATCH, columns, 2, PATCH, 3).transpose(0, 3, 1, 4, 6, 2, 5)
    r, c = np.array(tokens).T
    return blocks[r, c].reshape(len(tokens), 4, 3 * PATCH * PATCH).astype(np.float32) / 127.5 - 1


class Sampler:
    """Draws batches; the stream depends only on ``seed`` and the recipes in force."""

    def __init__(self, tokenizer, seed: int, recipe: Recipe, with_pixels: bool) -> None:
        self.encode, self.rng = Encoder(tokenizer), random.Random(seed)
        self.recipe, self.with_pixels = recipe, with_pixels
        self.drawn = 0

    def scene(self) -> S.Scene:
        size = self.rng.choice(S.SIZES[1:]) if self.rng.random() < self.recipe.other_sizes else S.DEFAULT_SIZE
        self.drawn += 1
        return S.make_scene(self.drawn, size, self.rng.randint(*self.recipe.objects), rng=self.rng)

    def turns(self, scenes: list[S.Scene]) -> list[tuple[int, list[int], list[int], list]]:
        names, weights = zip(*self.recipe.classes.items(), strict=True)
        turns, seen, length = [], set(), 0
        for _ in range(60):
            if length >= self.recipe.text_tokens:
                break
            image = self.rng.randrange(len(scenes))
            question = Q.ask(scenes[image], self.rng, self.rng.choices(names, weights)[0])
            if len(scenes) > 1:
                question = Q.about_image(question, image)
            if question.text in seen:
                continue
            seen.add(question.text)
            asked = [*self.encode(question.text), self.encode.end, self.encode.start, self.encode.assistant]
            answered = [*self.encode(question.answer), self.encode.end]
            length += len(asked) + len(answered) + 2
            looks = [[(image, i) for i in word] for word in question.evidence]
            turns.append((Q.CLASSES.index(question.cls), asked, answered, looks))
        return turns

    def sequence(self, whole: bool = False) -> dict:
        e = self.encode
        scenes = [self.scene() for _ in range(2 if self.rng.random() < self.recipe.two_images else 1)]
        ids, positions, labels, classes, answers = [], [], [], [], []
        vision, targets, grids, patch_rc, pixels, images, looks, where = [], [], [], [], [], [], [], {}
        place = 0

        def text(tokens, cls=-1, answer=-1, loss=False):
            nonlocal place
            for t in tokens:
                ids.append(t)
                positions.append((place, place, place))
                labels.append(t if loss else -100)
                classes.append(cls)
                answers.append(answer)
                place += 1

        text([e.start, e.user])
        for k, scene in enumerate(scenes):
            text([e.words["image"], e.words[Q.IMAGE_NAMES[k]], e.vision_start])
            tokens = kept_tokens(scene, self.rng, self.recipe, whole)
            objects = {(o.token_row, o.token_column): o for o in scene.objects}
            gh, gw = scene.token_grid
            number = {(o.token_row, o.token_column): i for i, o in enumerate(scene.objects)}
            for r, c in tokens:
                where[k, number.get((r, c))] = len(ids)
                vision.append(len(ids))
                ids.append(e.pad)
                positions.append((place, place + r, place + c))
                labels.append(-100)
                classes.append(-1)
                answers.append(-1)
                targets.append([e.words[w] for w in token_words(scene, (r, c), objects)])
                grids.append((2 * gh, 2 * gw))
                patch_rc.append([(2 * r + i, 2 * c + j) for i in (0, 1) for j in (0, 1)])
                images.append(k)
            if self.with_pixels:
                pixels.append(pixels_of(scene, tokens))
            place += max(gh, gw)
            text([e.vision_end])
        for n, (cls, asked, answered, evidence) in enumerate(self.turns(scenes)):
            if n:
                text([e.start, e.user])
            text(asked)
            looks += [(len(ids) - 1 + j, where[o]) for j, word in enumerate(evidence) for o in word]
            text(answered, cls, n, loss=True)
        return {
            "ids": ids,
            "positions": positions,
            "labels": labels,
            "classes": classes,
            "answers": answers,
            "vision": vision,
            "targets": targets,
            "grids": grids,
            "patch_rc": patch_rc,
            "pixels": pixels,
            "images": images,
            "looks": looks,
        }

    def batch(self, size: int) -> Batch:
        whole = self.rng.random() < self.recipe.all_tokens  # whole pictures batch together: no padding to speak of
        rows = [self.sequence(whole) for _ in range(size)]
        longest = max(len(r["ids"]) for r in rows)

        def padded(key, fill):
            return np.array([r[key] + [fill] * (longest - len(r[key])) for r in rows])

        labels = padded("labels", -100)
        labels = np.concatenate([labels[:, 1:], np.full((size, 1), -100)], axis=1)  # what the next token must be
        images, count = [], 0
        for r in rows:
            images += [count + i for i in r["images"]]
            count += max(r["images"]) + 1
        shift = lambda a: np.concatenate([a[:, 1:], np.full((size, 1), -1)], axis=1)  # noqa: E731
        positions = np.array([r["positions"] + [(0, 0, 0)] * (longest - len(r["ids"])) for r in rows])
        pixels = None
        if self.with_pixels:
            pixels = torch.from_numpy(np.concatenate([p for r in rows for p in r["pixels"]]))
        return Batch(
            ids=torch.from_numpy(padded("ids", 0)),
            labels=torch.from_numpy(labels),
            classes=shift(padded("classes", -1)),
            answers=shift(padded("answers", -1)),
            positions=torch.from_numpy(positions).permute(2, 0, 1),
            vision=torch.tensor([(b, v) for b, r in enumerate(rows) for v in r["vision"]]),
            targets=torch.tensor([t for r in rows for t in r["targets"]]),
            image=torch.tensor(images),
            ordinal=torch.tensor([i for r in rows for i in r["images"]]),
            grids=torch.tensor([g for r in rows for g in r["grids"]]),
            patch_rc=torch.tensor([p for r in rows for p in r["patch_rc"]]),
            pixels=pixels,
            looks=torch.tensor([(b, q, k) for b, r in enumerate(rows) for q, k in r["looks"]]),
        )
