"""Write docs/support.md and the table that ``tgvkv doctor --models`` prints: python docs/make_support.py

Builds a real ``ModelConfig`` of every multimodal architecture that the pinned SGLang lists, from a ``config.json`` with
the defaults of the model's own configuration class, and asks the plugin whether it would serve it. Which families were
tried is read from the result of ``python -m bench.models``. Downloads nothing.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.models.families import FAMILIES, UNTRIED  # noqa: E402

PAGE = Path(__file__).with_name("support.md")
DATA = ROOT / "tgvkv_sglang" / "data" / "support.json"
RESULT = ROOT / "bench" / "results" / "models-cpu.json"
ON_A_GPU: dict[str, str] = {}
"""Result files of tests on a GPU by architecture, under bench/results."""
ACCEPTANCE = "tests/seam/test_models.py"
HEAD = """# Which models can be served

Written by `python docs/make_support.py`; do not edit. `tgvkv doctor --models` prints the first table.

Every multimodal architecture that SGLang {version} lists, and what tgvkv answers at start-up to a configuration of it.
*Accepted* means that attention is plain causal attention over K and V per head in every layer, **not that the model was
tried**: the column *CPU* says which families were. Refusals go by these same checks, and once the weights are loaded by
the attention layers themselves, so a model that is missing here is judged too. Text-only models take the stock path.

{counts}

| architecture | tgvkv | why (configuration) | CPU | GPU | test |
|---|---|---|---|---|---|
"""
TRIED = """
## What was tried of each family

`python -m bench.models` (`bench/results/models-cpu.json`): a tiny checkpoint of the architecture, with its own
configuration, tokenizer and processor made by transformers' classes and random weights, on a live server in float32.

- *stock*: at retention 1.0 the tokens, `cached_tokens` and prompt lengths of stock SGLang. Stock serves LLaVA in
  Hugging Face's format through transformers' classes, with radix cache and chunked prefill turned off. With tgvkv both
  are on; compared are the tokens of plain transformers, from a checkpoint with weights under their published names.
- *kept set*: of a question about one image. Where its vision tokens are equals what the family's own processor says;
  scores, masses and the kept set equal the brute-force oracle's on attention recomputed in float64 from the q and K
  that the layers were given; every decode step's output equals float64 attention over all text and what was kept.
- *follow-up*: the second question takes the image from the cache and selects afresh; compared in the same way.
- *two images*: pictures of equal size, one pixel apart, alone and two in a prompt in both orders, are never confused.
- *reclaim*: chats about twice as many pictures as fit; who goes on does so on the right view, checked at every step.
- *spans*: a question before a picture and between two, up to thirty pictures, a picture at the very end, a second
  picture in a later turn.

Weights of all but LLaVA are drawn in the server: loading them is SGLang's own and not tried; nor is anything that needs
CUDA in a tower. Videos: where the spans of every family's processor are is checked without a server
(`tests/seam/test_spans.py`), and Qwen3-VL answers about one on a live server (`tests/server/test_video.py`), whose
decoded frames are pinned in name only, since pinning memory needs CUDA.

| family | flags | {columns} | remarks |
|---|---|{rules}---|
"""
NOT_TRIED = """
## Not tried, and how far it got

| family | architecture | |
|---|---|---|
"""
BACKEND = "SGLang has no class of its own; it takes transformers' model"
REMOTE = "the checkpoint's own class is remote code; this is "


@dataclass(frozen=True)
class Case:
    """One row: an architecture and the configuration it is judged by.

    ``kind`` is a model type known to transformers or SGLang, ``changes`` are laid over that class's defaults, ``extra``
    names a second model type whose fields go to the top level, ``note`` says what is not the checkpoint's own class;
    ``backend``: SGLang has no class of its own and takes transformers' model.
    """

    architecture: str
    kind: str | None
    changes: dict[str, Any] = field(default_factory=dict)
    variant: str = ""
    note: str = ""
    extra: str = ""
    audio: bool = False
    backend: bool = False

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
    Case("LlavaNextForConditionalGeneration", "llava_next", note=BACKEND, backend=True),
    Case("LlavaOnevisionForConditionalGeneration", "llava_onevision", note=BACKEND, backend=True),
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


def table() -> dict[str, Any]:
    """What is written to :data:`DATA`."""
    from tgvkv_sglang.sglang_seam.ledger import SGLANG_VERSION

    passed = tried()
    rows = []
    for case in CASES:
        verdict, why, source = judge(case)
        accepted = verdict == "accepted"
        names = [] if case.variant or not accepted else passed.get(case.architecture, [])
        test = " ".join(f"'{name}'" for name in names)
        rows.append({
            "architecture": case.architecture, "variant": case.variant, "audio": case.audio, "verdict": verdict,
            "why": f"{why} ({source})", "cpu": names, "gpu": ON_A_GPU.get(case.architecture, "") if accepted else "",
            "test": f"python -m bench.models --only {test}" if names else ACCEPTANCE if accepted else "",
        })  # fmt: skip
    return {"sglang": SGLANG_VERSION, "rows": rows}


def tried() -> dict[str, list[str]]:
    """Names of the families that passed all checks, by architecture."""
    runs = json.loads(RESULT.read_text())["runs"]
    out: dict[str, list[str]] = {}
    for family in FAMILIES:
        if "error" not in runs.get(family.key, {"error": ""}):
            out.setdefault(family.architecture, []).append(family.name)
    return out


def row_of(row: dict[str, Any]) -> str:
    name = f"`{row['architecture']}`" + (f" {row['variant']}" if row["variant"] else "")
    accepted = row["verdict"] == "accepted"
    cpu = ", ".join(row["cpu"]) or ("not tried" if accepted else "")
    gpu = row["gpu"] or ("not tested" if accepted else "")
    test = f"`{row['test']}`" if row["test"] else ""
    return f"| {name} | {row['verdict']} | {row['why']} | {cpu} | {gpu} | {test} |\n"


def families_page() -> str:
    runs = json.loads(RESULT.read_text())["runs"]
    columns = list(next(iter(runs.values()))["checks"])
    out = TRIED.format(columns=" | ".join(columns), rules="---|" * len(columns))
    for family in FAMILIES:
        run = runs[family.key]
        flags = f"`{' '.join(family.flags)}`" if family.flags else ""
        found = " | ".join(run["checks"].get(name, "**failed**") for name in columns)
        out += f"| {family.name} | {flags} | {found} | {family.note} |\n"
    return out + NOT_TRIED + "".join(f"| {u.name} | `{u.architecture}` | {u.reached} |\n" for u in UNTRIED)


def page(data: dict[str, Any]) -> str:
    images = [row for row in data["rows"] if not row["variant"] and not row["audio"]]
    verdicts = [row["verdict"] for row in images]
    counts = (
        f"Of {len(images)} architectures (variants and audio models aside), {verdicts.count('accepted')} are accepted, "
        f"{verdicts.count('refused')} refused, and {verdicts.count('not in SGLang')} listed without a model; "
        f"{sum(bool(row['cpu']) for row in images)} of the accepted ones were tried on a CPU, "
        f"{sum(bool(row['gpu']) for row in images)} on a GPU."
    )
    head = HEAD.format(version=data["sglang"], counts=counts)
    return head + "".join(map(row_of, data["rows"])) + families_page()


def written(data: dict[str, Any]) -> str:
    return json.dumps(data, indent=1) + "\n"


if __name__ == "__main__":
    made = table()
    DATA.write_text(written(made))
    PAGE.write_text(page(made))
