"""Spans of what SGLang's own processors make of a prompt, for every family, and of unusual prompts. No server."""

from __future__ import annotations

import asyncio
from array import array
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Iterator, Sequence

import numpy as np
import pytest
import torch
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.managers.multimodal_processor import get_mm_processor, import_processors
from sglang.srt.managers.schedule_batch import MultimodalInputs, MultimodalProcessorOutput, Req
from sglang.srt.runtime_context import publish, reset_context
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.utils.hf_transformers_utils import get_processor

from tests.models.checks import pictures
from tests.models.families import BY_NAME
from tests.models.family import Family, runs_of
from tests.models.omni import AUDIO
from tests.seam.one_process import arguments
from tgvkv_sglang.config import TgvConfig
from tgvkv_sglang.selection.tgv import text_after_vision
from tgvkv_sglang.sglang_seam.model_support import ask_for_transformers
from tgvkv_sglang.sglang_seam.requests import facts_of
from tgvkv_sglang.spans import with_text
from tgvkv_sglang.testing.images import data_url, make_image
from tgvkv_sglang.types import Span, SpanKind


@dataclass
class Prepared:
    """A request as the scheduler holds it: its spans, its multimodal inputs, and its ids with SGLang's pad ids."""

    spans: list[Span]
    inputs: MultimodalInputs
    ids: np.ndarray
    symbols: list[int]

    @property
    def runs(self) -> list[tuple[int, int]]:
        return [(span.start, span.end) for span in self.spans]


@dataclass
class Processor:
    family: Family
    model: Path
    processor: Any

    def prepare(self, text: str, images: Sequence[Any], **data: Any) -> Prepared:
        urls = [image if isinstance(image, dict) else data_url(image) for image in images]
        request = SimpleNamespace(**{"video_data": None, "audio_data": None, "modalities": None, **data})
        made = self.processor.process_mm_data_async(
            image_data=urls or None, audio_data=request.audio_data, input_text=text, request_obj=request,
            max_req_input_len=4096,
        )  # fmt: skip
        out = asyncio.run(made)
        inputs = MultimodalInputs.from_processor_output(out)
        ids = MultimodalProcessorOutput.build_padded_input_ids(out.input_ids, inputs.mm_items)
        req = Req("r", "", array("q", ids), SamplingParams(), vocab_size=1000)
        req.multimodal_inputs = inputs
        facts = facts_of(req, TgvConfig(retention=0.1))
        symbols = [run.symbol for run in facts.pictures]
        return Prepared(list(facts.state.vision) if facts.state else [], inputs, np.array(ids), symbols)


@pytest.fixture(scope="module", autouse=True)
def processors():
    import_processors("sglang.srt.multimodal.processors")


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """A family's processor by name, as SGLang makes it for a server of ours."""

    @cache
    def checkpoint(name: str) -> Path:
        return BY_NAME[name].make(tmp_path_factory.mktemp("models") / BY_NAME[name].key)

    @contextmanager
    def open_(name: str) -> Iterator[Processor]:
        family, model = BY_NAME[name], checkpoint(name)
        args = arguments(model, *family.flags)
        publish(args, role="test")
        try:
            config = ModelConfig.from_server_args(args)
            ask_for_transformers(args, config)
            inner = get_processor(args.tokenizer_path, use_fast=False, trust_remote_code=args.trust_remote_code)
            made = get_mm_processor(config.hf_config, args, inner, "default", model_config=config)
            yield Processor(family, model, made)
        finally:
            reset_context()

    return open_


@pytest.mark.parametrize("name", list(BY_NAME))
def test_spans_are_where_the_family_has_vision_tokens(opened, name):
    """Two pictures of different sizes with text around them."""
    with opened(name) as processor:
        family = processor.family
        text, images = family.prompt("First {} then {} and which is larger?"), pictures(family, 2)
        made = processor.prepare(text, images)
        assert made.runs == runs_of(family.layout(processor.model, text, images))
        kinds = [span.kind for span in with_text(made.spans, len(made.ids))]
        assert kinds[0] == kinds[-1] == SpanKind.TEXT and len(made.runs) >= 2


UNUSUAL = {
    "image after the question": ("What is it? {}", 1),
    "question between images": ("First {}Is it red? {}And this?", 2),
    "images side by side": ("{}{}{}Which?", 3),
    "thirty images": ("{} " * 30 + "How many?", 30),
}
TILED = ("Qwen3-VL", "InternVL3", "Mistral Small 3.x", "LLaVA-NeXT")


@pytest.mark.parametrize("name", TILED)
@pytest.mark.parametrize("shape", UNUSUAL)
def test_spans_of_unusual_prompts(opened, name, shape):
    with opened(name) as processor:
        family, (turn, count) = processor.family, UNUSUAL[shape]
        text, images = family.prompt(turn), pictures(family, count)
        made = processor.prepare(text, images)
        expected = runs_of(family.layout(processor.model, text, images))
        assert made.runs == expected
        # Where nothing at all stands between pictures, they are one span: LLaVA has no token before or after one.
        assert len(made.runs) >= (1 if shape == "images side by side" and name == "LLaVA-NeXT" else count)


def test_a_token_after_each_row_is_text(opened):
    """Pixtral's rows: six rows of eight patches are six spans, and the tokens between them are kept like any text."""
    with opened("Mistral Small 3.x") as processor:
        made = processor.prepare(processor.family.prompt("{}What?"), pictures(processor.family, 1))
        assert [len(span) for span in made.spans] == [8] * 6
        gaps = [b.start - a.end for a, b in pairwise(made.spans)]
        assert gaps == [1] * 5 and len(set(made.symbols)) == 1
        tokenizer = processor.processor.inner._tokenizer
        assert {tokenizer.decode(made.ids[span.end]) for span in made.spans[:-1]} == {"[IMG_BREAK]"}


def test_a_newline_embedding_a_row_is_vision(opened):
    """LLaVA-NeXT ends each row with a learned embedding at an image token: all of it is one span."""
    with opened("LLaVA-NeXT") as processor:
        made = processor.prepare(processor.family.prompt("{}What?"), pictures(processor.family, 1))
        assert len(made.spans) == 1
        base, tiles, rows = 4 * 4, 2 * 4 * 4, 4  # a picture of 224 x 112 in two tiles of 4 x 4 patches
        assert len(made.spans[0]) == base + tiles + rows


def test_an_image_that_ends_the_prompt_grounds_nothing(opened):
    """No text follows it, so nothing asks about it: it is not selected from, and decode reads all of it."""
    with opened("LLaVA-NeXT") as processor:
        made = processor.prepare("Describe it: <image>", pictures(processor.family, 1))
        assert made.spans[-1].end == len(made.ids)
        assert len(text_after_vision(made.spans, 0, len(made.ids), 4096)) == 0


def test_frames_of_a_video_are_spans_with_their_timestamps_between(opened):
    """Qwen3-VL writes a timestamp before each pair of frames; positions of spans are logical, M-RoPE's are not."""
    frames = np.stack([np.asarray(make_image(i, 96, 64)) for i in range(6)])
    with opened("Qwen3-VL") as processor:
        text = processor.family.prompt("<|vision_start|><|video_pad|><|vision_end|>What happens?")
        seen = {"fps": 2.0, "total_num_frames": 6, "frames_indices": list(range(6))}
        video = processor.processor._processor(
            text=[text], videos=[frames], video_metadata=[seen], do_sample_frames=False, return_tensors="pt"
        )
        ids = video.pop("input_ids")[0].tolist()
        made = processor.prepare(ids, [], video_data=[{"format": "processor_output", **video}])
        assert [len(span) for span in made.spans] == [6] * 3
        assert all(b.start > a.end for a, b in pairwise(made.spans))
        tokenizer = processor.processor._processor.tokenizer
        between = [tokenizer.decode(made.ids[a.end : b.start]) for a, b in pairwise(made.spans)]
        assert all("seconds>" in words for words in between)
        positions = made.inputs.mrope_positions
        assert positions.shape == (3, len(made.ids))
        assert int(positions.max()) + 1 < len(made.ids) and int(made.inputs.mrope_position_delta) < 0


def test_audio_is_text(opened):
    """Qwen3-Omni, a picture and a second of sound: the sound's tokens are no span, though they carry a pad id."""
    sound = np.sin(np.arange(16000) / 20).astype(np.float32)
    with opened("Qwen3-Omni") as processor:
        text = processor.family.prompt("{}" + AUDIO + "What is it, and what does it say?")
        made = processor.prepare(text, pictures(processor.family, 1), audio_data=[wav_url(sound)])
        assert len(made.spans) == 1 and len(made.spans[0]) == 48
        padded = runs_of(made.ids >= 1_000_000)
        assert len(padded) == 2 and padded[0] == made.runs[0]
        heard = Span(*padded[1], SpanKind.TEXT)
        assert any(s.kind == SpanKind.TEXT and s.start <= heard.start and heard.end <= s.end
                   for s in with_text(made.spans, len(made.ids)))  # fmt: skip


def wav_url(samples: np.ndarray) -> str:
    import base64
    import io

    import soundfile

    buffer = io.BytesIO()
    soundfile.write(buffer, samples, 16000, format="WAV")
    return "data:audio/wav;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def test_precomputed_embeddings_are_pictures(opened):
    """An engine's caller may bring a picture's embeddings: they are a span, and two of them are two pictures."""
    with opened("Qwen3-VL") as processor:
        text = processor.family.prompt("{}What?")
        first = processor.prepare(text, pictures(processor.family, 1))
        (item,) = first.inputs.mm_items
        ids = np.where(first.ids >= 1_000_000, processor.processor.mm_tokens.image_token_id, first.ids).tolist()
        made = []
        for seed in (0, 1):
            generator = torch.Generator().manual_seed(seed)
            embedding = {
                "format": "precomputed_embedding",
                "feature": torch.randn(len(first.spans[0]), 256, generator=generator),
                "image_grid_thw": item.image_grid_thw,
            }
            made.append(processor.prepare(ids, [embedding]))
        assert made[0].runs == made[1].runs == first.runs
        assert len({first.symbols[0], made[0].symbols[0], made[1].symbols[0]}) == 3
