"""A policy: a vision token is worth the largest attention that any head of the question pays it."""

import torch

from tgvkv_sglang.selection.policy import LayerByLayer, LayerInputs, LayerScores
from tgvkv_sglang.selection.tgv import text_after_vision


class Loudest(LayerByLayer):
    """``score_v = max over heads h and question tokens t of A_h[t, v]``; layers weigh alike."""

    budget = "uniform"

    def query_positions(self, spans, start, end, cap):
        return text_after_vision(spans, start, end, cap)

    def score_layer(self, layer: LayerInputs) -> LayerScores:
        keys = layer.store.keys(layer.vision_units, layer.layer)  # [V, Hkv, D]
        keys = keys.repeat_interleave(layer.q.shape[1] // keys.shape[1], dim=1)
        logits = torch.einsum("thd,vhd->thv", layer.q.float(), keys) * layer.scale
        attention = torch.exp(logits - layer.lse_e[:, :, None].float())
        seen = layer.vision_positions[None, :] <= layer.text_positions[:, None]
        scores = layer.model.reduce_max((attention * seen[:, None, :]).amax((0, 1)))
        return LayerScores(scores, scores.sum())
