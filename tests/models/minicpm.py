"""MiniCPM-V 4.5: a picture and its slices, a span each. What its checkpoint brings as code has a stand-in here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Sequence

import numpy as np
from PIL import Image

from tests.models.family import Family, text_config

REMOTE = Path(__file__).with_name("remote")
PLACEHOLDER, QUERIES = "(<image>./</image>)", 16
SPECIAL = ("<image>", "</image>", "<slice>", "</slice>", "<unk>")


def write(directory: Path, tokenizer: Any) -> None:
    vision = {
        "model_type": "siglip_vision_model", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": 112, "patch_size": 14, "dtype": "float32",
    }  # fmt: skip
    config = text_config(tokenizer, head_dim=32, rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    config |= {
        "architectures": ["MiniCPMV"], "model_type": "minicpmv", "version": "4.5", "vision_config": vision,
        "query_num": QUERIES, "drop_vision_last_layer": False,
        "auto_map": {"AutoConfig": "configuration_minicpm.MiniCPMVConfig"},
    }  # fmt: skip
    processor = {"processor_class": "MiniCPMVProcessor",
                 "auto_map": {"AutoProcessor": "processing_minicpmv.MiniCPMVProcessor"}}  # fmt: skip
    for name, content in (("config.json", config), ("processor_config.json", processor)):
        (directory / name).write_text(json.dumps(content, indent=2))
    for name in ("configuration_minicpm.py", "processing_minicpmv.py"):
        shutil.copy(REMOTE / name, directory)


def layout(directory: Path, text: str, images: Sequence[Image.Image]) -> np.ndarray:
    """A picture that is not square has two slices; each of the three is a run of its queries between two tokens."""
    from transformers import Qwen2Tokenizer

    tokenizer = Qwen2Tokenizer.from_pretrained(directory, local_files_only=True)
    one = "<unk>" * QUERIES
    for image in images:
        between = "\n" if image.height > image.width else ""
        slices = [] if image.width == image.height else [f"<slice>{one}</slice>"] * 2
        text = text.replace(PLACEHOLDER, f"<image>{one}</image>" + between.join(slices), 1)
    return np.array(tokenizer.encode(text)) == tokenizer.convert_tokens_to_ids("<unk>")


FAMILIES = (
    Family("MiniCPM-V 4.5", "MiniCPMV", write, PLACEHOLDER, SPECIAL, layout, sizes=((224, 112), (112, 112)),
           flags=("--trust-remote-code",), item_a_picture=False,
           note="a picture and its slices, a span each; a stand-in for the processor that the checkpoint brings"),
)  # fmt: skip
