"""Held-out probes of the demo model: fixed by seed, generated on the fly, scored per class and per token.

A probe is a chat whose last question is scored; earlier turns carry their true answers. The *floor* of a class is its
score when decode sees no vision token at all (prefill sees every one): what a view of 0 % would still answer.
"""

from __future__ import annotations

import base64
import io
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from tgvkv_sglang.demo import questions as Q
from tgvkv_sglang.demo.scenes import DEFAULT_SIZE, Scene, make_scene, render

PROBE_SEED = 20_260_117
PER_CLASS = 200
CLASSES = (*Q.CLASSES, "second_turn", "two_images")
_SCENE_SEEDS = 1_000_000_000  # probes' scenes are drawn from generators no training run seeds


@dataclass(frozen=True)
class Probe:
    """``scenes`` (one or two pictures, shown in the first turn) and the chat's ``turns``; the last turn is scored."""

    cls: str
    scenes: tuple[Scene, ...]
    turns: tuple[Q.Question, ...]

    @property
    def question(self) -> Q.Question:
        return self.turns[-1]


def _scene(rng: random.Random, size: tuple[int, int]) -> Scene:
    return make_scene(_SCENE_SEEDS + rng.randrange(_SCENE_SEEDS), size)


def probes(
    per_class: int = PER_CLASS,
    seed: int = PROBE_SEED,
    classes: Iterable[str] = CLASSES,
    size: tuple[int, int] = DEFAULT_SIZE,
) -> Iterator[Probe]:
    """``per_class`` probes of every class in ``classes``; the same arguments give the same probes.

    "second_turn": two different multi-token questions about one picture. "two_images": one question about one of two.
    Raises ``ValueError`` for an unknown class.
    """
    for cls in classes:
        if cls not in CLASSES:
            raise ValueError(f"unknown probe class {cls!r}: must be one of {CLASSES}")
        rng = random.Random(f"{seed}/{cls}")
        for _ in range(per_class):
            if cls == "two_images":
                pair = _scene(rng, size), _scene(rng, size)
                yield Probe(cls, pair, (Q.compare(*pair, rng),))
            elif cls == "second_turn":
                scene = _scene(rng, size)
                yield Probe(cls, (scene,), tuple(Q.questions(scene, rng, 2, ("at", "numbers", "row", "colorlist"))))
            else:
                scene = _scene(rng, size)
                yield Probe(cls, (scene,), (Q.ask(scene, rng, cls),))


def chat(
    seed: int, turns: int = 6, size: tuple[int, int] = DEFAULT_SIZE, classes: tuple[str, ...] = Q.CLASSES
) -> Probe:
    """A chat of ``turns`` different questions about one picture (score any turn by cutting ``turns`` behind it)."""
    rng = random.Random(f"chat/{seed}")
    scene = _scene(rng, size)
    return Probe("chat", (scene,), tuple(Q.questions(scene, rng, turns, classes)))


def chat_messages(
    probe: Probe, answers: Iterable[str] | None = None, image_parts: list[dict] | None = None
) -> list[dict]:
    """OpenAI chat messages up to the probe's last question.

    ``answers``: what the assistant said in the earlier turns (default: the true answers). ``image_parts``: content
    parts to stand for the pictures (default: ``image_url`` parts with PNG data URLs).
    """
    said = list(answers) if answers is not None else [q.answer for q in probe.turns[:-1]]
    if len(said) != len(probe.turns) - 1:
        raise ValueError(f"{len(said)} answers for {len(probe.turns) - 1} earlier turns: give one for each")
    parts = image_parts if image_parts is not None else [image_part(s) for s in probe.scenes]
    messages: list[dict] = []
    for n, question in enumerate(probe.turns):
        content = [*(parts if n == 0 else []), {"type": "text", "text": question.text}]
        messages.append({"role": "user", "content": content})
        if n < len(said):
            messages.append({"role": "assistant", "content": said[n]})
    return messages


def image_part(scene: Scene) -> dict:
    """``image_url`` content part with the scene's picture as a PNG data URL."""
    buffer = io.BytesIO()
    render(scene).save(buffer, format="PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url}}


@dataclass
class Tally:
    """Scores of one class: whole answers and words of answers (a missing or a surplus word is a wrong one)."""

    n: int = 0
    exact: int = 0
    words: int = 0
    words_right: int = 0

    def add(self, question: Q.Question, said: str) -> bool:
        wanted, got = question.answer_words, said.split()
        self.n += 1
        self.words += max(len(wanted), len(got))
        self.words_right += sum(a == b for a, b in zip(wanted, got, strict=False))
        self.exact += got == wanted
        return got == wanted

    @property
    def exact_share(self) -> float:
        return self.exact / self.n if self.n else float("nan")

    @property
    def word_share(self) -> float:
        return self.words_right / self.words if self.words else float("nan")


def fit_to_measure(full: Tally, floor: Tally) -> bool:
    """False where decode without any vision still earns more than half of the class's score (per word)."""
    return floor.word_share <= full.word_share / 2
