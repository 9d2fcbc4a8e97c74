"""Write docs/models.md: python docs/make_models.py

Builds a real ``ModelConfig`` of every multimodal architecture that the pinned SGLang lists, from a ``config.json`` with
the defaults of the model's own configuration class, and asks the plugin whether it would serve it. Downloads nothing.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PAGE = Path(__file__).with_name("models.md")
HEAD = """# Which models can be served

Written by `python docs/make_models.py`; do not edit.

Every multimodal architecture that SGLang {version} lists, and what tgvkv answers at start-up to a configuration of it.
*Accepted* means that attention is plain causal attention over K and V per head in every layer, **not that the model was
tried**: tests run a tiny Qwen3-VL. Refusals go by these same checks, and once the weights are loaded by the attention
layers themselves, so a model that is missing here is judged too. Text-only models take the stock path.

{counts}

| architecture | tgvkv | why | configuration |
|---|---|---|---|
"""
REMOTE = "the checkpoint's own class is remote code; this is "


@dataclass(frozen=True)
class Case:
    """One row: an architecture and the configuration it is judged by.

    ``kind`` is a model type known to transformers or SGLang, ``changes`` are laid over that class's defaults, ``extra``
    names a second model type whose fields go to the top level, ``note`` says what is not the checkpoint's own class.
    """

    architecture: str
    kind: str | None
    changes: dict[str, Any] = field(default_factory=dict)
    variant: str = ""
    note: str = ""
    extra: str = ""
    audio: bool = False

    @property
    def name(self) -> str:
        return f"{self.architecture} ({self.variant})" if self.variant else self.architecture


def sub(**text: Any) -> dict[str, Any]:
    return {"text_config": text}


def remote(kind: str, what: str, **changes: Any) -> dict[str, Any]:
    """A case whose configuration class ships with the checkpoint; ``what`` says what stands in for it."""
    return {"kind": kind, "changes": changes, "note": REMOTE + what}


SHAPE = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "head_dim": 16,
         "vocab_size": 128, "intermediate_size": 64, "max_position_embeddings": 256}  # fmt: skip
MLA = {"kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}
MINIMAX = {"model_type": "minimax_m2", "sparse_attention_config": {"sparse_attention_freq": [0, 1]}, **SHAPE}
LLAVA = "LLaVA's first format, a language model's fields at the top level"
MISTRAL_FORMAT = "SGLang makes one from params.json; this is LlavaConfig"
CASES = (
    Case("CLIPModel", "clip"),
    Case("Cohere2VisionForConditionalGeneration", "cohere2_vision"),
    Case("DeepseekOCRForCausalLM", "deepseek-ocr"),
    Case("DeepseekVL2ForCausalLM", "deepseek_vl_v2"),
    Case("DeepseekVL2ForCausalLM", "deepseek_vl_v2", {"language_config": {"use_mla": False}}, "use_mla false"),
    Case("DotsOCRForCausalLM", "dots_ocr"),
    Case("DotsVLMForCausalLM", "dots_vlm"),
    Case("Ernie4_5_VLMoeForConditionalGeneration", "ernie4_5_vl_moe"),
    Case("Gemma3ForConditionalGeneration", "gemma3"),
    Case("Gemma3nForConditionalGeneration", "gemma3n"),
    Case("Gemma4ForConditionalGeneration", "gemma4"),
    Case("Gemma4UnifiedForConditionalGeneration", "gemma4_unified"),
    Case("Glm4vForConditionalGeneration", "glm4v"),
    Case("Glm4vMoeForConditionalGeneration", "glm4v_moe"),
    Case("GlmAsrForConditionalGeneration", "glmasr", audio=True),
    Case("GlmImageForConditionalGeneration", "glm_image"),
    Case("GlmOcrForConditionalGeneration", "glm_ocr"),
    Case("Grok1AForCausalLM", None),
    Case("Grok1VForCausalLM", None),
    Case("InklingForConditionalGeneration", "inkling_mm_model", sub(local_layer_ids=[0])),
    Case("InternS1ForConditionalGeneration", **remote("internvl", "InternVLConfig")),
    Case("InternS1ProForConditionalGeneration", **remote("qwen3_vl_moe", "Qwen3VLMoeConfig")),
    Case("InternS2PreviewForConditionalGeneration", "intern_s2_preview"),
    Case("InternVLChatModel", "internvl_chat", {"llm_config": {"architectures": ["Qwen3ForCausalLM"]}}),
    Case("InternVLChatModel", "internvl_chat", {"llm_config": {"architectures": ["GptOssForCausalLM"]}}, "GPT-OSS"),
    Case("JetVLMForConditionalGeneration", "jet_vlm", sub(layer_types=["jet", "attn"], **SHAPE)),
    Case("KimiK25ForConditionalGeneration", "kimi_k25"),
    Case("KimiK3ForConditionalGeneration", "kimi_k3", sub(**MLA)),
    Case("KimiVLForConditionalGeneration", "kimi_vl"),
    Case("Lfm2VlForConditionalGeneration", "lfm2_vl"),
    Case("LightOnOCRForConditionalGeneration", "lighton_ocr"),
    Case("Llama4ForConditionalGeneration", "llama4"),
    Case("LlavaForConditionalGeneration", "llava"),
    Case("LlavaLlamaForCausalLM", "llava", note=LLAVA, extra="llama"),
    Case("LlavaMistralForCausalLM", "llava", note=LLAVA, extra="mistral"),
    Case("LlavaQwenForCausalLM", "llava", note=LLAVA, extra="qwen2"),
    Case("LlavaVidForCausalLM", "llava", note=LLAVA, extra="llama"),
    Case("LocateAnythingForConditionalGeneration", "locateanything"),
    Case("MiDashengLMModel", **remote("qwen2", "Qwen2Config, its language model's"), audio=True),
    Case("MiMoV2ASRForCausalLM", **remote("qwen2", "Qwen2Config, its language model's"), audio=True),
    Case("MiMoV2ForCausalLM", **remote("qwen2", "Qwen2Config with the checkpoint's layer pattern", **SHAPE,
                                       hybrid_layer_pattern=[0, 1])),
    Case("MiniCPMO", **remote("qwen3", "Qwen3Config, its language model's")),
    Case("MiniCPMV", **remote("qwen3", "Qwen3Config, its language model's")),
    Case("MiniCPMV4_6ForConditionalGeneration", "minicpmv4_6"),
    Case("MiniMaxM3SparseForConditionalGeneration", "minimax_m3_vl", {"text_config": MINIMAX}),
    Case("Mistral3ForConditionalGeneration", "mistral3"),
    Case("MllamaForConditionalGeneration", "mllama"),
    Case("MossVLForConditionalGeneration", **remote("qwen3", "Qwen3Config, its language model's")),
    Case("MultiModalityCausalLM", "multi_modality"),
    Case("NVILAForConditionalGeneration", "nvila"),
    Case("NVILALiteForConditionalGeneration", "nvila_lite"),
    Case("NemotronH_Nano_Omni_Reasoning_V3", "NemotronH_Nano_Omni_Reasoning_V3"),
    Case("NemotronH_Nano_VL_V2", "NemotronH_Nano_VL_V2"),
    Case("POINTSV15ChatModel", "pointsv1.5_chat"),
    Case("PaddleOCRVLForConditionalGeneration", "paddleocr_vl"),
    Case("Phi4MMForCausalLM", **remote("phi3", "Phi3Config, its language model's")),
    Case("PixtralForConditionalGeneration", "llava", note=MISTRAL_FORMAT),
    Case("PixtralForConditionalGeneration", "llava", sub(**MLA), "with kv_lora_rank", MISTRAL_FORMAT),
    Case("Qwen2AudioForConditionalGeneration", "qwen2_audio", audio=True),
    Case("Qwen2VLForConditionalGeneration", "qwen2_vl"),
    Case("Qwen2_5_VLForConditionalGeneration", "qwen2_5_vl"),
    Case("Qwen3ASRForConditionalGeneration", "qwen3_asr", audio=True),
    Case("Qwen3OmniMoeForConditionalGeneration", "qwen3_omni_moe"),
    Case("Qwen3VLForConditionalGeneration", "qwen3_vl"),
    Case("Qwen3VLMoeForConditionalGeneration", "qwen3_vl_moe"),
    Case("Qwen3_5ForConditionalGeneration", "qwen3_5"),
    Case("Qwen3_5MoeForConditionalGeneration", "qwen3_5_moe"),
    Case("Sarashina2VisionForCausalLM", **remote("llava", "LlavaConfig, with the same language model")),
    Case("Step3VLForConditionalGeneration", "step3_vl"),
    Case("Step3p7ForConditionalGeneration", "step3p7", sub(layer_types=["full_attention", "sliding_attention"])),
    Case("StepVLForConditionalGeneration", "step3_vl"),
    Case("UnlimitedOCRForCausalLM", "unlimited-ocr"),
    Case("VoxtralForConditionalGeneration", "voxtral", audio=True),
    Case("WhisperForConditionalGeneration", "whisper", audio=True),
    Case("YiVLForCausalLM", "llava", note=LLAVA, extra="llama"),
)  # fmt: skip


def _class_of(kind: str) -> type:
    """The configuration class of a model type: SGLang's own where it has one."""
    from sglang.srt.configs.points_v15_chat import POINTSV15ChatConfig
    from sglang.srt.models.nvila import NVILAConfig
    from sglang.srt.models.nvila_lite import NVILALiteConfig
    from sglang.srt.utils.hf_transformers.common import _CONFIG_REGISTRY
    from transformers import CONFIG_MAPPING, AutoConfig

    # SGLang has these classes and leaves it to the checkpoint to name them.
    unregistered = {cls.model_type: cls for cls in (POINTSV15ChatConfig, NVILAConfig, NVILALiteConfig)}
    if kind in unregistered:
        AutoConfig.register(kind, unregistered[kind], exist_ok=True)
        return unregistered[kind]
    return _CONFIG_REGISTRY.get(kind) or CONFIG_MAPPING[kind]


def write_config(case: Case, directory: Path) -> str:
    """``config.json`` of a case in ``directory``; returns the name of its configuration class."""
    cls = _class_of(case.kind)
    fields = _class_of(case.extra)().to_dict() if case.extra else {}
    fields |= cls(**case.changes).to_dict() | {"model_type": case.kind, "architectures": [case.architecture]}
    (directory / "config.json").write_text(json.dumps(fields, default=str))
    return cls.__name__.lstrip("_").removesuffix("Alias")


def model_config(directory: Path) -> Any:
    from sglang.srt.configs.model_config import ModelConfig

    return ModelConfig(str(directory), enable_multimodal=True)


def judge(case: Case) -> tuple[str, str, str]:
    """Verdict (``accepted``, ``refused``, ``not in SGLang``), reason and configuration of one case."""
    from tgvkv_sglang.sglang_seam.model_support import unsupported

    if case.kind is None:
        return "not in SGLang", "listed, but SGLang has no such model", "none"
    with tempfile.TemporaryDirectory() as name:
        source = write_config(case, Path(name))
        reason = unsupported(model_config(Path(name)))
    source = case.note or f"`{source}`"
    if reason is not None:
        return "refused", reason, source
    return "accepted", "audio only: nothing is evicted" if case.audio else "plain causal attention", source


def page() -> str:
    from tgvkv_sglang.sglang_seam.ledger import SGLANG_VERSION

    rows = [(case, *judge(case)) for case in CASES]
    images = [verdict for case, verdict, *_ in rows if not case.variant and not case.audio]
    counts = (
        f"Of {len(images)} architectures (variants and audio models aside), {images.count('accepted')} are accepted, "
        f"{images.count('refused')} refused, and {images.count('not in SGLang')} listed without a model."
    )
    lines = [f"| `{case.architecture}`{' ' + case.variant if case.variant else ''} | {verdict} | {why} | {source} |\n"
             for case, verdict, why, source in rows]  # fmt: skip
    return HEAD.format(version=SGLANG_VERSION, counts=counts) + "".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page())
