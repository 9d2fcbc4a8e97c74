"""The attention backend on CUDA: SGLang's FlashInfer backend for the dense part, our kernels for views and scores.

A batch without vision is stock, call for call. In a batch with vision the stock class still plans and runs; it is given
index rows without the positions that views stand for (one plan a step, for all layers), and asked for the LSE.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Iterator

import torch
from sglang.srt.layers.attention.flashinfer_backend import FlashInferAttnBackend
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.model_executor.model_runner import ModelRunner
from tgvkv_kernels.dense_rows.api import dense_rows
from tgvkv_kernels.warm_up import ModelShape, warm_up

from ..attention.batch_tables import Tables
from ..attention.merge import merge_views
from ..attention.planner import Step, ViewPlanner
from ..attention.rows import Attendees
from ..errors import NotSelfAttentionError, UnsupportedServerError
from ..kv.store import UnitStore
from .batches import current_states, page_rows, states_of
from .cuda_graphs import StepsWithoutGraph
from .server_args import config_of
from .tensor_parallel import model_of


@dataclass
class DenseRows:
    """What SGLang's decode updater takes instead of building the rows itself (it looks for these two names)."""

    kv_indptr: torch.Tensor
    kv_indices: torch.Tensor


def order_moves(store: UnitStore, model_runner: ModelRunner) -> None:
    """Let the store move KV on the stream that SGLang's forwards run on.

    Under overlap scheduling that is ``forward_stream``, beside the scheduler's own. With ``--disable-overlap-schedule``
    forwards run on the scheduler's current stream, as moves do by themselves: on another one nothing would order them.
    """
    if model_runner.device == "cuda" and not model_runner.server_args.disable_overlap_schedule:
        store.move_on(model_runner.forward_stream)


def kv_factors(model: torch.nn.Module) -> list[tuple[float, float]]:
    """What each layer's K and V are divided by when they are stored, as the checkpoint says; FlashInfer is told too."""
    layers = sorted((m for m in model.modules() if isinstance(m, RadixAttention)), key=lambda layer: layer.layer_id)
    return [(layer.k_scale_float or 1.0, layer.v_scale_float or 1.0) for layer in layers]


class TgvFlashInferBackend(FlashInferAttnBackend):
    """See the module docstring."""

    def __init__(self, model_runner: ModelRunner):
        super().__init__(model_runner)
        self._store = self.token_to_kv_pool.store
        if self._store.k_flat.shape != self._store.v_flat.shape:
            raise UnsupportedServerError(
                f"tgvkv: K rows {tuple(self._store.k_flat.shape[1:])} and V rows {tuple(self._store.v_flat.shape[1:])} "
                "differ; on CUDA they must not: serve this model without --attention-backend tgvkv."
            )
        order_moves(self._store, model_runner)
        self._store.scale(kv_factors(model_runner.model))
        model = model_of(model_runner)
        if self._store.device.type == "cuda":
            keys = self._store.k_flat
            scaled = self._store.k_scales is not None
            shape = ModelShape(
                model.rank_heads, *keys.shape[1:], model_runner.dtype, self._store.layers, keys.dtype, scaled
            )
            warm_up(shape, keys.device)
        self._first_layer = self.token_to_kv_pool.start_layer
        stash_bytes = config_of(model_runner.server_args).stash_bytes
        self._planner = ViewPlanner(self._store, model, self.req_to_token_pool.req_to_token, stash_bytes)
        self._step: Step | None = None
        self._capturing = False
        self.steps_without_graph = StepsWithoutGraph()
        self._graph_wrappers: dict[bool, dict] = {False: self.decode_cuda_graph_metadata, True: {}}
        self.indices_updater_decode.update = partial(self._update_decode, self.indices_updater_decode.update)

    # -- before a forward ----------------------------------------------------------------------------------------

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        self._step = self._plan(forward_batch)
        super().init_forward_metadata(forward_batch)

    def _plan(self, forward_batch: ForwardBatch) -> Step | None:
        states = states_of(forward_batch)
        if states is None:
            return None
        if forward_batch.forward_mode.is_decode():
            return self._planner.decode(states)
        prefixes, counts = forward_batch.extend_prefix_lens_cpu, forward_batch.extend_seq_lens_cpu
        lengths = [int(p) + int(n) for p, n in zip(prefixes, counts, strict=True)]
        return self._planner.prefill(self._planner.prefill_rows(states, prefixes, lengths), page_rows())

    def _prepare_dequant_workspace_metadata_for_extend(
        self, forward_batch: ForwardBatch, use_ragged: bool = False
    ) -> None:
        """Stock code takes a prefill's index rows and their lengths from here when they are set."""
        super()._prepare_dequant_workspace_metadata_for_extend(forward_batch, use_ragged)
        if self._step is None or self._step.units is None:
            return
        holes, device = self._step.holes, self._store.device
        lengths = zip(forward_batch.extend_prefix_lens_cpu, forward_batch.extend_seq_lens_cpu, strict=True)
        total = sum(int(p) + int(n) for p, n in lengths) - sum(holes.hidden)
        indices = torch.empty(total + 256, dtype=torch.int32, device=device)  # stock pads by as much
        indptr = torch.empty(forward_batch.batch_size + 1, dtype=torch.int32, device=device)
        self._leave_out(holes, forward_batch.req_pool_indices, forward_batch.seq_lens, indices, indptr)
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
            indptr = self.kv_indptr[0][: batch + 1]
            self._leave_out(holes, req_pool_indices, seq_lens, indices, indptr)
            spec_info = DenseRows(indptr, indices)
            if seq_lens_cpu is not None:
                seq_lens_cpu = seq_lens_cpu - torch.tensor(holes.hidden, dtype=seq_lens_cpu.dtype)
        stock(req_pool_indices, seq_lens, seq_lens_cpu, seq_lens_sum, decode_wrappers, encoder_lens, spec_info,
              **options)  # fmt: skip

    def _leave_out(self, holes, req_pool_indices, seq_lens, indices, indptr) -> None:
        """Write every request's slots without its holes, one request after the other, and their bounds."""
        dense_rows(
            self.req_to_token_pool.req_to_token,
            req_pool_indices,
            seq_lens,
            holes.start,
            holes.end,
            holes.indptr,
            kv_indices=indices,
            kv_indptr=indptr,
        )

    # -- the forward ---------------------------------------------------------------------------------------------

    def forward_extend(self, q, k, v, layer, forward_batch, save_kv_cache=True):
        if self._step is None:
            return super().forward_extend(q, k, v, layer, forward_batch, save_kv_cache)
        wrapper = self.forward_metadata.prefill_wrappers[0]
        q, out, lse_b2 = self._attend(wrapper, q, k, v, layer, forward_batch, save_kv_cache, causal=True)
        if self._step.scoring is not None:
            self._step.scoring.add(layer.layer_id - self._first_layer, q, lse_b2, layer.scaling)
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
            raise NotSelfAttentionError(layer.layer_id)
        if k is not None and save_kv_cache:
            location = KVWriteLoc(forward_batch.out_cache_loc, None)
            self.token_to_kv_pool.set_kv_buffer(layer, location, k, v, *self._kv_write_scales(layer))
        q = q.contiguous().view(-1, layer.tp_q_head_num, layer.head_dim)
        out, lse_b2 = wrapper.forward_return_lse(
            q,
            self.token_to_kv_pool.get_kv_buffer(layer.layer_id),
            sm_scale=layer.scaling,
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
        self._planner.make_graph_tables(max_bs)

    @contextmanager
    def capture_views(self) -> Iterator[None]:
        """While it is on, graphs are captured for batches with views."""
        self._capturing = True
        try:
            yield
        finally:
            self._capturing = False

    def views_in(self, states: Attendees) -> bool:
        return self._planner.decode_tables(states) is not None

    def graph_fits(self, states: Attendees) -> bool:
        """Whether the views of a decode batch that is about to run fit the captured graphs' tables; counts if not."""
        needed, held = self._planner.graph_units(states)
        if needed > held:
            self.steps_without_graph.add(len(states), needed, held)
        return needed <= held

    def init_forward_metadata_out_graph(self, forward_batch: ForwardBatch, in_capture: bool = False) -> None:
        batch = forward_batch.batch_size
        tables: Tables | None = None
        if not in_capture:
            tables = self._planner.decode_tables(current_states() or [])
        elif self._capturing:
            tables = [None] * batch
        self.decode_cuda_graph_metadata = self._graph_wrappers[tables is not None]
        self._step = None if tables is None else self._planner.graph_step(tables, batch)
        super().init_forward_metadata_out_graph(forward_batch, in_capture)
