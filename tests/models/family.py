"""What a family of models is, to the checks: how a tiny checkpoint of it is written, and where its vision tokens are.

A checkpoint has the configuration, tokenizer and processor of its architecture, made with transformers' own classes,
and mostly no weights: the server draws them (:mod:`tests.fakes.observed`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Sequence

import numpy as np
from PIL import Image

from tgvkv_sglang.demo.checkpoint import byte_tokenizer, greedy, new_directory
from tgvkv_sglang.testing.prompts import turn

LAYERS = 3
TEXT = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
    "dtype": "float32",
}
"""The language model of every family, where its class knows the field."""

Layout = Callable[[Path, str, Sequence[Image.Image]], np.ndarray]


def runs_of(mask: np.ndarray) -> list[tuple[int, int]]:
    """First and end (exclusive) of each run of True in ``mask`` bool [n]."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(int), [0]])))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


@dataclass(frozen=True)
class Family:
    """One family of models.

    Attributes:
        name: as its makers write it. architecture: the class that SGLang serves it with.
        write: writes configuration and processor files into a directory where the tokenizer is already.
        image: what stands for an image in a prompt.
        special: special tokens beside the shared ones. named: those that the processor asks for by name.
        layout: which tokens of a prompt are vision, bool [n], found out without SGLang and without us.
        sizes: widths and heights of the pictures that the checks show.
        small: of a picture of few tokens, where the number depends on its size.
        flags: further flags of every server.
        item_a_picture: each picture is hashed by itself; else all of a prompt together, so that its KV is found
            again only where the other pictures are the same.
        weights: the checkpoint has weights; then retention 1.0 is compared with plain transformers instead of stock.
        note: what a reader of the table must know.
    """

    name: str
    architecture: str
    write: Callable[[Path, Any], None]
    image: str = "<|vision_start|><|image_pad|><|vision_end|>"
    special: tuple[str, ...] = ()
    layout: Layout = field(default=None)
    named: dict[str, str] = field(default_factory=dict)
    sizes: tuple[tuple[int, int], ...] = ((224, 168), (168, 168))
    small: tuple[int, int] | None = None
    flags: tuple[str, ...] = ()
    item_a_picture: bool = True
    weights: bool = False
    note: str = ""

    @property
    def key(self) -> str:
        return self.name.lower().replace(" ", "-").replace(".", "_").replace("/", "-")

    def make(self, directory: Path) -> Path:
        """Write the checkpoint; returns its directory."""
        tokenizer = byte_tokenizer(special=self.special, named=self.named)
        with new_directory(directory) as staging:
            tokenizer.save_pretrained(staging)
            greedy(tokenizer).save_pretrained(staging)
            self.write(staging, tokenizer)
        return Path(directory).resolve()

    def prompt(self, *turns: str) -> str:
        """User and assistant texts alternating, the user first; ``{}`` stands for an image."""
        roles = ("user", "assistant")
        said = "".join(turn(roles[i % 2], text.replace("{}", self.image)) for i, text in enumerate(turns))
        return said + "<|im_start|>assistant\n"


def vocabulary(tokenizer: Any) -> int:
    """Rows of the embedding: the tokenizer's ids, up to a multiple of 64."""
    return -(-len(tokenizer) // 64) * 64


def text_config(tokenizer: Any, **more: Any) -> dict[str, Any]:
    special = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return {**TEXT, **special, "vocab_size": vocabulary(tokenizer), **more}


def by_processor(image_token: str) -> Layout:
    """The layout that the family's own transformers processor gives a prompt."""

    def layout(directory: Path, text: str, images: Sequence[Image.Image]) -> np.ndarray:
        from transformers import AutoProcessor

        processor = AutoProcessor.from_pretrained(directory, local_files_only=True)
        ids = processor(text=[text], images=list(images) or None, return_tensors="np")["input_ids"][0]
        return np.asarray(ids) == processor.tokenizer.convert_tokens_to_ids(image_token)

    return layout
