"""The fake FlashInfer's decode: one query token per request, ``plan()`` and ``fast_decode_plan``."""

from __future__ import annotations

import functools
from typing import Any, List, Optional, Tuple

import torch

from tests.fakes.planned_attention import check_same_buffer, refuse
from tests.fakes.wrapper_base import DType, PagedWrapper, Pages, host


class BatchDecodeWithPagedKVCacheWrapper(PagedWrapper):
    """One query token per request over its pages."""

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        use_tensor_cores: bool = False,
        paged_kv_indptr_buffer: Optional[torch.Tensor] = None,
        paged_kv_indices_buffer: Optional[torch.Tensor] = None,
        paged_kv_last_page_len_buffer: Optional[torch.Tensor] = None,
        backend: str = "auto",
        jit_args: Optional[List[Any]] = None,
    ) -> None:
        self._init(float_workspace_buffer, kv_layout, use_cuda_graph, backend, jit_args=jit_args)
        if use_cuda_graph:
            self._need_buffers(
                paged_kv_indptr_buffer=paged_kv_indptr_buffer,
                paged_kv_indices_buffer=paged_kv_indices_buffer,
                paged_kv_last_page_len_buffer=paged_kv_last_page_len_buffer,
            )
            self._fixed_batch_size = len(paged_kv_last_page_len_buffer)
            if len(paged_kv_indptr_buffer) != self._fixed_batch_size + 1:
                raise ValueError("The size of paged_kv_indptr_buffer should be batch_size + 1")
        self._paged_kv_indptr_buf = paged_kv_indptr_buffer
        self._paged_kv_indices_buf = paged_kv_indices_buffer
        self._paged_kv_last_page_len_buf = paged_kv_last_page_len_buffer
        self._use_tensor_cores = use_tensor_cores

    @property
    def use_tensor_cores(self) -> bool:
        return self._use_tensor_cores

    def plan(
        self,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        *deprecated_positional_args: Any,
        **kwargs: Any,
    ) -> None:
        refuse(positional_arguments_after_page_size=deprecated_positional_args or None)
        self._plan_impl(indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size, **kwargs)

    def _plan_impl(
        self,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        *,
        pos_encoding_mode: str = "NONE",
        window_left: int = -1,
        window_right: int = 0,
        logits_soft_cap: Optional[float] = None,
        q_data_type: Optional[DType] = "float16",
        kv_data_type: Optional[DType] = None,
        o_data_type: Optional[DType] = None,
        data_type: Optional[DType] = None,
        sm_scale: Optional[float] = None,
        rope_scale: Optional[float] = None,
        rope_theta: Optional[float] = None,
        non_blocking: bool = True,
        block_tables: Optional[torch.Tensor] = None,
        seq_lens: Optional[torch.Tensor] = None,
        fixed_split_size: Optional[int] = None,
        disable_split_kv: bool = False,
        q_len_per_req: int = 1,
    ) -> None:
        refuse(window_right=window_right or None, block_tables=block_tables, seq_lens=seq_lens)
        refuse(q_len_per_req=None if q_len_per_req == 1 else q_len_per_req)
        if fixed_split_size is not None and not self.use_tensor_cores:
            raise ValueError("fixed_split_size is only supported by tensor core decode for now.")
        self._check_batch(len(last_page_len))
        self._take_pages(indptr, indices, last_page_len)
        self._plan_pages(host(indptr), last_page_len)
        self._plan_shape(num_qo_heads, num_kv_heads, head_dim, page_size)
        self._plan_types(q_data_type or data_type, kv_data_type or data_type, o_data_type)
        self._plan_scores(pos_encoding_mode, window_left, logits_soft_cap, sm_scale, rope_scale, rope_theta)
        self._compile()

    begin_forward = plan

    def forward(
        self,
        q: torch.Tensor,
        paged_kv_cache: Pages,
        pos_encoding_mode: str = "NONE",
        q_scale: Optional[float] = None,
        k_scale: Optional[float] = None,
        v_scale: Optional[float] = None,
        window_left: int = -1,
        logits_soft_cap: Optional[float] = None,
        sm_scale: Optional[float] = None,
        rope_scale: Optional[float] = None,
        rope_theta: Optional[float] = None,
    ) -> torch.Tensor:
        self._plan_scores(pos_encoding_mode, window_left, logits_soft_cap, sm_scale, rope_scale, rope_theta)
        return self.run(q, paged_kv_cache, q_scale=q_scale, k_scale=k_scale, v_scale=v_scale)

    def run(
        self,
        q: torch.Tensor,
        paged_kv_cache: Pages,
        *args: Any,
        q_scale: Optional[float] = None,
        k_scale: Optional[float] = None,
        v_scale: Optional[float] = None,
        out: Optional[torch.Tensor] = None,
        lse: Optional[torch.Tensor] = None,
        return_lse: bool = False,
        enable_pdl: Optional[bool] = None,
        window_left: Optional[int] = None,
        sinks: Optional[torch.Tensor] = None,
        q_len_per_req: Optional[int] = None,
        skip_softmax_threshold_scale_factor: Optional[float] = None,
        kv_cache_sf: Optional[Pages] = None,
    ) -> Any:
        refuse(args=args or None, sinks=sinks, q_len_per_req=q_len_per_req, kv_cache_sf=kv_cache_sf)
        refuse(skip_softmax_threshold_scale_factor=skip_softmax_threshold_scale_factor)
        scores = self._scores(q.shape[-1], q_scale, k_scale)
        assert window_left is None or window_left == self._window_left
        k_cache, v_cache = self._unpack(paged_kv_cache)
        self._check_heads(q, k_cache, k_cache.shape[2])
        batch_size = len(self._paged_kv_last_page_len_buf)
        if q.shape[0] != batch_size:
            raise ValueError(f"q.shape[0] ({q.shape[0]}) is not the batch size ({batch_size})")
        keys = self._keys_of(k_cache, v_cache)
        rows = list(range(batch_size + 1))
        result = self._compute(q, rows, keys, scores, v_cache.shape[3], self._cached_o_data_type)
        return self._deliver(result, v_scale, out, lse, return_lse)

    def forward_return_lse(
        self,
        q: torch.Tensor,
        paged_kv_cache: torch.Tensor,
        pos_encoding_mode: str = "NONE",
        q_scale: Optional[float] = None,
        k_scale: Optional[float] = None,
        v_scale: Optional[float] = None,
        window_left: int = -1,
        logits_soft_cap: Optional[float] = None,
        sm_scale: Optional[float] = None,
        rope_scale: Optional[float] = None,
        rope_theta: Optional[float] = None,
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        self._plan_scores(pos_encoding_mode, window_left, logits_soft_cap, sm_scale, rope_scale, rope_theta)
        return self.run(q, paged_kv_cache, q_scale=q_scale, k_scale=k_scale, v_scale=v_scale, return_lse=True)

    run_return_lse = functools.partialmethod(run, return_lse=True)


def fast_decode_plan(
    self: BatchDecodeWithPagedKVCacheWrapper,
    indptr: torch.Tensor,
    indices: torch.Tensor,
    last_page_len: torch.Tensor,
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim: int,
    page_size: int,
    pos_encoding_mode: str = "NONE",
    window_left: int = -1,
    logits_soft_cap: Optional[float] = None,
    q_data_type: Optional[DType] = None,
    kv_data_type: Optional[DType] = None,
    data_type: Optional[DType] = None,
    sm_scale: Optional[float] = None,
    rope_scale: Optional[float] = None,
    rope_theta: Optional[float] = None,
    non_blocking: bool = True,
    fixed_split_size: Optional[int] = None,
    disable_split_kv: bool = False,
    global_override_indptr_cpu: Optional[torch.Tensor] = None,
) -> None:
    """Plan on the host only: nothing is copied into the buffers, and the kernel stays the one of the last ``plan()``.

    The plan is made for ``global_override_indptr_cpu`` if given, else for ``indptr``.
    """
    self._check_batch(len(last_page_len))
    if self._use_cuda_graph:
        if len(indices) > len(self._paged_kv_indices_buf):
            raise ValueError("The size of indices should be less than or equal to the allocated buffer")
        check_same_buffer("indptr", indptr, self._paged_kv_indptr_buf)
        check_same_buffer("indices", indices, self._paged_kv_indices_buf)
        check_same_buffer("last_page_len", last_page_len, self._paged_kv_last_page_len_buf)
    else:
        self._paged_kv_indptr_buf, self._paged_kv_indices_buf = indptr, indices
        self._paged_kv_last_page_len_buf = last_page_len
    if self._cached_module is None:
        raise RuntimeError("Error in standard plan: fast_decode_plan needs the module of an earlier plan()")
    ones = torch.ones(len(last_page_len), dtype=torch.int32)
    self._plan_pages(
        host(indptr) if global_override_indptr_cpu is None else global_override_indptr_cpu,
        ones if page_size == 1 else last_page_len,
    )
    self._plan_shape(num_qo_heads, num_kv_heads, head_dim, page_size)
    self._plan_scores(pos_encoding_mode, window_left, logits_soft_cap, sm_scale, rope_scale, rope_theta)
