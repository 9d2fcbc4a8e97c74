"""Which models are given transformers' class, and that stock servers are left alone. What it does is tested live."""

from __future__ import annotations

import pytest
from sglang.srt.configs.model_config import ModelConfig, ModelImpl

from tests.models.families import BY_NAME
from tests.seam.one_process import arguments
from tgvkv_sglang.config import TgvConfig
from tgvkv_sglang.sglang_seam.llava import build_kv_cache
from tgvkv_sglang.sglang_seam.model_support import ask_for_transformers


@pytest.mark.parametrize("name, flags, wanted", [("LLaVA-1.5", (), "transformers"), ("Pixtral (HF format)", (), "auto"),
                                                 ("LLaVA-1.5", ("--model-impl", "sglang"), "sglang"),
                                                 ("Qwen3-VL", (), "auto")])  # fmt: skip
def test_a_clip_tower_asks_for_the_transformers_class(tmp_path, name, flags, wanted):
    args = arguments(BY_NAME[name].make(tmp_path / "model"), *flags)
    config = ModelConfig.from_server_args(args)
    ask_for_transformers(args, config)
    assert (args.model_impl, config.model_impl) == (wanted, ModelImpl(wanted))


@pytest.mark.parametrize("ours", (True, False))
def test_radix_cache_stays_on_for_our_servers_alone(tmp_path, ours):
    """SGLang asks ``_resolved_model_impl``; without our backend its answer is not touched."""
    args = arguments(BY_NAME["LLaVA-NeXT"].make(tmp_path / "model"))
    object.__setattr__(args, "_tgvkv", TgvConfig() if ours else None)
    config = ModelConfig.from_server_args(args)
    config._resolved_model_impl = ModelImpl.TRANSFORMERS
    build_kv_cache(lambda **_: None, server_args=args, model_config=config)
    assert config._resolved_model_impl == (ModelImpl.SGLANG if ours else ModelImpl.TRANSFORMERS)
