"""What the FlashInfer backend itself adds to a step's costs on a GPU: index rows without holes, and nothing that waits.

The backend is real but for SGLang's constructor and planning, which are stock; memory is a fake GPU's.
"""

from types import SimpleNamespace

import pytest
import torch

from tests.fakes.launches import Launches, on_gpu, values
from tests.unit.attention.gpu_batches import LENGTH, VISION, Counted, Gpu
from tgvkv_sglang.sglang_seam import flashinfer_backend
from tgvkv_sglang.sglang_seam.flashinfer_backend import DenseRows, TgvFlashInferBackend

ROWS = {"row_bounds_kernel": 1, "fill_rows_kernel": 1}


class Backend(TgvFlashInferBackend):
    """On the pool and planner of a batch that was just prefilled."""

    def __init__(self, gpu: Gpu):
        self.gpu, self.requests = gpu, len(gpu.requests)
        self._store, self._planner, self._step = gpu.store, gpu.planner, None
        self.req_to_token_pool = SimpleNamespace(req_to_token=gpu.page_table)
        self.kv_indptr = [on_gpu(torch.zeros(17, dtype=torch.int32))]
        self._graph_wrappers, self._capturing = {False: {}, True: {}}, False
        self.planned = None

    def update(self, graph: bool, batch: int) -> None:
        """Plan a decode step of so many rows, the last ones padding if there are more than requests."""
        wrapper = SimpleNamespace(is_cuda_graph_enabled=graph, _paged_kv_indices_buf=self.indices)
        lengths = torch.tensor([LENGTH] * self.requests + [1] * (batch - self.requests))
        rows = [self.rows[:batch], self.lengths[:batch], lengths, int(lengths.sum())]
        self._update_decode(self._stock, *rows, [wrapper], None, None)

    def _stock(self, pool, lengths, lengths_cpu, total, wrappers, encoder_lens, rows, **options) -> None:
        self.planned = rows, lengths_cpu

    def on_device(self, batch: int) -> None:
        """What SGLang has on the device before a step."""
        index = torch.arange(batch).clamp_max(self.requests - 1)
        self.rows, self.lengths = on_gpu(index), on_gpu(torch.tensor([LENGTH] * self.requests + [1] * batch)[:batch])
        self.indices = on_gpu(torch.full((200,), -1, dtype=torch.int32))


@pytest.mark.parametrize("requests", (1, 5))
def test_a_decode_step_plans_over_rows_that_the_device_makes(requests):
    """Two launches a step, also where nothing changed: the lengths grow."""
    with Launches() as seen:
        backend = Backend(Gpu(requests))
        backend.gpu.prefill()
        backend.on_device(requests)
        backend._step = backend._planner.decode(list(backend.gpu.requests))
        step = Counted(seen, backend.update, False, requests)
        assert step.launches == ROWS and (step.up, step.down) == (0, 0) and seen.waits == []
    rows, lengths = backend.planned
    assert isinstance(rows, DenseRows) and lengths.tolist() == [LENGTH - len(VISION)] * requests
    ends = [(i + 1) * (LENGTH - len(VISION)) for i in range(requests)]
    assert values(rows.kv_indptr).tolist() == [0, *ends] and rows.kv_indices.shape == (ends[-1],)
    page = values(backend.gpu.page_table)[0]
    assert values(rows.kv_indices)[: ends[0]].tolist() == [*page[: VISION.start].tolist(), *page[VISION.end :].tolist()]


def test_a_decode_step_in_a_graph(monkeypatch):
    """Five requests in a graph for eight: rows at the graph's own address, tables refilled when the views change."""
    monkeypatch.setattr(flashinfer_backend.FlashInferAttnBackend, "init_forward_metadata_out_graph",
                        lambda self, batch, in_capture=False: self.update(True, batch.batch_size))  # fmt: skip
    with Launches() as seen:
        backend = Backend(Gpu(5))
        backend.gpu.prefill()
        backend._planner.make_graph_tables(8)
        backend.on_device(8)
        states = list(backend.gpu.requests)
        monkeypatch.setattr(flashinfer_backend, "current_states", lambda: states)
        batch = SimpleNamespace(batch_size=8)
        first, second = (Counted(seen, backend.init_forward_metadata_out_graph, batch) for _ in range(2))
        assert second.launches == ROWS and (second.up, second.down) == (0, 0)
        assert set(first.launches) > set(ROWS) and first.up == 2 and seen.waits == []
    rows, lengths = backend.planned
    assert rows.kv_indices is backend.indices and lengths.tolist() == [LENGTH - len(VISION)] * 5 + [1] * 3


def test_a_prefill_through_views(monkeypatch):
    monkeypatch.setattr(flashinfer_backend.FlashInferAttnBackend, "_prepare_dequant_workspace_metadata_for_extend",
                        lambda self, batch, use_ragged=False: None)  # fmt: skip
    with Launches() as seen:
        backend = Backend(Gpu(2))
        backend.gpu.prefill()
        backend.on_device(2)
        backend._step = backend._planner.decode(list(backend.gpu.requests))
        batch = SimpleNamespace(extend_prefix_lens_cpu=[LENGTH - 2, LENGTH - 1], extend_seq_lens_cpu=[2, 1],
                                batch_size=2, req_pool_indices=backend.rows, seq_lens=backend.lengths)  # fmt: skip
        step = Counted(seen, backend._prepare_dequant_workspace_metadata_for_extend, batch)
        assert step.launches == {**ROWS, "sub": 1} and (step.up, step.down) == (0, 0) and seen.waits == []
    assert values(backend.dq_paged_kernel_lens).tolist() == [LENGTH - len(VISION)] * 2
