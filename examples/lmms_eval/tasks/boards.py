"""The task ``tgvkv_boards``: one document is one turn of one rotation of a board's questions.

Every question is asked after the *true* answers to those before it, so that a turn's score tells of that turn alone.
"""

from __future__ import annotations

from typing import Any

from PIL import Image

from tgvkv_sglang.demo.scenes import make_scene, render

Document = dict[str, Any]
"""``seed`` of the scene, ``questions`` and ``answers`` up to and with the one that is asked, ``rotation`` of the
board's questions from 0, ``turn`` from 1."""


def rotations(board: dict[str, Any]) -> list[Document]:
    """The documents of a line of boards.jsonl (``seed``, ``questions``, ``answers``), chat by chat, turn by turn."""
    documents = []
    count = len(board["questions"])
    for rotation in range(count):
        order = [(rotation + i) % count for i in range(count)]
        for turn in range(1, count + 1):
            asked = {name: [board[name][i] for i in order[:turn]] for name in ("questions", "answers")}
            documents.append({"seed": board["seed"], **asked, "rotation": rotation, "turn": turn})
    return documents


def every_turn(boards):
    """The data set of all documents from that of all boards (both ``datasets.Dataset``)."""
    from datasets import Dataset

    return Dataset.from_list([document for board in boards for document in rotations(board)])


def pictures(doc: Document) -> list[Image.Image]:
    return [render(make_scene(doc["seed"]))]


def question(doc: Document) -> str:
    return doc["questions"][-1]


def answer(doc: Document) -> str:
    return doc["answers"][-1]


def messages(doc: Document) -> list[dict[str, Any]]:
    """The chat up to the question, with the picture in its first turn, in lmms-eval's form."""
    chat = []
    for asked, said in zip(doc["questions"], doc["answers"], strict=True):
        chat.append({"role": "user", "content": [{"type": "text", "text": asked}]})
        chat.append({"role": "assistant", "content": [{"type": "text", "text": said}]})
    chat[0]["content"].insert(0, {"type": "image", "url": pictures(doc)[0]})
    return chat[:-1]  # the last answer is the server's to give


def score(doc: Document, results: list[str]) -> dict[str, float]:
    """1 for an answer that is right word for word, else 0: over all turns, and of its turn."""
    right = float(results[0].split() == answer(doc).split())
    return {"exact": right, f"turn_{doc['turn']}": right}
