"""Prompts for live-server tests, as text with Qwen's image markers (tokenised by the server itself)."""

from __future__ import annotations

from typing import Sequence

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


def turn(role: str, text: str) -> str:
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


def chat(*turns: str) -> str:
    """User and assistant texts alternating, the user first, ready for the assistant's answer."""
    roles = ["user", "assistant"]
    return "".join(turn(roles[i % 2], text) for i, text in enumerate(turns)) + "<|im_start|>assistant\n"


def about_images(question: str, images: int = 1) -> str:
    return IMAGE * images + question


def interleaved(parts: Sequence[str]) -> str:
    """Texts with one image between each two."""
    return IMAGE.join(parts)
