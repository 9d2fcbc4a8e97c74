"""The fake FlashInfer's prefill: any number of query tokens per request, over pages or over ragged K and V."""

from __future__ import annotations

import functools
from typing import Any, List, Optional

import flashinfer
import torch

from tests.fakes.binding import Arguments, bound
from tests.fakes.planned_attention import check_indptr, check_int32, check_planned, refuse
from tests.fakes.wrapper_base import PagedWrapper, Wrapper, host

paged, ragged = flashinfer.BatchPrefillWithPagedKVCacheWrapper, flashinfer.BatchPrefillWithRaggedKVCacheWrapper
# How a plan is made and split, and a size that v has anyway; not what is computed.
SCHEDULING = ("non_blocking", "fixed_split_size", "disable_split_kv", "head_dim_vo")


class PrefillRows(Wrapper):
    """Which query tokens belong to which request."""

    def _plan_rows(self, qo_indptr: torch.Tensor, custom_mask: Optional[torch.Tensor]) -> None:
        if self._use_cuda_graph:
            refuse(custom_mask_in_cuda_graph_mode=custom_mask)
        planned = host(qo_indptr)
        check_int32(qo_indptr=planned)
        self._check_rows(int(planned[-1]))
        self._check_batch(len(planned) - 1)
        if self._use_cuda_graph:
            self._qo_indptr_buf.copy_(qo_indptr)
        else:
            self._qo_indptr_buf = qo_indptr.to(self.device)
        self._planned_qo_indptr = planned
        self._custom_mask = None if custom_mask is None else custom_mask.reshape(-1).bool()

    def _check_rows(self, rows: int) -> None:
        self._qo_indptr_last = rows
        if not self._use_cuda_graph:
            return
        if self._max_total_num_rows is None:
            self._max_total_num_rows = rows
        elif rows > self._max_total_num_rows:
            raise ValueError(
                f"The total number of rows in qo_indptr {rows} in cuda graph mode cannot exceed the number of rows "
                f"set during initialization {self._max_total_num_rows}."
            )

    def _plan_queries(self, a: Arguments) -> None:
        """:meth:`_plan_scores` of prefill, which may be causal."""
        self._causal = a.causal
        self._plan_scores(a)

    def _rows(self, q: torch.Tensor) -> List[int]:
        if q.shape[0] != self._qo_indptr_last:
            raise ValueError(f"q.shape[0] ({q.shape[0]}) does not match qo_indptr[-1] ({self._qo_indptr_last}).")
        check_int32(qo_indptr=self._qo_indptr_buf)
        rows = check_planned("qo_indptr", self._qo_indptr_buf, self._planned_qo_indptr)
        check_indptr("qo_indptr", rows, q.shape[0])
        return rows


class BatchPrefillWithPagedKVCacheWrapper(PrefillRows, PagedWrapper):
    """Any number of query tokens per request, aligned with the end of its pages."""

    @bound(paged.__init__)
    def __init__(self, a: Arguments) -> None:
        self._init(a)
        self._qo_indptr_buf = a.qo_indptr_buf
        self._paged_kv_indptr_buf = a.paged_kv_indptr_buf
        self._paged_kv_indices_buf = a.paged_kv_indices_buf
        self._paged_kv_last_page_len_buf = a.paged_kv_last_page_len_buf
        if self._use_cuda_graph:
            self._need_buffers(
                qo_indptr_buf=self._qo_indptr_buf,
                paged_kv_indptr_buf=self._paged_kv_indptr_buf,
                paged_kv_indices_buf=self._paged_kv_indices_buf,
                paged_kv_last_page_len_buf=self._paged_kv_last_page_len_buf,
            )
            self._fixed_batch_size = len(self._qo_indptr_buf) - 1
            if len(self._paged_kv_indptr_buf) != self._fixed_batch_size + 1:
                raise ValueError("The length of paged_kv_indptr_buf should be batch_size + 1.")
            if len(self._paged_kv_last_page_len_buf) != self._fixed_batch_size:
                raise ValueError("The length of paged_kv_last_page_len_buf should be batch_size.")

    @bound(paged.plan, *SCHEDULING)
    def plan(self, a: Arguments) -> None:
        self._plan_rows(a.qo_indptr, a.custom_mask)
        self._take_pages(a.paged_kv_indptr, a.paged_kv_indices, a.paged_kv_last_page_len)
        self._plan_pages(host(a.paged_kv_indptr), a.paged_kv_last_page_len)
        self._plan_shape(a, a.head_dim_qk, a.page_size)
        self._plan_types(a)
        self._plan_queries(a)
        self._compile()

    begin_forward = plan

    @bound(paged.run, "enable_pdl")
    def run(self, a: Arguments) -> Any:
        return self._run_pages(a)

    run_return_lse = functools.partialmethod(run, return_lse=True)

    @bound(paged.forward)
    def forward(self, a: Arguments) -> Any:
        self._plan_queries(a)
        return self.run(a.q, a.paged_kv_cache, k_scale=a.k_scale, v_scale=a.v_scale)

    @bound(paged.forward_return_lse)
    def forward_return_lse(self, a: Arguments) -> Any:
        self._plan_queries(a)
        return self.run_return_lse(a.q, a.paged_kv_cache, k_scale=a.k_scale, v_scale=a.v_scale)


class BatchPrefillWithRaggedKVCacheWrapper(PrefillRows):
    """Any number of query tokens per request over K and V that lie packed one request after the other."""

    @bound(ragged.__init__)
    def __init__(self, a: Arguments) -> None:
        self._init(a)
        refuse(HND_layout=self._kv_layout == "HND")
        self._qo_indptr_buf, self._kv_indptr_buf = a.qo_indptr_buf, a.kv_indptr_buf
        if self._use_cuda_graph:
            self._need_buffers(qo_indptr_buf=self._qo_indptr_buf, kv_indptr_buf=self._kv_indptr_buf)
            self._fixed_batch_size = len(self._qo_indptr_buf) - 1
            if len(self._kv_indptr_buf) != self._fixed_batch_size + 1:
                raise ValueError("The length of kv_indptr_buf should be the same as qo_indptr_buf.")

    @bound(ragged.plan, *SCHEDULING)
    def plan(self, a: Arguments) -> None:
        if len(a.kv_indptr) != len(a.qo_indptr):
            raise ValueError("The kv_indptr length should be equal to mask_indptr length.")
        self._plan_rows(a.qo_indptr, a.custom_mask)
        if self._use_cuda_graph:
            self._kv_indptr_buf.copy_(a.kv_indptr)
        else:
            self._kv_indptr_buf = a.kv_indptr.to(self.device)
        self._planned_kv_indptr = host(a.kv_indptr)
        self._plan_shape(a, a.head_dim_qk, 1)
        self._plan_types(a)
        self._plan_queries(a)
        self._compile()

    begin_forward = plan

    @bound(ragged.run, "enable_pdl")
    def run(self, a: Arguments) -> Any:
        q, k, v = a.q, a.k, a.v
        scores = self._scores(q.shape[-1])
        self._check_heads(q, k, k.shape[1])
        check_int32(kv_indptr=self._kv_indptr_buf)
        indptr = check_planned("kv_indptr", self._kv_indptr_buf, self._planned_kv_indptr)
        check_indptr("kv_indptr", indptr, k.shape[0])
        result = self._compute(
            q,
            self._rows(q),
            lambda i: (k[indptr[i] : indptr[i + 1]], v[indptr[i] : indptr[i + 1]]),
            scores,
            v.shape[2],
            q.dtype,
        )
        return self._deliver(result, None, a.out, a.lse, a.return_lse)

    run_return_lse = functools.partialmethod(run, return_lse=True)

    @bound(ragged.forward)
    def forward(self, a: Arguments) -> Any:
        self._plan_queries(a)
        return self.run(a.q, a.k, a.v)

    @bound(ragged.forward_return_lse)
    def forward_return_lse(self, a: Arguments) -> Any:
        self._plan_queries(a)
        return self.run_return_lse(a.q, a.k, a.v)
