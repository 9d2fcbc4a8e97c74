"""Configuration, tokenizer, processor and initial weights of the bundled demo model."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from tgvkv_sglang.demo.questions import COUNTS
from tgvkv_sglang.demo.scenes import COLORS, COLUMNS, ROWS, SHAPES

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
TALK = tuple(
    w
    for line in (
        "what where how many is are on in at the of and number numbers color shape object objects row column",
        "list read describe image which both same nothing yes no left right",
    )
    for w in line.split()
)
WORDS = [*COLORS, *SHAPES, *"0123456789", *ROWS, *COLUMNS, *COUNTS, *TALK]
"""Every word is one token, written with its leading space (an answer starts with a space, too: see CHAT_TEMPLATE)."""
BARE = ("user", "assistant", "system", "?", ".", ",", "!")
POS_SIDE = 32

# One line of overhead per turn is all a 4-layer model needs. Every text part gets exactly one leading space, so a word
# is the same token wherever it stands, and a client that strips an answer sends back the same tokens (prefix caching).
CHAT_TEMPLATE = (
    "{%- set ns = namespace(images=0, videos=0) -%}"
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] -}}"
    "{%- if message['content'] is string -%}"
    "{{- ' ' + message['content'] | trim -}}"
    "{%- else -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] in ('image', 'image_url') or 'image' in part or 'image_url' in part -%}"
    "{%- set ns.images = ns.images + 1 -%}"
    "{{- ' image ' + ({1: 'one', 2: 'two', 3: 'three', 4: 'four'}.get(ns.images, 'many')) "
    "+ '<|vision_start|><|image_pad|><|vision_end|>' -}}"
    "{%- elif part['type'] in ('video', 'video_url') or 'video' in part -%}"
    "{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}"
    "{%- elif 'text' in part -%}"
    "{{- ' ' + part['text'] | trim -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{{- '<|im_end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant' -}}{%- endif -%}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE without merges: a known word is one token, anything else falls back to its bytes (lower-cased)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*SPECIAL, *("Ġ" + w for w in WORDS), *(b for b in BARE if b not in alphabet), *alphabet]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    core.normalizer = normalizers.Lowercase()
    pattern = Regex(r" ?[a-z]+| ?[0-9]|\s| ?[^\sa-z0-9]")
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(pattern, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
        model_max_length=4096,
    )


def make_config(tokenizer: PreTrainedTokenizerFast) -> Qwen3VLConfig:
    ids = tokenizer.convert_tokens_to_ids
    vocab = math.ceil(len(tokenizer) / 64) * 64
    text = {
        "vocab_size": vocab,
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 4096,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [12, 10, 10],
            "mrope_interleaved": True,
        },
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "eos_token_id": ids("<|im_end|>"),
        "bos_token_id": None,
        "pad_token_id": ids("<|endoftext|>"),
        "dtype": "float32",
    }
    vision = {
        "depth": 2,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_heads": 2,
        "patch_size": 16,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "num_position_embeddings": POS_SIDE**2,
        "out_hidden_size": 192,
        "deepstack_visual_indexes": [0],
        "in_channels": 3,
        "hidden_act": "gelu_pytorch_tanh",
    }
    return Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
        tie_word_embeddings=True,
        dtype="float32",
    )


def word_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """Token id of every word of the vocabulary."""
    return {w: tokenizer.convert_tokens_to_ids("Ġ" + w) for w in WORDS}


def dct_positions(side: int, width: int) -> torch.Tensor:
    """2-D DCT basis, ``[side*side, width]`` float: low frequencies of both axes, enough to name a tile."""
    x = (torch.arange(side) + 0.5) * math.pi / side
    half = width // 2
    order = torch.arange(1, half + 1)
    axis = torch.cos(x[:, None] * order[None, :])  # [side, half]
    axis[:, 17:] *= 0.1
    rows = axis[:, None, :].expand(side, side, half)
    columns = axis[None, :, :].expand(side, side, half)
    return torch.cat([rows, columns], dim=-1).reshape(side * side, width).contiguous()


@torch.no_grad()
def make_model(seed: int, tokenizer: PreTrainedTokenizerFast) -> Qwen3VLForConditionalGeneration:
    """Initial weights: orthonormal word embeddings, mimetic attention (Wq = Wk, Wo = Wv^T), DCT positions.

    Returns fp32. Source of the mimetic initialisation: Trockman & Kolter 2023.
    """
    torch.manual_seed(seed)
    model = Qwen3VLForConditionalGeneration(make_config(tokenizer)).float()
    text, visual = model.model.language_model, model.model.visual
    embedding = text.embed_tokens.weight
    hidden = embedding.shape[1]
    embedding.normal_(0, 0.3 / hidden**0.5)
    known = torch.arange(len(SPECIAL) + len(WORDS))
    orthonormal = torch.linalg.qr(torch.randn(hidden, hidden))[0]
    if len(known) > hidden:
        raise ValueError(f"{len(known)} words do not fit into {hidden} orthonormal directions: use fewer words")
    embedding[known] = orthonormal[: len(known)]
    for layer in text.layers:
        attention = layer.self_attn
        d, n_kv = attention.head_dim, text.config.num_key_value_heads
        groups = text.config.num_attention_heads // n_kv
        scale = (d / hidden) ** 0.5
        for kv in range(n_kv):
            key = torch.linalg.qr(torch.randn(hidden, d))[0].T
            value = torch.linalg.qr(torch.randn(hidden, d))[0].T
            attention.k_proj.weight[kv * d : (kv + 1) * d] = key
            attention.v_proj.weight[kv * d : (kv + 1) * d] = value
            for g in range(groups):
                h = kv * groups + g
                noise = torch.randn(d, hidden) * 0.3 / hidden**0.5
                attention.q_proj.weight[h * d : (h + 1) * d] = key + noise
                attention.o_proj.weight[:, h * d : (h + 1) * d] = value.T * scale
        for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
            linear.weight.normal_(0, hidden**-0.5)
        layer.mlp.down_proj.weight.normal_(0, 0.1 * layer.mlp.down_proj.in_features**-0.5)
    visual.pos_embed.weight.copy_(dct_positions(POS_SIDE, visual.config.hidden_size) * 0.3)
    for module in visual.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.normal_(0, module.in_features**-0.5)
            module.bias.zero_()
    visual.patch_embed.proj.weight.normal_(0, 2 * (3 * 2 * 16 * 16) ** -0.5)
    visual.patch_embed.proj.bias.zero_()
    for block in visual.blocks:
        block.attn.proj.weight.mul_(0.3)
        block.mlp.linear_fc2.weight.mul_(0.5)
    for merger in visual.deepstack_merger_list:  # silent at first: the main path is taught before the side path
        merger.linear_fc2.weight.zero_()
    return model


def save_bundle(model: Qwen3VLForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write everything that transformers and SGLang need to load the model into ``folder`` (weights in bf16)."""
    folder.mkdir(parents=True, exist_ok=True)
    stored = Qwen3VLForConditionalGeneration(model.config).to(torch.bfloat16)
    stored.load_state_dict(model.state_dict())
    stored.config.dtype = "float32"
    stored.generation_config.do_sample = False
    stored.generation_config.eos_token_id = tokenizer.eos_token_id
    stored.generation_config.pad_token_id = tokenizer.pad_token_id
    stored.generation_config.bos_token_id = None
    stored.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    pixels = {"shortest_edge": 256 * 256, "longest_edge": 1024 * 1024}
    common = {
        "size": pixels,
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "Qwen3VLProcessor",
    }
    image = {**common, "image_processor_type": "Qwen2VLImageProcessorFast"}
    video = {**common, "video_processor_type": "Qwen3VLVideoProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(image, indent=2) + "\n")
    (folder / "video_preprocessor_config.json").write_text(json.dumps(video, indent=2) + "\n")
