"""The fake FlashInfer's prefill: any number of query tokens per request, over pages or over ragged K and V."""

from __future__ import annotations

import functools
from typing import Any, Dict, List, Optional, Tuple

import torch

from tests.fakes.planned_attention import check_indptr, check_int32, check_planned, refuse
from tests.fakes.wrapper_base import DType, PagedWrapper, Pages, Wrapper, host


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

    def _rows(self, q: torch.Tensor) -> List[int]:
        if q.shape[0] != self._qo_indptr_last:
            raise ValueError(f"q.shape[0] ({q.shape[0]}) does not match qo_indptr[-1] ({self._qo_indptr_last}).")
        check_int32(qo_indptr=self._qo_indptr_buf)
        rows = check_planned("qo_indptr", self._qo_indptr_buf, self._planned_qo_indptr)
        check_indptr("qo_indptr", rows, q.shape[0])
        return rows


class BatchPrefillWithPagedKVCacheWrapper(PrefillRows, PagedWrapper):
    """Any number of query tokens per request, aligned with the end of its pages."""

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf: Optional[torch.Tensor] = None,
        paged_kv_indptr_buf: Optional[torch.Tensor] = None,
        paged_kv_indices_buf: Optional[torch.Tensor] = None,
        paged_kv_last_page_len_buf: Optional[torch.Tensor] = None,
        custom_mask_buf: Optional[torch.Tensor] = None,
        mask_indptr_buf: Optional[torch.Tensor] = None,
        backend: str = "auto",
        jit_args: Optional[List[Any]] = None,
        jit_kwargs: Optional[Dict[str, Any]] = None,
    ) -> None:
        unsupported = {"jit_args": jit_args, "custom_mask_buf": custom_mask_buf}
        self._init(float_workspace_buffer, kv_layout, use_cuda_graph, backend, **unsupported)
        if use_cuda_graph:
            self._need_buffers(
                qo_indptr_buf=qo_indptr_buf,
                paged_kv_indptr_buf=paged_kv_indptr_buf,
                paged_kv_indices_buf=paged_kv_indices_buf,
                paged_kv_last_page_len_buf=paged_kv_last_page_len_buf,
            )
            self._fixed_batch_size = len(qo_indptr_buf) - 1
            if len(paged_kv_indptr_buf) != self._fixed_batch_size + 1:
                raise ValueError("The length of paged_kv_indptr_buf should be batch_size + 1.")
            if len(paged_kv_last_page_len_buf) != self._fixed_batch_size:
                raise ValueError("The length of paged_kv_last_page_len_buf should be batch_size.")
        self._qo_indptr_buf = qo_indptr_buf
        self._paged_kv_indptr_buf = paged_kv_indptr_buf
        self._paged_kv_indices_buf = paged_kv_indices_buf
        self._paged_kv_last_page_len_buf = paged_kv_last_page_len_buf

    def plan(
        self,
        qo_indptr: torch.Tensor,
        paged_kv_indptr: torch.Tensor,
        paged_kv_indices: torch.Tensor,
        paged_kv_last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        head_dim_vo: Optional[int] = None,
        custom_mask: Optional[torch.Tensor] = None,
        packed_custom_mask: Optional[torch.Tensor] = None,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        sm_scale: Optional[float] = None,
        window_left: int = -1,
        logits_soft_cap: Optional[float] = None,
        rope_scale: Optional[float] = None,
        rope_theta: Optional[float] = None,
        q_data_type: DType = "float16",
        kv_data_type: Optional[DType] = None,
        o_data_type: Optional[DType] = None,
        non_blocking: bool = True,
        prefix_len_ptr: Optional[torch.Tensor] = None,
        token_pos_in_items_ptr: Optional[torch.Tensor] = None,
        token_pos_in_items_len: int = 0,
        max_item_len_ptr: Optional[torch.Tensor] = None,
        seq_lens: Optional[torch.Tensor] = None,
        seq_lens_q: Optional[torch.Tensor] = None,
        block_tables: Optional[torch.Tensor] = None,
        max_token_per_sequence: Optional[int] = None,
        max_sequence_kv: Optional[int] = None,
        fixed_split_size: Optional[int] = None,
        disable_split_kv: bool = False,
    ) -> None:
        refuse(packed_custom_mask=packed_custom_mask, prefix_len_ptr=prefix_len_ptr, max_item_len_ptr=max_item_len_ptr)
        refuse(token_pos_in_items_ptr=token_pos_in_items_ptr, seq_lens=seq_lens, seq_lens_q=seq_lens_q)
        refuse(block_tables=block_tables, max_token_per_sequence=max_token_per_sequence)
        refuse(max_sequence_kv=max_sequence_kv)
        self._plan_rows(qo_indptr, custom_mask)
        self._take_pages(paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)
        self._plan_pages(host(paged_kv_indptr), paged_kv_last_page_len)
        self._plan_shape(num_qo_heads, num_kv_heads, head_dim_qk, page_size)
        self._plan_types(q_data_type, kv_data_type, o_data_type)
        scales = (sm_scale, rope_scale, rope_theta)
        self._plan_scores(pos_encoding_mode, window_left, logits_soft_cap, *scales, causal, use_fp16_qk_reduction)
        self._compile()

    begin_forward = plan

    def forward(
        self,
        q: torch.Tensor,
        paged_kv_cache: Pages,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        k_scale: Optional[float] = None,
        v_scale: Optional[float] = None,
        window_left: int = -1,
        logits_soft_cap: Optional[float] = None,
        sm_scale: Optional[float] = None,
        rope_scale: Optional[float] = None,
        rope_theta: Optional[float] = None,
    ) -> torch.Tensor:
        scales = (sm_scale, rope_scale, rope_theta)
        self._plan_scores(pos_encoding_mode, window_left, logits_soft_cap, *scales, causal, use_fp16_qk_reduction)
        return self.run(q, paged_kv_cache, k_scale=k_scale, v_scale=v_scale)

    def run(
        self,
        q: torch.Tensor,
        paged_kv_cache: Pages,
        *args: Any,
        q_scale: Any = None,
        k_scale: Any = None,
        v_scale: Any = None,
        out: Optional[torch.Tensor] = None,
        lse: Optional[torch.Tensor] = None,
        return_lse: bool = False,
        enable_pdl: Optional[bool] = None,
        window_left: Optional[int] = None,
        sinks: Optional[torch.Tensor] = None,
        kv_cache_sf: Optional[Pages] = None,
        skip_softmax_threshold_scale_factor: Optional[float] = None,
    ) -> Any:
        refuse(args=args or None, sinks=sinks, kv_cache_sf=kv_cache_sf)
        refuse(skip_softmax_threshold_scale_factor=skip_softmax_threshold_scale_factor)
        scores = self._scores(q.shape[-1], q_scale, k_scale)
        assert window_left is None or window_left == self._window_left
        k_cache, v_cache = self._unpack(paged_kv_cache)
        self._check_heads(q, k_cache, k_cache.shape[2])
        keys = self._keys_of(k_cache, v_cache)
        result = self._compute(q, self._rows(q), keys, scores, v_cache.shape[3], self._cached_o_data_type)
        return self._deliver(result, v_scale, out, lse, return_lse)

    run_return_lse = functools.partialmethod(run, return_lse=True)

    def forward_return_lse(
        self,
        q: torch.Tensor,
        paged_kv_cache: Pages,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        k_scale: Optional[float] = None,
        v_scale: Optional[float] = None,
        window_left: int = -1,
        logits_soft_cap: Optional[float] = None,
        sm_scale: Optional[float] = None,
        rope_scale: Optional[float] = None,
        rope_theta: Optional[float] = None,
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        scales = (sm_scale, rope_scale, rope_theta)
        self._plan_scores(pos_encoding_mode, window_left, logits_soft_cap, *scales, causal, use_fp16_qk_reduction)
        return self.run_return_lse(q, paged_kv_cache, k_scale=k_scale, v_scale=v_scale)


class BatchPrefillWithRaggedKVCacheWrapper(PrefillRows):
    """Any number of query tokens per request over K and V that lie packed one request after the other."""

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf: Optional[torch.Tensor] = None,
        kv_indptr_buf: Optional[torch.Tensor] = None,
        custom_mask_buf: Optional[torch.Tensor] = None,
        mask_indptr_buf: Optional[torch.Tensor] = None,
        backend: str = "auto",
        jit_args: Optional[List[Any]] = None,
        jit_kwargs: Optional[Dict[str, Any]] = None,
    ) -> None:
        unsupported = {"jit_args": jit_args, "custom_mask_buf": custom_mask_buf}
        self._init(float_workspace_buffer, kv_layout, use_cuda_graph, backend, **unsupported)
        refuse(HND_layout=kv_layout == "HND")
        if use_cuda_graph:
            self._need_buffers(qo_indptr_buf=qo_indptr_buf, kv_indptr_buf=kv_indptr_buf)
            self._fixed_batch_size = len(qo_indptr_buf) - 1
            if len(kv_indptr_buf) != self._fixed_batch_size + 1:
                raise ValueError("The length of kv_indptr_buf should be the same as qo_indptr_buf.")
        self._qo_indptr_buf = qo_indptr_buf
        self._kv_indptr_buf = kv_indptr_buf

    def plan(
        self,
        qo_indptr: torch.Tensor,
        kv_indptr: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        head_dim_vo: Optional[int] = None,
        custom_mask: Optional[torch.Tensor] = None,
        packed_custom_mask: Optional[torch.Tensor] = None,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        window_left: int = -1,
        logits_soft_cap: Optional[float] = None,
        sm_scale: Optional[float] = None,
        rope_scale: Optional[float] = None,
        rope_theta: Optional[float] = None,
        q_data_type: DType = "float16",
        kv_data_type: Optional[DType] = None,
        o_data_type: Optional[DType] = None,
        non_blocking: bool = True,
        prefix_len_ptr: Optional[torch.Tensor] = None,
        token_pos_in_items_ptr: Optional[torch.Tensor] = None,
        token_pos_in_items_len: int = 0,
        max_item_len_ptr: Optional[torch.Tensor] = None,
        fixed_split_size: Optional[int] = None,
        disable_split_kv: bool = False,
        seq_lens: Optional[torch.Tensor] = None,
        seq_lens_q: Optional[torch.Tensor] = None,
        max_token_per_sequence: Optional[int] = None,
        max_sequence_kv: Optional[int] = None,
        v_indptr: Optional[torch.Tensor] = None,
        o_indptr: Optional[torch.Tensor] = None,
    ) -> None:
        refuse(packed_custom_mask=packed_custom_mask, prefix_len_ptr=prefix_len_ptr, max_item_len_ptr=max_item_len_ptr)
        refuse(token_pos_in_items_ptr=token_pos_in_items_ptr, seq_lens=seq_lens, seq_lens_q=seq_lens_q)
        refuse(max_token_per_sequence=max_token_per_sequence, max_sequence_kv=max_sequence_kv)
        refuse(v_indptr=v_indptr, o_indptr=o_indptr)
        if len(kv_indptr) != len(qo_indptr):
            raise ValueError("The kv_indptr length should be equal to mask_indptr length.")
        self._plan_rows(qo_indptr, custom_mask)
        if self._use_cuda_graph:
            self._kv_indptr_buf.copy_(kv_indptr)
        else:
            self._kv_indptr_buf = kv_indptr.to(self.device)
        self._planned_kv_indptr = host(kv_indptr)
        self._plan_shape(num_qo_heads, num_kv_heads, head_dim_qk, 1)
        self._plan_types(q_data_type, kv_data_type, o_data_type)
        scales = (sm_scale, rope_scale, rope_theta)
        self._plan_scores(pos_encoding_mode, window_left, logits_soft_cap, *scales, causal, use_fp16_qk_reduction)
        self._compile()

    begin_forward = plan

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        window_left: int = -1,
        logits_soft_cap: Optional[float] = None,
        sm_scale: Optional[float] = None,
        rope_scale: Optional[float] = None,
        rope_theta: Optional[float] = None,
    ) -> torch.Tensor:
        scales = (sm_scale, rope_scale, rope_theta)
        self._plan_scores(pos_encoding_mode, window_left, logits_soft_cap, *scales, causal, use_fp16_qk_reduction)
        return self.run(q, k, v)

    def run(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *args: Any,
        q_scale: Optional[float] = None,
        k_scale: Optional[float] = None,
        v_scale: Optional[float] = None,
        o_scale: Optional[float] = None,
        out: Optional[torch.Tensor] = None,
        lse: Optional[torch.Tensor] = None,
        return_lse: bool = False,
        enable_pdl: Optional[bool] = None,
        kv_cache_sf: Optional[Pages] = None,
    ) -> Any:
        refuse(args=args or None, q_scale=q_scale, k_scale=k_scale, v_scale=v_scale, o_scale=o_scale)
        refuse(kv_cache_sf=kv_cache_sf)
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
        return self._deliver(result, None, out, lse, return_lse)

    run_return_lse = functools.partialmethod(run, return_lse=True)

    def forward_return_lse(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        window_left: int = -1,
        logits_soft_cap: Optional[float] = None,
        sm_scale: Optional[float] = None,
        rope_scale: Optional[float] = None,
        rope_theta: Optional[float] = None,
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        scales = (sm_scale, rope_scale, rope_theta)
        self._plan_scores(pos_encoding_mode, window_left, logits_soft_cap, *scales, causal, use_fp16_qk_reduction)
        return self.run_return_lse(q, k, v)
