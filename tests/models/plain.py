"""A family in plain transformers: its weights, and its answers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Sequence

from tests.fakes.observed.tgvkv_observed import draw

TOSS_UP = 1e-3
"""Two logits nearer than that may change places between two ways to compute them."""


def write_weights(directory: Path, config: Any) -> None:
    """A checkpoint of transformers' class for ``config``, whose parameters are drawn by name and shape."""
    import torch
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(draw(name, parameter.shape))
    model.save_pretrained(directory)
    _publish(directory / "model.safetensors")


def _publish(weights: Path) -> None:
    """Rename a CLIP tower's weights as published checkpoints have them; the newest transformers leaves a level out."""
    from safetensors.torch import load_file, save_file

    level = re.compile(r"^vision_tower\.(?!vision_model\.)")
    renamed = {level.sub("vision_tower.vision_model.", name): tensor for name, tensor in load_file(weights).items()}
    save_file(renamed, weights, metadata={"format": "pt"})


def plain_answers(directory: Path, prompts: Sequence[dict[str, Any]], tokens: int) -> list[list[int]]:
    """Greedy answers of ``tokens`` tokens, each up to its first toss-up."""
    import torch
    from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(directory, local_files_only=True)
    # What SGLang uses with --disable-fast-image-processor; torchvision's pixels differ by up to 0.02.
    processor.image_processor = AutoImageProcessor.from_pretrained(directory, backend="pil", local_files_only=True)
    model = AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    said = []
    for prompt in prompts:
        inputs = processor(text=[prompt["text"]], images=prompt["images"] or None, return_tensors="pt")
        out = model.eval().generate(
            **inputs, max_new_tokens=tokens, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
        best = torch.cat(out.logits).topk(2).values
        sure = ((best[:, 0] - best[:, 1]) > TOSS_UP).int().cumprod(0).sum()
        said.append(out.sequences[0, inputs["input_ids"].shape[1] :][:sure].tolist())
    return said
