"""Eager attention written out, with two hooks per text layer: positions that are evicted, and a record of the weights.

transformers' own eager attention takes its softmax in float32 and one mask for all layers; this one stays in the dtype
of its inputs and asks a ``LayerProbe`` hung on each text layer's attention module. It needs no mask from outside:
queries are the last ones of the sequence, so causality follows from the shapes.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator

import torch
from transformers import AttentionInterface, PreTrainedModel

NAME = "tgvkv_oracle"


class LayerProbe:
    """What one text layer must not see, and what it saw.

    Attributes:
        evicted: bool [keys], positions this layer's queries do not see.
        weights: attention averaged over query heads, [queries, keys] per forward, recorded while ``recording``.
        kv_dtype: what K and V are rounded to before anything reads them, as a quantised cache does; None: nothing.
    """

    def __init__(self) -> None:
        self.evicted = torch.zeros(0, dtype=torch.bool)
        self.recording = False
        self.weights: list[torch.Tensor] = []
        self.kv_dtype: torch.dtype | None = None


@contextlib.contextmanager
def single_threaded() -> Iterator[None]:
    """One torch thread for a while: tensors are tiny, and waiting for a thread on a busy core costs ten times the work.

    Usable as a decorator too.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def oracle_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **_: object,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scaled dot-product attention; query [1, H, q, d], key and value [1, H_kv, k, d], returns [1, q, H, d]."""
    if attention_mask is not None:
        raise ValueError("the oracle makes its own masks, but was handed one")
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    probe: LayerProbe | None = getattr(module, "probe", None)
    if probe is not None and probe.kv_dtype is not None:
        key, value = (kept.to(probe.kv_dtype).to(query.dtype) for kept in (key, value))
    logits = query @ key.transpose(-1, -2) * scaling
    if probe is not None:
        logits = logits.masked_fill(~_visible(probe, *logits.shape[-2:]), -torch.inf)
    weights = logits.softmax(-1)
    if probe is not None and probe.recording:
        probe.weights.append(weights[0].mean(0))
    return (weights @ value).transpose(1, 2).contiguous(), weights


def _visible(probe: LayerProbe, num_queries: int, num_keys: int) -> torch.Tensor:
    keys = torch.arange(num_keys)
    queries = torch.arange(num_keys - num_queries, num_keys)
    return (keys <= queries[:, None]) & ~probe.evicted


def _rms_norm(self: torch.nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    scale = torch.rsqrt(hidden_states.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
    return self.weight * (hidden_states * scale)


def install(model: PreTrainedModel) -> list[LayerProbe]:
    """Hang a probe on each text layer and take RMSNorm out of float32; returns the probes in layer order."""
    probes = []
    for module in model.modules():
        if type(module).__name__.endswith("TextRMSNorm"):
            module.forward = types.MethodType(_rms_norm, module)
    for layer in model.model.language_model.layers:
        layer.self_attn.probe = LayerProbe()
        probes.append(layer.self_attn.probe)
    return probes


AttentionInterface.register(NAME, oracle_attention)
