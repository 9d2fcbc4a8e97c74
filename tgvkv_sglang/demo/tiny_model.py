"""A complete, randomly initialised Qwen3-VL checkpoint, made offline in a moment.

It stands in for a real vision-language model wherever only the machinery matters: SGLang and transformers load it with
their stock Qwen3-VL code, tokenizer and image processor included. **Its words mean nothing.** The weights are drawn so
that what the tests look at is well conditioned: attention is neither uniform nor one-hot, layers differ in how much of
it goes to the image, pixels and questions both matter, and greedy decoding has clear margins.

transformers, tokenizers and torch are imported inside the functions only, so importing this module costs nothing.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .checkpoint import byte_tokenizer, new_directory
from .qwen3_vl import make_config, write_checkpoint

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase, Qwen3VLConfig, Qwen3VLForConditionalGeneration

VOCAB_SIZE = 320
"""256 bytes (token id = byte value), the special tokens, then rows nobody uses, up to a multiple of 64."""


@dataclass(frozen=True)
class TinySize:
    """Shape of one stand-in model; head_dim is explicit because Qwen3's need not be hidden_size / heads."""

    hidden_size: int
    intermediate_size: int
    head_dim: int
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    vision_hidden_size: int = 64
    vision_depth: int = 2
    vision_heads: int = 2


SIZES = {
    "tiny": TinySize(hidden_size=64, intermediate_size=128, head_dim=32),
    # head dimensions that GPU attention kernels are built for
    "small": TinySize(hidden_size=128, intermediate_size=256, head_dim=64),
    "wide": TinySize(hidden_size=256, intermediate_size=512, head_dim=128),
}


def make_tiny_model(directory: str | os.PathLike[str], *, seed: int = 0, size: str = "tiny") -> Path:
    """Write a randomly initialised Qwen3-VL checkpoint (float32) in Hugging Face layout.

    The directory appears whole or not at all: everything is written next to it and then renamed.

    Args:
        directory: where to put it; must not exist yet, or be empty.
        seed: seed of the weights. The same seed gives the same weights with the same torch version.
        size: one of ``SIZES``: ``tiny`` (head_dim 32), ``small`` (64), ``wide`` (128); all with 4 layers.

    Returns:
        The directory, as an absolute path.

    Raises:
        ValueError: unknown ``size``.
        FileExistsError: ``directory`` exists and is not an empty directory.
    """
    if size not in SIZES:
        raise ValueError(f"size must be one of {', '.join(SIZES)}, got {size!r}")
    tokenizer = byte_tokenizer()
    with new_directory(directory) as staging:
        write_checkpoint(staging, tokenizer, _make_model(_make_config(SIZES[size], tokenizer), seed))
    return Path(directory).resolve()


def _make_config(size: TinySize, tokenizer: PreTrainedTokenizerBase) -> Qwen3VLConfig:
    text = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": size.hidden_size,
        "intermediate_size": size.intermediate_size,
        "num_hidden_layers": size.num_layers,
        "num_attention_heads": size.num_heads,
        "num_key_value_heads": size.num_kv_heads,
        "head_dim": size.head_dim,
        "max_position_embeddings": 32768,
    }
    vision = {
        "depth": size.vision_depth,
        "hidden_size": size.vision_hidden_size,
        "intermediate_size": 2 * size.vision_hidden_size,
        "num_heads": size.vision_heads,
        "num_position_embeddings": 24 * 24,
        "deepstack_visual_indexes": [0],
        "dtype": "float32",
    }
    end = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return make_config(tokenizer, text=text, vision=vision, **end)


def _make_model(config: Qwen3VLConfig, seed: int) -> Qwen3VLForConditionalGeneration:
    import torch
    from transformers import Qwen3VLForConditionalGeneration

    model = Qwen3VLForConditionalGeneration(config).to(torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(_draw(name, parameter.shape, generator))
        _silence_unprintable_tokens(model.lm_head.weight, config.eos_token_id)
    return model


# Query-key normalisation makes attention logits sqrt(head_dim) * cos(q, k), of standard deviation about 1 for random
# vectors. These gains, one a layer and repeated, spread that to 2-4: a query's best vision token gets 3 to 11 times its
# fair share, so selections differ between layers and questions, and near-ties stay rare even among 1 000 tokens.
QK_GAINS = (2.5, 4.0, 2.0, 3.2)
# What attention brings must weigh in the residual stream, or evicting the image would not change a word.
ATTENTION_OUTPUT_GAIN = 1.5


def _draw(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Draw one parameter; which rule applies depends on its name only."""
    import torch

    noise = torch.randn(shape, generator=generator)
    if name.endswith("q_norm.weight"):
        layer = int(name.split(".layers.")[1].split(".")[0])
        return QK_GAINS[layer % len(QK_GAINS)] * (1 + 0.1 * noise)
    if "norm" in name and name.endswith("weight"):
        return 1 + 0.1 * noise
    if name.endswith("bias"):
        # A merger bias shared by all vision tokens gives them a common direction, which is what lets layers
        # differ in how much attention the image as a whole receives.
        return (0.7 if "merger" in name and "linear_fc2" in name else 0.05) * noise
    if name.endswith("embed_tokens.weight"):
        return noise + 0.7 * torch.randn(shape[1], generator=generator)  # a direction common to all text
    if name.endswith("pos_embed.weight"):
        # One row repeated: SGLang interpolates this table differently from transformers unless it is started with
        # --enable-precise-embedding-interpolation, and a constant table comes out the same either way.
        return 0.5 * noise[:1].expand(shape)
    if name == "lm_head.weight":
        return noise * (4 / math.sqrt(shape[1]))  # logits of standard deviation 4
    gain = ATTENTION_OUTPUT_GAIN if name.endswith("o_proj.weight") else 1
    return noise * (gain / math.sqrt(noise[0].numel()))  # unit variance in, gain squared out


def _silence_unprintable_tokens(lm_head: torch.Tensor, eos_token_id: int) -> None:
    """Zero the rows of tokens that are no printable ASCII (end of turn excepted), in place.

    Their logit is then exactly 0 and never the largest of the about 100 others, so greedy answers are text that
    survives decode and encode unchanged: a follow-up turn's prompt continues the very token ids that were generated.
    """
    spoken = [*range(0x20, 0x7F), eos_token_id]
    kept = lm_head[spoken].clone()
    lm_head.zero_()
    lm_head[spoken] = kept
