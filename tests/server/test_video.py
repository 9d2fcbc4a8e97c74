"""A video in a live server: decoded by `decord2`'s wheel, a span for each pair of frames, selected from and kept.

SGLang pins the frames it decoded, which needs CUDA: here in name only (:mod:`tests.fakes.observed`).
"""

from __future__ import annotations

import asyncio
import base64
from pathlib import Path
from typing import Iterator
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from tests.models import checks
from tests.models.families import BY_NAME
from tests.models.family import runs_of
from tests.models.serving import OURS, served
from tests.models.zygote import zygote
from tgvkv_sglang.testing.server import Answer

CLIP = Path(__file__).resolve().parents[1] / "data" / "clip.mp4"
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
FRAMES, ROUNDED = 8, 2
"""SGLang looks twice a second, for four seconds; two frames are one token deep."""


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Iterator[checks.Bench]:
    family, directory = BY_NAME["Qwen3-VL"], tmp_path_factory.mktemp("video")
    with zygote() as forked, served(
        forked, family, family.make(directory / "model"), directory / "ours", *OURS, tokens=3000
    ) as bench:
        yield bench


@pytest.fixture(scope="module")
def frames() -> tuple[torch.Tensor, dict]:
    """What SGLang shows the family's processor of the clip, ``[FRAMES, 3, height, width]``, and when it was seen."""
    from sglang.srt.multimodal.processors.qwen_vl import preprocess_video
    from sglang.srt.utils.video_decoder import VideoDecoderWrapper

    with mock.patch.object(torch.Tensor, "pin_memory", lambda tensor, *_: tensor):
        return asyncio.run(preprocess_video(VideoDecoderWrapper(str(CLIP)), image_factor=32))


def layout(bench: checks.Bench, text: str, frames: tuple[torch.Tensor, dict], images: list[Image.Image]) -> np.ndarray:
    """Vision tokens of a prompt with the clip by transformers' own processor, bool [n]."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(bench.model, local_files_only=True)
    made = processor(
        text=[text], images=images or None, videos=[frames[0]], video_metadata=[frames[1]], do_sample_frames=False,
        return_tensors="np",
    )  # fmt: skip
    vision = [processor.tokenizer.convert_tokens_to_ids(name) for name in ("<|image_pad|>", "<|video_pad|>")]
    return np.isin(made["input_ids"][0], vision)


def ask(bench: checks.Bench, rid: str, text: str, images: list[Image.Image]) -> Answer:
    clip = f"data:video/mp4;base64,{base64.b64encode(CLIP.read_bytes()).decode()}"
    return bench.ask(rid, text, images, fields={"video_data": [clip]})


def test_a_video_is_selected_from_and_asked_about_again(bench, frames):
    """Each question selects from all frames; the second takes the video from the cache."""
    texts = [bench.family.prompt(VIDEO + "What moves?"),
             bench.family.prompt(VIDEO + "What moves?", "A square.", "Which way does it go?")]  # fmt: skip
    turn, kept = None, []
    bench.server.flush()
    for i, text in enumerate(texts):
        answer = ask(bench, f"video-{i}", text, [])
        vision = layout(bench, text, frames, [])
        assert len(runs_of(vision)) == FRAMES / ROUNDED
        turn = bench.recorded(f"video-{i}", answer, vision, turn)
        kept.append(checks.assert_selected(bench, f"video-{i}", turn))
        assert turn.assert_attention(None, kept[-1]) == checks.TOKENS - 1
    assert answer.cached >= int(np.flatnonzero(vision)[-1]) and (kept[0] != kept[1]).any()


def test_a_video_beside_an_image(bench, frames):
    """Both are seen by one question, which shares one budget among them."""
    images = checks.pictures(bench.family, 1, seed=30)
    text = bench.family.prompt("First " + VIDEO + " then {} and what is in both?")
    bench.server.flush()
    answer = ask(bench, "beside", text, images)
    vision = layout(bench, text, frames, images)
    turn = bench.recorded("beside", answer, vision)
    kept = checks.assert_selected(bench, "beside", turn)
    assert len(runs_of(vision)) == FRAMES / ROUNDED + 1 and turn.assert_attention(None, kept) == checks.TOKENS - 1
