"""Every multimodal architecture of the pinned SGLang, as a real configuration: served, or refused by name."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from sglang.srt.configs.model_config import multimodal_model_archs
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.models.llava import LlavaForConditionalGeneration
from sglang.srt.models.registry import ModelRegistry
from sglang.srt.models.transformers import TransformersBase
from sglang.srt.plugins import load_plugins
from sglang.srt.server_args import prepare_server_args
from transformers import AutoModel, CLIPVisionConfig

from tgvkv_sglang.errors import UnsupportedServerError
from tgvkv_sglang.sglang_seam.model_support import unsupported_layer
from tgvkv_sglang.sglang_seam.refusals import refuse_loaded
from tgvkv_sglang.sglang_seam.server_args import config_of

ROOT = Path(__file__).resolve().parents[2]
CPU = ["--device", "cpu", "--disable-cuda-graph", "--disable-fast-image-processor", "--skip-tokenizer-init"]

# By hand, from SGLang's model code: which attention layers each architecture builds.
WINDOW, LINEAR, CROSS, LATENT, SPARSE = "sliding-window", "linear-attention", "cross-attention", "MLA", "sparse"
REFUSED = {
    "CLIPModel": "embedding",
    "Cohere2VisionForConditionalGeneration": WINDOW,
    "DeepseekVL2ForCausalLM": LATENT,
    "DotsVLMForCausalLM": LATENT,
    "Gemma3ForConditionalGeneration": WINDOW,
    "Gemma3nForConditionalGeneration": WINDOW,
    "Gemma4ForConditionalGeneration": WINDOW,
    "Gemma4UnifiedForConditionalGeneration": WINDOW,
    "InklingForConditionalGeneration": WINDOW,
    "InternS2PreviewForConditionalGeneration": LINEAR,
    "InternVLChatModel (GPT-OSS)": WINDOW,
    "JetVLMForConditionalGeneration": LINEAR,
    "KimiK25ForConditionalGeneration": LATENT,
    "KimiK3ForConditionalGeneration": LATENT,
    "KimiVLForConditionalGeneration": LATENT,
    "Lfm2VlForConditionalGeneration": LINEAR,
    "Llama4ForConditionalGeneration": WINDOW,
    "MiMoV2ForCausalLM": WINDOW,
    "MiniCPMV4_6ForConditionalGeneration": LINEAR,
    "MiniMaxM3SparseForConditionalGeneration": SPARSE,
    "MllamaForConditionalGeneration": CROSS,
    "MossVLForConditionalGeneration": CROSS,
    "NemotronH_Nano_Omni_Reasoning_V3": LINEAR,
    "NemotronH_Nano_VL_V2": LINEAR,
    "PixtralForConditionalGeneration (with kv_lora_rank)": LATENT,
    "Qwen3_5ForConditionalGeneration": LINEAR,
    "Qwen3_5MoeForConditionalGeneration": LINEAR,
    "Step3p7ForConditionalGeneration": WINDOW,
    "UnlimitedOCRForCausalLM": WINDOW,
    "WhisperForConditionalGeneration": CROSS,
}
# Registered besides the listed architectures, and no model of their own: drafts, a vision tower, whatever
# transformers brings (judged by its layers), another name of MiMoV2ForCausalLM.
NO_CASE = {"GlmOcrForConditionalGenerationNextN", "MiMoV2MTP", "MiMoV2FlashForCausalLM", "PixtralVisionModel"}


def _generator():
    spec = importlib.util.spec_from_file_location("make_support", ROOT / "docs" / "make_support.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


models = _generator()
CASES = [case for case in models.CASES if case.kind is not None]


@pytest.fixture(scope="module", autouse=True)
def plugins():
    load_plugins()


def start(directory: Path, *flags: str):
    return prepare_server_args(["--model-path", str(directory), *CPU, "--enable-multimodal", *flags])


def test_every_multimodal_architecture_of_sglang_has_a_case():
    cases = {case.architecture for case in models.CASES}
    assert set(multimodal_model_archs) <= cases
    other = {name for name, cls in ModelRegistry.models.items() if hasattr(cls, "pad_input_ids")} - cases
    assert {name for name in other if not name.startswith("TransformersMultiModal")} == NO_CASE
    missing = {case.architecture for case in models.CASES if case.kind is None}
    backend = {case.architecture for case in models.CASES if case.backend}
    assert missing == cases - backend - set(ModelRegistry.models) == {"Grok1AForCausalLM", "Grok1VForCausalLM"}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_model_is_served_or_refused_by_name(case, tmp_path):
    """On the way a user goes: real ServerArgs on a real config.json, before any weight is read."""
    models.write_config(case, tmp_path)
    if case.name not in REFUSED:
        args = start(tmp_path, "--attention-backend", "tgvkv")
        assert config_of(args) is not None and args.attention_backend == "tgvkv"
        return
    with pytest.raises(UnsupportedServerError) as refusal:
        start(tmp_path, "--attention-backend", "tgvkv")
    said = str(refusal.value)
    assert said.startswith(f"tgvkv: {case.architecture} ") and REFUSED[case.name] in said
    assert said.endswith("serve this model without --attention-backend tgvkv.") and "\n" not in said


def test_the_hand_made_list_names_cases():
    assert set(REFUSED) <= {case.name for case in CASES}


def case_of(architecture: str):
    return next(case for case in CASES if case.architecture == architecture)


def test_flags_of_sglang_do_not_hide_windows(tmp_path):
    models.write_config(case_of("Llama4ForConditionalGeneration"), tmp_path)
    with pytest.raises(UnsupportedServerError, match=WINDOW):
        start(tmp_path, "--attention-backend", "tgvkv", "--disable-hybrid-swa-memory")


def test_an_embedding_server_is_refused(tmp_path):
    models.write_config(case_of("Qwen3VLForConditionalGeneration"), tmp_path)
    with pytest.raises(UnsupportedServerError, match="embedding"):
        start(tmp_path, "--attention-backend", "tgvkv", "--is-embedding")


def test_other_backends_serve_what_they_like(tmp_path):
    models.write_config(case_of("Gemma3ForConditionalGeneration"), tmp_path)
    args = start(tmp_path, "--attention-backend", "torch_native")
    assert config_of(args) is None


def layers(**odd) -> torch.nn.Module:
    """A model whose second attention layer differs."""
    plain = RadixAttention(2, 8, 1.0, 2, 0)
    return torch.nn.ModuleDict({"a": plain, "b": torch.nn.ModuleList([RadixAttention(2, 8, 1.0, 2, 1, **odd)])})


@pytest.mark.parametrize(
    "odd, words",
    [
        ({"is_cross_attention": True}, "cross-attention in layer 1"),
        ({"sliding_window_size": 128}, "a sliding window of 128 in layer 1"),
        ({"attn_type": AttentionType.DECODER_BIDIRECTIONAL}, "decoder_bidirectional attention in layer 1"),
        ({"attn_type": AttentionType.ENCODER_ONLY}, "encoder_only attention in layer 1"),
        ({"logit_cap": 30.0}, "soft-capped at 30.0 in layer 1"),
        ({"pos_encoding_mode": "ALIBI"}, "ALIBI"),
    ],
)
def test_a_loaded_model_is_judged_by_its_layers(odd, words):
    assert unsupported_layer(layers()) is None
    assert words in unsupported_layer(layers(**odd))


class Runner:
    """What SGLang's ModelRunner has once the weights are loaded."""

    def __init__(self, directory: Path, model: torch.nn.Module, kv: torch.dtype, device: str = "cpu"):
        self.model_config, self.model = models.model_config(directory), model
        self.dtype, self.kv_cache_dtype, self.device = torch.bfloat16, kv, device


def test_what_only_the_weights_tell_is_refused_too(tmp_path):
    models.write_config(case_of("Qwen3VLForConditionalGeneration"), tmp_path)
    refuse_loaded(Runner(tmp_path, layers(), torch.bfloat16))
    with pytest.raises(UnsupportedServerError, match="^tgvkv: Qwen3VLForConditionalGeneration has cross-attention"):
        refuse_loaded(Runner(tmp_path, layers(is_cross_attention=True), torch.bfloat16))
    with pytest.raises(UnsupportedServerError, match="float16.*--kv-cache-dtype bfloat16"):
        refuse_loaded(Runner(tmp_path, layers(), torch.float16))


def test_quantised_kv_is_served_where_its_kernels_compile(tmp_path, monkeypatch):
    models.write_config(case_of("Qwen3VLForConditionalGeneration"), tmp_path)
    e4m3, e5m2 = torch.float8_e4m3fn, torch.float8_e5m2
    refuse_loaded(Runner(tmp_path, layers(), e4m3))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    refuse_loaded(Runner(tmp_path, layers(), e5m2, "cuda"))
    with pytest.raises(UnsupportedServerError, match="8.9 or later, this one has 8.0: use --kv-cache-dtype fp8_e5m2"):
        refuse_loaded(Runner(tmp_path, layers(), e4m3, "cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    refuse_loaded(Runner(tmp_path, layers(), e4m3, "cuda"))


def test_factors_of_kv_are_those_that_flashinfer_is_told():
    from tgvkv_sglang.sglang_seam.flashinfer_backend import kv_factors

    model = layers()
    first, second = model["a"], model["b"][0]
    assert kv_factors(model) == [(1.0, 1.0), (1.0, 1.0)]
    first.k_scale_float, first.v_scale_float, second.v_scale_float = 0.5, 2.0, 3.0
    assert kv_factors(model) == kv_factors(torch.nn.ModuleList([second, first])) == [(0.5, 2.0), (1.0, 3.0)]


def test_sglang_takes_the_clip_tower_of_llava_for_a_language_model():
    """Why LLaVA-1.5 is given the transformers class; when this fails, SGLang's own may do."""
    llava = LlavaForConditionalGeneration.__new__(LlavaForConditionalGeneration)
    tower = llava._get_sgl_model_cls(CLIPVisionConfig(), AutoModel)
    assert tower.__module__ == "sglang.srt.models.transformers" and issubclass(tower, TransformersBase)


def test_the_page_of_models_is_current():
    data = models.table()
    assert models.DATA.read_text() == models.written(data), "run: python docs/make_support.py"
    assert models.PAGE.read_text() == models.page(data), "run: python docs/make_support.py"
