"""SGLang plugin for tests: any architecture with weights that mean something to attention, and a record of attention.

Found like ``gpu_like`` (:func:`tests.fakes.observed_env`). What it does, on stock servers and on ours alike:

- ``--load-format dummy`` draws weights for which attention is neither uniform nor one-hot and greedy decoding has clear
  margins. A parameter's values depend on its name and shape alone, so every server of a model has the same.
- Requests named ``seen-...`` leave one file a layer and forward in ``OBSERVED_DIR``: ``RID.START.LAYER.npz`` with q, k,
  v and the attention's output of the tokens from position START on. They must be served one at a time.
- Each time a vision tower runs, the log says so.
- SGLang's processes are forked, and memory is pinned in name only, which needs CUDA.
"""

from __future__ import annotations

import hashlib
import math
import multiprocessing
import os
import re
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import torch

SPOKEN = range(0x20, 0x7F)
"""Tokens that may be generated: printable ASCII, so that answers survive decode and encode."""
TEXT_QKV_GAIN = 1.7
"""Attention logits get a standard deviation of its square, 2.9, where queries and keys are not normalised."""
QK_NORM_GAIN = 3.0
ATTENTION_OUTPUT_GAIN = 1.5
LOGITS_STD = 4.0


def _seed(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big")


def _text_attention(name: str) -> bool:
    return not re.search(r"vis|image|audio|encoder|tower|connector", name.partition("layers")[0])


def draw(name: str, shape: torch.Size) -> torch.Tensor:
    """Values of one parameter: by what its name says it is, unit variance in, about unit variance out."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(_seed(name)))
    if re.search(r"(norm|ln)\w*(\.\d+)?\.weight$|\bln_q\.weight$", name) and noise.dim() == 1:
        gain = QK_NORM_GAIN if "q_norm" in name and _text_attention(name) else 1.0
        return gain * (1 + 0.1 * noise)
    if noise.dim() == 1:
        return (0.05 if name.endswith("bias") else 0.5) * noise
    if re.search(r"embed_tokens|word_embeddings|tok_embeddings", name):
        return noise
    if "lm_head" in name:
        silenced = torch.zeros_like(noise)
        silenced[list(SPOKEN)] = noise[list(SPOKEN)] * (LOGITS_STD / math.sqrt(shape[-1]))
        return silenced
    inputs = shape[-1] if "experts" in name else noise[0].numel()
    gain = 1.0
    if _text_attention(name):
        queries_or_values = re.search("(qkv|q|k|v)_proj", name)
        gain = TEXT_QKV_GAIN if queries_or_values else ATTENTION_OUTPUT_GAIN if "o_proj" in name else 1.0
    return noise * (gain / math.sqrt(max(inputs, 1)))


def draw_weights(original: Any, model: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if torch.is_floating_point(parameter):
                parameter.copy_(draw(name, parameter.shape))


def record(original: Any, self: Any, q: Any, k: Any, v: Any, forward_batch: Any, *args: Any, **kwargs: Any) -> Any:
    rids = forward_batch.rids or []
    if len(rids) != 1 or not rids[0].startswith("seen-"):
        return original(self, q, k, v, forward_batch, *args, **kwargs)
    heads, dim = self.tp_q_head_num, self.qk_head_dim
    given = {"q": q.reshape(-1, heads, dim), "k": k.reshape(-1, self.tp_k_head_num, dim)}
    given["v"] = v.reshape(-1, self.tp_v_head_num, self.v_head_dim)
    given = {name: value.detach().clone().float().numpy() for name, value in given.items()}
    out = original(self, q, k, v, forward_batch, *args, **kwargs)
    end = int(forward_batch.seq_lens[0])
    path = Path(os.environ["OBSERVED_DIR"]) / f"{rids[0]}.{end - len(given['q'])}.{self.layer_id}.npz"
    given["out"] = out.detach().reshape(-1, heads, self.v_head_dim).float().numpy()
    np.savez(path, scaling=np.float64(self.scaling), **given)
    return out


def tell_of_towers(original: Any, embed: Any, *args: Any, **kwargs: Any) -> Any:
    @wraps(embed)
    def telling(items: list[Any]) -> Any:
        print(f"observed: a tower embeds {len(items)}", flush=True)
        return embed(items)

    return original(telling, *args, **kwargs)


def fork_processes(original: Any, *args: Any, **kwargs: Any) -> None:
    """SGLang spawns its processes, each of which imports all of it again; forked ones start twice as fast."""
    original(*args, **kwargs)
    multiprocessing.set_start_method("fork", force=True)


def activate() -> None:
    """Called by SGLang in every process."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    hooks = {
        "entrypoints.engine._set_envs_and_config": fork_processes,
        "model_loader.loader.initialize_dummy_weights": draw_weights,
        "managers.mm_utils._get_chunked_prefill_embedding": tell_of_towers,
        "layers.radix_attention.RadixAttention.forward": record,
    }
    torch.Tensor.pin_memory = lambda tensor, *_: tensor  # of a video's frames; it needs CUDA
    for target, handler in hooks.items():
        HookRegistry.register(f"sglang.srt.{target}", handler, HookType.AROUND)
