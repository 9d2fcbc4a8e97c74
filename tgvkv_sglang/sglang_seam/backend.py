"""The attention backend SGLang builds for ``--attention-backend tgvkv``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.mem_cache.memory_pool import KVWriteLoc

from ..attention.grounding import Grounding
from ..attention.state import RequestState
from ..attention.torch_cpu import KeyRows, Keys, attend, row_lse_e, visible
from ..errors import UnsupportedServerError
from . import active
from .batches import current_states
from .pool import TgvKVPool
from .refusals import refuse_model
from .tensor_parallel import tensor_parallel_sum


def create_backend(model_runner: Any) -> Any:
    """Factory registered under the backend's name."""
    active.require("the attention backend")
    refuse_model(model_runner.model_config)
    if not isinstance(model_runner.token_to_kv_pool, TgvKVPool):
        raise UnsupportedServerError(
            f"tgvkv: the KV pool is {type(model_runner.token_to_kv_pool).__name__}, not ours; start the server with "
            "--attention-backend tgvkv and no other pool option."
        )
    return TgvTorchBackend(model_runner)


@dataclass
class Row:
    """One request of a batch: query rows ``[start, end)``, logical positions from ``prefix`` to ``length``."""

    state: RequestState | None
    start: int
    end: int
    prefix: int
    length: int
    keys: KeyRows | None
    viewed: bool
    scores: bool
    last_chunk: bool


class TgvTorchBackend(TorchNativeAttnBackend):
    """Torch attention over dense slots and views. A batch without vision is stock ``torch_native``, call for call."""

    def __init__(self, model_runner: Any):
        super().__init__(model_runner)
        self._units = self.token_to_kv_pool.units
        self._first_layer = self.token_to_kv_pool.start_layer
        self._rows: list[Row] | None = None
        self._heads = model_runner.model_config.num_attention_heads
        self._reduce = tensor_parallel_sum()

    def init_forward_metadata(self, forward_batch: Any) -> None:
        super().init_forward_metadata(forward_batch)
        states = current_states()
        self._rows = None
        if states is None or forward_batch.forward_mode.is_idle():
            return
        if len(states) != forward_batch.batch_size:
            raise RuntimeError(f"{len(states)} request states for a batch of {forward_batch.batch_size}")
        lengths = forward_batch.seq_lens.tolist()
        indices = forward_batch.req_pool_indices.tolist()
        decode = forward_batch.forward_mode.is_decode()
        prefixes = [n - 1 for n in lengths] if decode else list(forward_batch.extend_prefix_lens_cpu)
        self._rows, at = [], 0
        for state, index, prefix, length in zip(states, indices, prefixes, lengths, strict=True):
            end = at + length - prefix
            self._rows.append(self._plan(state, index, at, end, int(prefix), length, decode))
            at = end

    def _plan(self, state, index: int, start: int, end: int, prefix: int, length: int, decode: bool) -> Row:
        if state is None:
            return Row(None, start, end, prefix, length, None, False, False, False)
        table = state.decode_table if decode else state.prefill_table
        # After a retraction a prefill runs on past the prompt, and a chunk may hold generated tokens alone.
        scores = not decode and prefix < state.prompt_len and self._begin(state) is not None
        last = scores and length >= state.prompt_len
        keys = None
        if table is not None or scores:
            keys = KeyRows(self.req_to_token_pool.req_to_token[index, :length], table, self._units)
        return Row(state, start, end, prefix, length, keys, table is not None, scores, last)

    def _begin(self, state: RequestState) -> Grounding | None:
        """The prefill's grounding, started with its first chunk."""
        return state.begin_grounding(self._units.layers, self._heads, self._reduce)

    def forward_extend(self, q, k, v, layer, forward_batch, save_kv_cache=True):
        if self._rows is None:
            return super().forward_extend(q, k, v, layer, forward_batch, save_kv_cache)
        return self._forward(q, k, v, layer, forward_batch, save_kv_cache, self._stock_extend)

    def forward_decode(self, q, k, v, layer, forward_batch, save_kv_cache=True):
        if self._rows is None:
            return super().forward_decode(q, k, v, layer, forward_batch, save_kv_cache)
        q = q.reshape(-1, layer.tp_q_head_num * layer.qk_head_dim)
        return self._forward(q, k, v, layer, forward_batch, save_kv_cache, self._stock_decode)

    def _forward(self, q, k, v, layer, forward_batch, save_kv_cache, stock):
        if layer.is_cross_attention or layer.attn_type == AttentionType.ENCODER_ONLY:
            raise NotImplementedError("tgvkv serves decoder self-attention only")
        out = torch.empty(q.shape[0], layer.tp_q_head_num * layer.v_head_dim, dtype=q.dtype, device=q.device)
        if save_kv_cache and k is not None:
            self.token_to_kv_pool.set_kv_buffer(layer, KVWriteLoc(forward_batch.out_cache_loc, None), k, v)
        queries = q.view(-1, layer.tp_q_head_num, layer.qk_head_dim)
        outputs = out.view(-1, layer.tp_q_head_num, layer.v_head_dim)
        for i, row in enumerate(self._rows):
            part = slice(row.start, row.end)
            keys = row.keys.layer(layer.layer_id - self._first_layer) if row.keys is not None else None
            if not row.viewed:
                stock(queries[part], outputs[part], layer, forward_batch, i)
            else:
                positions = torch.arange(row.prefix, row.length)
                mask = None if row.end - row.start == 1 else visible(positions, keys)
                outputs[part] = attend(queries[part], keys, self._units, mask, layer.scaling)
            if row.scores:
                self._score(queries[part], row, keys, layer)
        return out

    def _score(self, q: torch.Tensor, row: Row, keys: Keys, layer: Any) -> None:
        """Stash this chunk's grounding rows; with the last chunk score the layer."""
        grounding, index = row.state.grounding, layer.layer_id - self._first_layer
        rows = grounding.rows(row.prefix, row.length)
        if len(rows):
            mask = visible(rows + row.prefix, keys)
            grounding.add(index, q[rows].clone(), row_lse_e(q[rows], keys, self._units, mask, layer.scaling))
        if row.last_chunk:
            grounding.finish_layer(index, self._units.k_flat, row.keys.by_position(index), layer.scaling)

    def _stock_extend(self, q, out, layer, forward_batch, i: int) -> None:
        one = slice(i, i + 1)
        lengths = forward_batch.extend_prefix_lens[one], forward_batch.extend_seq_lens[one]
        self._stock(self._run_sdpa_forward_extend, q, out, layer, forward_batch, one, *lengths, causal=True)

    def _stock_decode(self, q, out, layer, forward_batch, i: int) -> None:
        self._stock(self._run_sdpa_forward_decode, q, out, layer, forward_batch, slice(i, i + 1))

    def _stock(self, sdpa, q, out, layer, forward_batch, one: slice, *lengths: torch.Tensor, **options) -> None:
        """SGLang's own attention for one request of the batch."""
        sdpa(
            q,
            out,
            self.token_to_kv_pool.get_key_buffer(layer.layer_id),
            self.token_to_kv_pool.get_value_buffer(layer.layer_id),
            self.req_to_token_pool.req_to_token,
            forward_batch.req_pool_indices[one],
            forward_batch.seq_lens[one],
            *lengths,
            scaling=layer.scaling,
            enable_gqa=layer.tp_q_head_num != layer.tp_k_head_num,
            **options,
        )
