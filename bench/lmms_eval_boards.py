"""Writes the boards of lmms-eval's task ``tgvkv_boards`` (examples/lmms_eval): held-out ones.

    python -m bench.lmms_eval_boards        # in the repository's root
"""

from __future__ import annotations

import json
from pathlib import Path

from training.demo_model import probes

FILE = Path(__file__).resolve().parents[1] / "examples" / "lmms_eval" / "tasks" / "boards.jsonl"
BOARDS = 40
CLASSES = ("numbers", "row", "colorlist")
"""Answers of several words each, which need the picture's KV while they are decoded (the model card's "fit to
measure"); one of each class a board."""


def board(seed: int) -> dict:
    """One line of the file: the scene's seed, its questions and their true answers."""
    chat = probes.chat(seed, turns=len(CLASSES), classes=CLASSES)
    turns = chat.turns
    return {"seed": chat.scenes[0].seed, "questions": [q.text for q in turns], "answers": [q.answer for q in turns]}


def text() -> str:
    return "".join(json.dumps(board(seed)) + "\n" for seed in range(BOARDS))


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
    print(f"{FILE}: {BOARDS} boards")
