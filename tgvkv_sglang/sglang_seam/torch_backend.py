"""The attention backend on machines without a GPU: torch attention over dense slots and views."""

from __future__ import annotations

import math

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.model_executor.model_runner import ModelRunner

from ..attention.planner import ViewPlanner
from ..attention.rows import Row, decode_rows
from ..attention.torch_cpu import KeyRows, Keys, attend, row_lse_e, visible
from ..errors import NotSelfAttentionError
from ..selection.scoring import PrefillScoring
from .batches import page_rows, states_of
from .server_args import config_of
from .tensor_parallel import model_of


class TgvTorchBackend(TorchNativeAttnBackend):
    """A batch without vision is stock ``torch_native``, call for call."""

    def __init__(self, model_runner: ModelRunner):
        super().__init__(model_runner)
        self._store = self.token_to_kv_pool.store
        self._first_layer = self.token_to_kv_pool.start_layer
        self._rows: list[tuple[Row, KeyRows | None]] | None = None
        self._scoring: PrefillScoring | None = None
        stash_bytes = config_of(model_runner.server_args).stash_bytes
        page_table = self.req_to_token_pool.req_to_token
        self._planner = ViewPlanner(self._store, model_of(model_runner), page_table, stash_bytes)

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        super().init_forward_metadata(forward_batch)
        states = states_of(forward_batch)
        self._rows = self._scoring = None
        if states is None:
            return
        lengths, indices = forward_batch.seq_lens.tolist(), forward_batch.req_pool_indices
        if forward_batch.forward_mode.is_decode():
            rows = decode_rows(states, lengths)
        else:
            rows = self._planner.prefill_rows(states, forward_batch.extend_prefix_lens_cpu, lengths)
            self._scoring = self._planner.scoring(rows, page_rows())
        self._rows = [(row, self._keys(row, index)) for row, index in zip(rows, indices.tolist(), strict=True)]

    def _keys(self, row: Row, index: int) -> KeyRows | None:
        slots = self.req_to_token_pool.req_to_token[index, : row.length]
        return KeyRows(slots, row.table, self._store) if row.table is not None or row.scores else None

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
            raise NotSelfAttentionError(layer.layer_id)
        out = torch.empty(q.shape[0], layer.tp_q_head_num * layer.v_head_dim, dtype=q.dtype, device=q.device)
        if save_kv_cache and k is not None:
            self.token_to_kv_pool.set_kv_buffer(layer, KVWriteLoc(forward_batch.out_cache_loc, None), k, v)
        queries = q.view(-1, layer.tp_q_head_num, layer.qk_head_dim)
        outputs = out.view(-1, layer.tp_q_head_num, layer.v_head_dim)
        lse_b2 = queries.new_zeros(queries.shape[:2], dtype=torch.float32) if self._scoring is not None else None
        for i, (row, key_rows) in enumerate(self._rows):
            part = slice(row.start, row.end)
            keys = key_rows.layer(layer.layer_id - self._first_layer) if key_rows is not None else None
            if row.table is None:
                stock(queries[part], outputs[part], layer, forward_batch, i)
            else:
                positions = torch.arange(row.prefix, row.length)
                mask = None if row.end - row.start == 1 else visible(positions, keys)
                outputs[part] = attend(queries[part], keys, self._store, mask, layer.scaling)
            if row.scores and len(row.text):
                lse_b2[row.text + row.start] = self._row_lse_b2(queries[part][row.text], row, keys, layer.scaling)
        if self._scoring is not None:
            self._scoring.add(layer.layer_id - self._first_layer, queries, lse_b2, layer.scaling)
        return out

    def _row_lse_b2(self, q: torch.Tensor, row: Row, keys: Keys, scale: float) -> torch.Tensor:
        """Of the rows that are asked for alone; SDPA does not say it."""
        return row_lse_e(q, keys, self._store, visible(row.text + row.prefix, keys), scale) / math.log(2)

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
