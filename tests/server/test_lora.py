"""LoRA adapters and one picture: nobody takes KV, or a view, that was computed through other weights."""

from __future__ import annotations

import json
from array import array
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.sampling.sampling_params import SamplingParams

from tests.server.conftest import OURS
from tgvkv_sglang.config import TgvConfig
from tgvkv_sglang.sglang_seam.requests import facts_of
from tgvkv_sglang.testing.images import make_image
from tgvkv_sglang.testing.prompts import about_images
from tgvkv_sglang.testing.server import launch

RANK = 4
IMAGE = make_image(3)
PROMPT = about_images("What is in the picture, and where?")


def make_adapter(directory: Path, model_dir: Path, seed: int) -> Path:
    """A PEFT adapter for the language model's attention outputs, strong enough to change answers."""
    text = json.loads((model_dir / "config.json").read_text())["text_config"]
    inner = text["num_attention_heads"] * text["head_dim"]
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(text["num_hidden_layers"]):
        name = f"base_model.model.model.language_model.layers.{layer}.self_attn.o_proj"
        weights[f"{name}.lora_A.weight"] = torch.randn(RANK, inner, generator=generator)
        weights[f"{name}.lora_B.weight"] = torch.randn(text["hidden_size"], RANK, generator=generator)
    directory.mkdir()
    save_file(weights, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 8, "target_modules": ["o_proj"], "bias": "none"}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="module")
def server(model_dir, tmp_path_factory):
    home = tmp_path_factory.mktemp("lora")
    paths = [f"{name}={make_adapter(home / name, model_dir, seed)}" for seed, name in enumerate(("one", "two"))]
    flags = ("--enable-lora", "--lora-paths", *paths, "--lora-backend", "torch_native", "--max-loras-per-batch", "3")
    with launch(model_dir, home / "server", *OURS, "--tgvkv-retention", "0.2", *flags) as live:
        yield live


def ask(server, adapter: str | None, rid: str):
    body = server.body(PROMPT, [IMAGE], 12, rid, trace=True) | {"lora_path": adapter}
    reply = server.post("/generate", body)
    reply.raise_for_status()
    return reply.json(), server.trace(rid)[0]["kept"]


def test_two_adapters_and_the_base_model_share_nothing_of_one_picture(server):
    """Each answers, and selects, after the others exactly as it does on an empty cache."""
    adapters = (None, "one", "two")
    fresh = []
    for i, adapter in enumerate(adapters):
        server.flush()
        fresh.append(ask(server, adapter, f"fresh-{i}"))
    answers = [reply["output_ids"] for reply, _ in fresh]
    assert answers[0] != answers[1] != answers[2] != answers[0], "the adapters change nothing: this shows nothing"
    server.flush()
    for i, adapter in enumerate(adapters):
        reply, kept = ask(server, adapter, f"after-{i}")
        assert reply["meta_info"]["cached_tokens"] == 0
        assert reply["output_ids"] == answers[i]
        assert np.array_equal(kept, fresh[i][1])
    for i, adapter in enumerate(adapters):  # and each finds its own again, views included
        body = server.body(PROMPT, [IMAGE], 12, f"again-{i}") | {"lora_path": adapter}
        again = server.post("/generate", body).json()
        assert again["meta_info"]["cached_tokens"] > 0 and again["output_ids"] == answers[i]


def request(lora_id: str | None, extra_key: str | None = None) -> Req:
    return Req("r", "", array("q", [1, 2]), SamplingParams(max_new_tokens=1), lora_id=lora_id, extra_key=extra_key)


def test_an_adapter_is_a_namespace_of_its_own():
    """SGLang writes the adapter's id behind the client's key, where a client could have written it too."""
    one, other, base, posing = request("one"), request("other"), request(None), request(None, "one")
    assert [one.extra_key, other.extra_key, base.extra_key, posing.extra_key] == ["one", "other", None, "one"]
    assert request("b", "a").extra_key == request(None, "ab").extra_key == request("ab").extra_key
    requests = (one, other, base, posing, request("b", "a"), request(None, "ab"), request("ab"))
    namespaces = [facts_of(req, TgvConfig()).namespace for req in requests]
    assert len(set(namespaces)) == len(namespaces)
    assert facts_of(request("one"), TgvConfig()).namespace == namespaces[0]
