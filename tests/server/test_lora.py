"""LoRA adapters share no KV and no view of a picture: each is a namespace of the radix tree, and selects for itself.

The live server's memory is pinned in name only (:mod:`tests.fakes.unpinned`): that is all of LoRA that needs CUDA.
"""

from __future__ import annotations

import json
from array import array
from pathlib import Path
from typing import Iterator

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.sampling.sampling_params import SamplingParams

from tests.fakes import plugin_env
from tests.oracle.oracle import Oracle, load
from tests.server.compare import assert_selection, assert_tokens, ids_of
from tests.server.conftest import EAGER
from tgvkv_sglang.config import TgvConfig
from tgvkv_sglang.sglang_seam.requests import facts_of
from tgvkv_sglang.testing.images import make_image
from tgvkv_sglang.testing.prompts import about_images, chat
from tgvkv_sglang.testing.server import Answer, Server, launch

RANK, ALPHA = 4, 8
MODULES = ("q_proj", "v_proj", "o_proj")
NAMES = (None, "first", "second")
RETENTION = 0.2


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


# -- a live server -----------------------------------------------------------------------------------------------------


def merge(oracle: Oracle, seed: int) -> dict[str, torch.Tensor]:
    """Draw an adapter and add it to the oracle's weights; returns its tensors, named as PEFT names them."""
    generator, adapter = torch.Generator().manual_seed(seed), {}
    for name, parameter in oracle.model.named_parameters():
        module = name.removesuffix(".weight")
        if "language_model" not in name or not module.endswith(MODULES):
            continue
        rows, columns = parameter.shape
        a = torch.randn(RANK, columns, generator=generator) / columns**0.5
        b = torch.randn(rows, RANK, generator=generator) * 0.3
        parameter.data += (ALPHA / RANK * b @ a).to(parameter.dtype)
        adapter |= {f"base_model.model.{module}.lora_A.weight": a, f"base_model.model.{module}.lora_B.weight": b}
    return adapter


@pytest.fixture(scope="module")
def oracles(model_dir) -> dict[str | None, Oracle]:
    return {name: load(model_dir, image_backend="pil") for name in NAMES}


@pytest.fixture(scope="module")
def adapters(oracles, tmp_path_factory) -> list[str]:
    """Directories of the adapters, as ``--lora-paths`` takes them."""
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": list(MODULES), "bias": "none"}
    paths = []
    for seed, name in enumerate(NAMES[1:]):
        directory: Path = tmp_path_factory.mktemp(name)
        save_file(merge(oracles[name], seed), directory / "adapter_model.safetensors")
        (directory / "adapter_config.json").write_text(json.dumps(config))
        paths.append(f"{name}={directory}")
    return paths


@pytest.fixture(scope="module")
def adapted(model_dir, adapters, tmp_path_factory) -> Iterator[Server]:
    flags = (*EAGER, "--enable-lora", "--lora-backend", "torch_native", "--lora-paths", *adapters)
    with launch(model_dir, tmp_path_factory.mktemp("lora"), *flags, env=plugin_env("unpinned")) as server:
        yield server


def ask(server: Server, adapter: str | None, text: str, image, rid: str | None = None) -> Answer:
    asked = {"rid": rid, "trace": rid is not None, "retention": RETENTION, "logprobs": True}
    return server.generate(text, [image], **asked, fields={"lora_path": adapter})


def test_two_adapters_and_the_base_answer_about_one_picture_each_for_itself(adapted, oracles):
    """Nobody finds another's text or picture in the cache; each selects, and goes on, as its own merged model does."""
    image, first = make_image(760, 192, 160), chat(about_images("What stands left?"))
    second = first + "Well.<|im_end|>\n<|im_start|>user\nAnd right?<|im_end|>\n<|im_start|>assistant\n"
    turns, kept = {}, {}
    for name in NAMES:
        oracle = oracles[name]
        answer = ask(adapted, name, first, image, rid=f"lora-{name}")
        turns[name] = oracle.greedy(oracle.prepare_ids(ids_of(oracle, first), [image]), 16, retention=RETENTION)
        assert answer.cached == 0
        kept[name] = assert_selection(adapted, f"lora-{name}", turns[name].selection)["kept"]
        assert assert_tokens(answer, turns[name]) >= 4
    for name in NAMES:
        oracle, answer = oracles[name], ask(adapted, name, second, image)
        prompt = oracle.prepare_ids(ids_of(oracle, second), [image])
        going_on = oracle.continue_(turns[name].state, prompt, 16, view="kept", retention=RETENTION,
                                    cached_len=answer.cached)  # fmt: skip
        assert answer.cached >= len(ids_of(oracle, first))
        assert assert_tokens(answer, going_on) >= 4
    assert all((kept[a] != kept[b]).any() for a, b in ((None, "first"), (None, "second"), ("first", "second")))
    said = [turns[name].logprobs for name in NAMES]
    assert min(np.abs(np.subtract(a, b)).max() for a, b in ((said[0], said[1]), (said[1], said[2]))) > 0.01
