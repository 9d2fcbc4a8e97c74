"""The fake FlashInfer's decode: one query token per request, ``plan()`` and ``fast_decode_plan``.

With ``use_tensor_cores`` the real one plans and runs its prefill kernel, over a table of query rows of its own.
"""

from __future__ import annotations

import functools
from typing import Any

import flashinfer
import torch

from tests.fakes.binding import Arguments, bound
from tests.fakes.planned_attention import check_int32, check_planned, check_same_buffer
from tests.fakes.wrapper_base import PagedWrapper, host

real = flashinfer.BatchDecodeWithPagedKVCacheWrapper
SCHEDULING = ("non_blocking", "disable_split_kv")
"""How a plan is made and split; not what is computed."""


class BatchDecodeWithPagedKVCacheWrapper(PagedWrapper):
    """One query token per request over its pages."""

    @bound(real.__init__)
    def __init__(self, a: Arguments) -> None:
        self._init(a)
        self._paged_kv_indptr_buf = a.paged_kv_indptr_buffer
        self._paged_kv_indices_buf = a.paged_kv_indices_buffer
        self._paged_kv_last_page_len_buf = a.paged_kv_last_page_len_buffer
        self._use_tensor_cores = a.use_tensor_cores
        if self._use_cuda_graph:
            self._need_buffers(
                paged_kv_indptr_buffer=self._paged_kv_indptr_buf,
                paged_kv_indices_buffer=self._paged_kv_indices_buf,
                paged_kv_last_page_len_buffer=self._paged_kv_last_page_len_buf,
            )
            self._fixed_batch_size = len(self._paged_kv_last_page_len_buf)
            if len(self._paged_kv_indptr_buf) != self._fixed_batch_size + 1:
                raise ValueError("The size of paged_kv_indptr_buffer should be batch_size + 1")
            if self._use_tensor_cores:
                self._qo_indptr_buf = self._one_row_each(self._fixed_batch_size)

    def _one_row_each(self, batch_size: int) -> torch.Tensor:
        """Where the tensor-core kernel finds the query rows of each request."""
        return torch.arange(batch_size + 1, dtype=torch.int32, device=self.device)

    @property
    def use_tensor_cores(self) -> bool:
        return self._use_tensor_cores

    @bound(real._plan_impl, *SCHEDULING)
    def plan(self, a: Arguments) -> None:
        """The real one hands ``**kwargs`` on to ``_plan_impl``, whose keywords these are."""
        if a.fixed_split_size is not None and not self.use_tensor_cores:
            raise ValueError("fixed_split_size is only supported by tensor core decode for now.")
        self._check_batch(len(a.last_page_len))
        self._take_pages(a.indptr, a.indices, a.last_page_len)
        if not self._use_cuda_graph:
            self._qo_indptr_buf = self._one_row_each(len(a.last_page_len))
        self._plan_pages(host(a.indptr), a.last_page_len)
        self._plan_shape(a, a.head_dim, a.page_size)
        self._plan_types(a, both=a.data_type)
        self._plan_scores(a)
        self._compile()
        if self.use_tensor_cores and self._backend == "auto":
            self._backend = "fa2"

    begin_forward = plan

    def _rows(self, q: torch.Tensor) -> list[int]:
        batch_size = len(self._paged_kv_last_page_len_buf)
        if q.shape[0] != batch_size:
            raise ValueError(f"q.shape[0] ({q.shape[0]}) is not the batch size ({batch_size})")
        if not self.use_tensor_cores:
            return list(range(batch_size + 1))
        check_int32(qo_indptr=self._qo_indptr_buf)
        return check_planned("qo_indptr", self._qo_indptr_buf, self._one_row_each(batch_size))

    @bound(real.run, "enable_pdl")
    def run(self, a: Arguments) -> Any:
        return self._run_pages(a)

    run_return_lse = functools.partialmethod(run, return_lse=True)

    @bound(real.forward)
    def forward(self, a: Arguments) -> Any:
        self._plan_scores(a)
        return self.run(a.q, a.paged_kv_cache, q_scale=a.q_scale, k_scale=a.k_scale, v_scale=a.v_scale)

    @bound(real.forward_return_lse)
    def forward_return_lse(self, a: Arguments) -> Any:
        self._plan_scores(a)
        scales = {"q_scale": a.q_scale, "k_scale": a.k_scale, "v_scale": a.v_scale}
        return self.run(a.q, a.paged_kv_cache, **scales, return_lse=True)


@bound(flashinfer.fast_decode_plan, *SCHEDULING, "fixed_split_size", "q_data_type", "kv_data_type", "data_type")
def fast_decode_plan(self: BatchDecodeWithPagedKVCacheWrapper, a: Arguments) -> None:
    """Plan on the host only: nothing is copied into the buffers, and the kernel stays the one of the last ``plan()``.

    The plan is made for ``global_override_indptr_cpu`` if given, else for ``indptr``.
    """
    self._check_batch(len(a.last_page_len))
    if self._use_cuda_graph:
        if len(a.indices) > len(self._paged_kv_indices_buf):
            raise ValueError("The size of indices should be less than or equal to the allocated buffer")
        check_same_buffer("indptr", a.indptr, self._paged_kv_indptr_buf)
        check_same_buffer("indices", a.indices, self._paged_kv_indices_buf)
        check_same_buffer("last_page_len", a.last_page_len, self._paged_kv_last_page_len_buf)
    else:
        self._paged_kv_indptr_buf, self._paged_kv_indices_buf = a.indptr, a.indices
        self._paged_kv_last_page_len_buf = a.last_page_len
        if self.use_tensor_cores:
            self._qo_indptr_buf = self._one_row_each(len(a.last_page_len))
    if self._cached_module is None:
        raise RuntimeError("Error in standard plan: fast_decode_plan needs the module of an earlier plan()")
    ones = torch.ones(len(a.last_page_len), dtype=torch.int32)
    planned = a.global_override_indptr_cpu
    self._plan_pages(host(a.indptr) if planned is None else planned, ones if a.page_size == 1 else a.last_page_len)
    self._plan_shape(a, a.head_dim, a.page_size)
    self._plan_scores(a)
