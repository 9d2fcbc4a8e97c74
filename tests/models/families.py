"""All families that are tried, in order of use, and those that are not, with the reason."""

from __future__ import annotations

from dataclasses import dataclass

from tests.models import glm, internvl, llava, minicpm, mistral, omni, paddle, qwen
from tests.models.family import Family

FAMILIES: tuple[Family, ...] = (
    *qwen.FAMILIES, *internvl.FAMILIES, *glm.FAMILIES, *mistral.FAMILIES, *minicpm.FAMILIES,
    *paddle.FAMILIES, *omni.FAMILIES, *llava.FAMILIES,
)  # fmt: skip
BY_NAME = {family.name: family for family in FAMILIES}
SMOKE = ("Qwen3-VL", "InternVL3", "Mistral Small 3.x", "LLaVA-1.5")
"""What ``make test`` tries: one run of tokens a picture, tiles, rows with a token after each, transformers' classes."""


@dataclass(frozen=True)
class Untried:
    """A family that could not be tried here. ``reached``: how far it got, and what stopped it."""

    name: str
    architecture: str
    reached: str


REMOTE = "its processor is remote code of the checkpoint, which is not at hand; "
UNTRIED = (
    Untried("LLaVA-1.5, NeXT, OneVision (first format)", "LlavaLlamaForCausalLM",
            "their `load_weights` fetches the tower by name and moves it with `.cuda()`; not on a CPU"),
    Untried("Phi-4-MM", "Phi4MMForCausalLM", REMOTE + "accepted by its configuration"),
    Untried("ERNIE-4.5-VL", "Ernie4_5_VLMoeForConditionalGeneration",
            "its MoE layers ask the CUDA driver whether a graph is being captured, which fails without a driver; and "
            + REMOTE + "accepted by its configuration"),
    Untried("DeepSeek-OCR", "DeepseekOCRForCausalLM",
            "not tried: its towers have their full size whatever the configuration says (SAM with 12 layers, CLIP with "
            "24, 1 024 pixels)"),
)  # fmt: skip
