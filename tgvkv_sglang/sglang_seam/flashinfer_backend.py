"""The attention backend on CUDA: SGLang's FlashInfer backend for the dense part, our kernels for views and scores.

A batch without vision is stock, call for call. In a batch with vision the stock class still plans and runs; it is given
index rows without the positions that views stand for (one plan a step, for all layers), and asked for the LSE.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Iterator

import torch
from sglang.srt.layers.attention.flashinfer_backend import FlashInferAttnBackend
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from tgvkv_kernels.common.lse import lse_b2_to_e
from tgvkv_kernels.warm_up import ModelShape, warm_up

from ..attention.batch_tables import BatchUnits, FixedUnits, Holes, Tables, row_requests, stamp_of
from ..attention.flashinfer import Step, dense_indices, merge_views
from ..attention.rows import Row, plan_prefill_rows, stash_and_score
from ..attention.upload import upload
from ..errors import UnsupportedServerError
from ..kv.store import UnitStore
from .batches import current_states, states_of
from .server_args import config_of
from .tensor_parallel import grounding_starter, rank_query_heads


@dataclass
class DenseRows:
    """What SGLang's decode updater takes instead of building the rows itself (it looks for these two names)."""

    kv_indptr: torch.Tensor
    kv_indices: torch.Tensor


def decode_tables(states: list) -> Tables | None:
    """What the requests of a decode batch attend through; None when no request has a view."""
    tables = [state.table(decode=True) if state is not None else None for state in states]
    return tables if any(table is not None for table in tables) else None


def order_moves(store: UnitStore, model_runner: Any) -> None:
    """Let the store move KV on the stream that SGLang's forwards run on.

    Under overlap scheduling that is ``forward_stream``, beside the scheduler's own. With ``--disable-overlap-schedule``
    forwards run on the scheduler's current stream, as moves do by themselves: on another one nothing would order them.
    """
    if model_runner.device == "cuda" and not model_runner.server_args.disable_overlap_schedule:
        store.move_on(model_runner.forward_stream)


class TgvFlashInferBackend(FlashInferAttnBackend):
    """See the module docstring."""

    def __init__(self, model_runner: Any):
        super().__init__(model_runner)
        self._store = self.token_to_kv_pool.units
        if self._store.k_flat.shape != self._store.v_flat.shape:
            raise UnsupportedServerError(
                f"tgvkv: K rows {tuple(self._store.k_flat.shape[1:])} and V rows {tuple(self._store.v_flat.shape[1:])} "
                "differ; on CUDA they must not: serve this model without --attention-backend tgvkv."
            )
        order_moves(self._store, model_runner)
        if self._store.device.type == "cuda":
            keys = self._store.k_flat
            shape = ModelShape(rank_query_heads(model_runner), *keys.shape[1:], keys.dtype, self._store.layers)
            warm_up(shape, keys.device)
        self._first_layer = self.token_to_kv_pool.start_layer
        self._begin = grounding_starter(self._store, model_runner)
        self._retention = config_of(model_runner.server_args).retention
        self._step: Step | None = None
        self._states: list | None = None
        self._tables: Tables | None = None
        self._decode_stamp: tuple | None = None
        self._decode_step: Step | None = None
        self._fixed: FixedUnits | None = None
        self._fixed_stamp: tuple | None = None
        self._fixed_holes: Holes | None = None
        self._capturing = False
        self._graph_wrappers: dict[bool, dict] = {False: self.decode_cuda_graph_metadata, True: {}}
        self.indices_updater_decode.update = partial(self._update_decode, self.indices_updater_decode.update)

    # -- before a forward ----------------------------------------------------------------------------------------

    def init_forward_metadata(self, forward_batch: Any) -> None:
        self._step = self._plan(forward_batch)
        super().init_forward_metadata(forward_batch)

    def _plan(self, forward_batch: Any) -> Step | None:
        states = states_of(forward_batch)
        if states is None:
            return None
        if forward_batch.forward_mode.is_decode():
            return self._plan_decode(self._decode_tables(states))
        return self._plan_prefill(states, forward_batch)

    def _decode_tables(self, states: list) -> Tables | None:
        """:func:`decode_tables` of one forward's states, asked for by each graph hook and answered once."""
        if states is not self._states:
            self._states, self._tables = states, decode_tables(states)
        return self._tables

    def _plan_decode(self, tables: Tables | None) -> Step | None:
        """Outside a graph. Made anew only when the batch or a view has changed."""
        if tables is None:
            return None
        stamp = stamp_of(tables)
        if stamp != self._decode_stamp:
            device = self._store.device
            units = BatchUnits.of(tables, self._store.layers, device)
            self._decode_step, self._decode_stamp = Step(Holes.of(tables, device), units), stamp
        return self._decode_step

    def _plan_prefill(self, states: list, forward_batch: Any) -> Step | None:
        prefixes, counts = forward_batch.extend_prefix_lens_cpu, forward_batch.extend_seq_lens_cpu
        lengths = [int(p) + int(n) for p, n in zip(prefixes, counts, strict=True)]
        rows = plan_prefill_rows(states, prefixes, lengths, self._begin)
        tables, device = [row.table for row in rows], self._store.device
        step = Step()
        for i, row in enumerate(rows):
            if row.text is not None:
                step.scoring.append((row, self._text_rows(row, forward_batch.req_pool_indices[i : i + 1])))
        if any(table is not None for table in tables):
            step.holes, step.units = Holes.of(tables, device), BatchUnits.of(tables, self._store.layers, device)
            step.row_requests = row_requests([row.end - row.start for row in rows], device)
        return step if step.scoring or step.units is not None else None

    def _text_rows(self, row: Row, pool_index: torch.Tensor) -> torch.Tensor:
        """Batch rows of a request's grounding text; tells the grounding where its tokens lie with the last chunk."""
        if row.last_chunk:
            slots = self.req_to_token_pool.req_to_token.index_select(0, pool_index)[0, : row.length]
            row.state.grounding.locate(slots)
        return upload(row.text + row.start, self._store.device)

    def _prepare_dequant_workspace_metadata_for_extend(self, forward_batch: Any, use_ragged: bool = False) -> None:
        """Stock code takes a prefill's index rows and their lengths from here when they are set."""
        super()._prepare_dequant_workspace_metadata_for_extend(forward_batch, use_ragged)
        if self._step is None or self._step.units is None:
            return
        holes, device = self._step.holes, self._store.device
        lengths = zip(forward_batch.extend_prefix_lens_cpu, forward_batch.extend_seq_lens_cpu, strict=True)
        total = sum(int(p) + int(n) for p, n in lengths) - sum(holes.hidden)
        indices = torch.empty(total + 256, dtype=torch.int32, device=device)  # stock pads by as much
        indptr = torch.empty(forward_batch.batch_size + 1, dtype=torch.int32, device=device)
        rows = self.req_to_token_pool.req_to_token
        dense_indices(rows, forward_batch.req_pool_indices, forward_batch.seq_lens, holes, indices, indptr)
        self.dq_page_table, self.dq_paged_kernel_lens = indices, indptr.diff()

    def _update_decode(self, stock, req_pool_indices, seq_lens, seq_lens_cpu, seq_lens_sum, decode_wrappers,
                       encoder_lens, spec_info, **options) -> None:  # fmt: skip
        """Stock planning of a decode step, over rows without holes where the batch has views."""
        if self._step is not None:
            holes, batch = self._step.holes, len(req_pool_indices)
            wrapper = decode_wrappers[0]
            if wrapper.is_cuda_graph_enabled:
                indices = wrapper._paged_kv_indices_buf
            else:
                indices = torch.empty(seq_lens_sum - sum(holes.hidden), dtype=torch.int32, device=self._store.device)
            rows, indptr = self.req_to_token_pool.req_to_token, self.kv_indptr[0][: batch + 1]
            dense_indices(rows, req_pool_indices, seq_lens, holes, indices, indptr)
            spec_info = DenseRows(indptr, indices)
            if seq_lens_cpu is not None:
                seq_lens_cpu = seq_lens_cpu - torch.tensor(holes.hidden, dtype=seq_lens_cpu.dtype)
        stock(req_pool_indices, seq_lens, seq_lens_cpu, seq_lens_sum, decode_wrappers, encoder_lens, spec_info,
              **options)  # fmt: skip

    # -- the forward ---------------------------------------------------------------------------------------------

    def forward_extend(self, q, k, v, layer, forward_batch, save_kv_cache=True):
        if self._step is None:
            return super().forward_extend(q, k, v, layer, forward_batch, save_kv_cache)
        wrapper = self.forward_metadata.prefill_wrappers[0]
        options = {"causal": True, "window_left": layer.sliding_window_size}
        q, out, lse_b2 = self._attend(wrapper, q, k, v, layer, forward_batch, save_kv_cache, **options)
        index = layer.layer_id - self._first_layer
        for row, text_rows in self._step.scoring:
            stash_and_score(row, index, q[text_rows], lse_b2_to_e(lse_b2[text_rows]), self._store, layer.scaling)
        return out.view(-1, layer.tp_q_head_num * layer.head_dim)

    def forward_decode(self, q, k, v, layer, forward_batch, save_kv_cache=True):
        if self._step is None:
            return super().forward_decode(q, k, v, layer, forward_batch, save_kv_cache)
        wrapper = self.forward_metadata.decode_wrappers[0]
        _, out, _ = self._attend(wrapper, q, k, v, layer, forward_batch, save_kv_cache)
        return out.view(-1, layer.tp_q_head_num * layer.head_dim)

    def _attend(self, wrapper, q, k, v, layer, forward_batch, save_kv_cache, **options):
        """Returns ``(q [R, Hq, D], out [R, Hq, D], lse_b2 [R, Hq])``, views included."""
        if layer.is_cross_attention or layer.attn_type == AttentionType.ENCODER_ONLY:
            raise NotImplementedError("tgvkv serves decoder self-attention only")
        if k is not None and save_kv_cache:
            location = KVWriteLoc(forward_batch.out_cache_loc, None)
            self.token_to_kv_pool.set_kv_buffer(layer, location, k, v, *self._kv_write_scales(layer))
        q = q.contiguous().view(-1, layer.tp_q_head_num, layer.head_dim)
        out, lse_b2 = wrapper.forward_return_lse(
            q,
            self.token_to_kv_pool.get_kv_buffer(layer.layer_id),
            sm_scale=layer.scaling,
            logits_soft_cap=layer.logit_cap,
            k_scale=layer.k_scale_float,
            v_scale=layer.v_scale_float,
            **options,
        )
        index = layer.layer_id - self._first_layer
        merge_views(q, out, lse_b2, self._step, index, self._store, layer.scaling)
        return q, out, lse_b2

    # -- CUDA graphs (see cuda_graphs.py) ------------------------------------------------------------------------

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int, kv_indices_buf: torch.Tensor | None = None):
        super().init_cuda_graph_state(max_bs, max_num_tokens, kv_indices_buf)
        # Twice what one copy of every view takes at the server's retention; a batch that needs more (conversations
        # about one picture share its span, not their views) runs without a graph.
        share = min(1.0, 2 * self._retention) if self._retention < 1 else 0.1
        capacity = math.ceil(self._store.layers * self._store.slots * share)
        self._fixed = FixedUnits(self._store.layers, max_bs, capacity, self._store.device)

    @contextmanager
    def capture_views(self) -> Iterator[None]:
        """While it is on, graphs are captured for batches with views."""
        self._capturing = True
        try:
            yield
        finally:
            self._capturing = False

    def views_in(self, states: list) -> bool:
        return self._decode_tables(states) is not None

    def graph_fits(self, states: list) -> bool:
        """Whether the views of a decode batch fit the captured graphs' tables."""
        tables = self._decode_tables(states)
        return tables is None or self._fixed.fits(tables)

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        batch, tables = forward_batch.batch_size, None
        if not in_capture:
            tables = self._decode_tables(current_states() or [])
        elif self._capturing:
            tables = [None] * batch
        self.decode_cuda_graph_metadata = self._graph_wrappers[tables is not None]
        self._step = None if tables is None else self._plan_graph([*tables, *[None] * (batch - len(tables))])
        super().init_forward_metadata_out_graph(forward_batch, in_capture)

    def _plan_graph(self, tables: Tables) -> Step:
        stamp = stamp_of(tables)
        if stamp != self._fixed_stamp:
            self._fixed.load(BatchUnits.of(tables, self._store.layers, self._store.device))
            self._fixed_holes, self._fixed_stamp = Holes.of(tables, self._store.device), stamp
        return Step(self._fixed_holes, self._fixed)
