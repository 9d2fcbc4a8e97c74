"""What the fake FlashInfer's wrappers share: workspace, compiled module, scores of the coming run, page tables."""

from __future__ import annotations

import math
from typing import Any, List, Optional, Tuple, Union

import torch

from tests.fakes.binding import Arguments
from tests.fakes.planned_attention import (
    Module,
    Scores,
    attend,
    check_indptr,
    check_int32,
    check_planned,
    gather_pages,
    refuse,
)

Pages = Union[torch.Tensor, Tuple[torch.Tensor, torch.Tensor]]
DType = Union[str, torch.dtype]


def _dtype(value: DType) -> torch.dtype:
    return getattr(torch, value) if isinstance(value, str) else value


def host(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().clone()


class Wrapper:
    """What the three wrappers share: workspace, compiled module, scores of the coming ``run()``, checks on q and k."""

    _kv_layout: str
    _causal = False
    _cached_module: Optional[Module]

    def _init(self, a: Arguments) -> None:
        if a.kv_layout not in ("NHD", "HND"):
            raise KeyError(f"Invalid kv_layout {a.kv_layout}")
        self._kv_layout = a.kv_layout
        self._float_workspace_buffer = a.float_workspace_buffer
        self.device = self._float_workspace_buffer.device
        self._int_workspace_buffer = torch.empty(8 * 1024 * 1024, dtype=torch.uint8, device=self.device)
        self._use_cuda_graph = a.use_cuda_graph
        self._backend = a.backend
        self._cached_module = None
        self._max_total_num_rows: Optional[int] = None
        self._fixed_batch_size = 0
        self._custom_mask: Optional[torch.Tensor] = None

    @property
    def is_cuda_graph_enabled(self) -> bool:
        return self._use_cuda_graph

    def reset_workspace_buffer(self, float_workspace_buffer: torch.Tensor, int_workspace_buffer: torch.Tensor) -> None:
        self._float_workspace_buffer = float_workspace_buffer
        self._int_workspace_buffer = int_workspace_buffer

    def end_forward(self) -> None:
        """Deprecated in FlashInfer, no effect."""

    @staticmethod
    def _need_buffers(**buffers: Optional[torch.Tensor]) -> None:
        for name, buffer in buffers.items():
            if not torch.is_tensor(buffer):
                raise ValueError(f"{name} should be a torch.Tensor in cudagraph mode")

    def _check_batch(self, batch_size: int) -> None:
        if self._use_cuda_graph and batch_size != self._fixed_batch_size:
            raise ValueError(
                f"The batch size should be fixed in cudagraph mode, the runtime batch size {batch_size} "
                f" mismatches the batch size set during initialization {self._fixed_batch_size}"
            )

    def _plan_shape(self, a: Arguments, head_dim: int, page_size: int) -> None:
        self._num_qo_heads, self._num_kv_heads = a.num_qo_heads, a.num_kv_heads
        self._head_dim, self._page_size = head_dim, page_size

    def _plan_types(self, a: Arguments, both: Optional[DType] = None) -> None:
        q = a.q_data_type or both
        self._cached_q_data_type = _dtype(q)
        self._cached_kv_data_type = _dtype(a.kv_data_type or both or q)
        self._cached_o_data_type = _dtype(a.o_data_type or q)

    def _plan_scores(self, a: Arguments) -> None:
        refuse(pos_encoding_mode=None if a.pos_encoding_mode == "NONE" else a.pos_encoding_mode)
        self._window_left, self._logits_soft_cap = a.window_left, a.logits_soft_cap
        self._sm_scale, self._rope_scale, self._rope_theta = a.sm_scale, a.rope_scale, a.rope_theta

    def _compile(self) -> None:
        self._cached_module = Module(window=self._window_left >= 0, soft_cap=(self._logits_soft_cap or 0) > 0)

    def _scores(self, head_dim: int, *scales: Optional[float]) -> Scores:
        """The scores of this ``run()``; raises for what the compiled module would ignore."""
        if self._cached_module is None:
            raise RuntimeError("plan() must be called before run()")
        cap = self._logits_soft_cap or 0.0
        for name, value, compiled in (
            ("logits_soft_cap", cap > 0, self._cached_module.soft_cap),
            ("window_left", self._window_left >= 0, self._cached_module.window),
        ):
            if value and not compiled:
                raise ValueError(f"{name} must be given to plan() too: the kernel compiled there would ignore it")
        scale = self._sm_scale if self._sm_scale is not None else 1.0 / math.sqrt(head_dim)
        for factor in scales:
            scale = scale if factor is None else scale * float(factor)
        return Scores(scale, cap, self._causal, self._window_left)

    def _check_heads(self, q: torch.Tensor, k: torch.Tensor, kv_heads: int) -> None:
        for name, tensor, planned in (("q", q, self._cached_q_data_type), ("k", k, self._cached_kv_data_type)):
            if tensor.dtype != planned:
                raise ValueError(f"The dtype of {name} {tensor.dtype} does not match the plan's {planned}.")
        if q.shape[1] > self._num_qo_heads or kv_heads > self._num_kv_heads or q.shape[1] % kv_heads:
            raise ValueError(
                f"{q.shape[1]} query and {kv_heads} kv heads, planned for {self._num_qo_heads} and {self._num_kv_heads}"
            )
        if q.shape[2] != self._head_dim:
            raise ValueError(f"head_dim is {q.shape[2]}, planned for {self._head_dim}")

    def _unpack(self, paged_kv_cache: Pages) -> Tuple[torch.Tensor, torch.Tensor]:
        """K and V as ``[pages, page_size, num_kv_heads, head_dim]``."""
        if torch.is_tensor(paged_kv_cache):
            paged_kv_cache = paged_kv_cache.unbind(dim=1)
        k, v = paged_kv_cache
        token_dim = 1 if self._kv_layout == "NHD" else 2
        k, v = (x.unsqueeze(token_dim) if x.ndim == 3 else x for x in (k, v))
        if self._kv_layout == "HND":
            k, v = k.transpose(1, 2), v.transpose(1, 2)
        if k.shape[1] != self._page_size:
            raise ValueError(f"the cache has pages of {k.shape[1]} tokens, planned for {self._page_size}")
        return k, v

    def _compute(self, q: torch.Tensor, rows: List[int], keys_of: Any, scores: Scores, out_dim: int, dtype: Any) -> Any:
        """Attention request by request; ``keys_of(i)`` gives K and V of request ``i``."""
        out = q.new_zeros(q.shape[0], q.shape[1], out_dim, dtype=dtype)
        lse = q.new_zeros(q.shape[0], q.shape[1], dtype=torch.float32)
        used = 0
        for i, (start, end) in enumerate(zip(rows, rows[1:], strict=False)):
            k, v = keys_of(i)
            mask = None
            if self._custom_mask is not None:
                area = (end - start) * k.shape[0]
                mask = self._custom_mask[used : used + area].view(end - start, k.shape[0])
                used += area
            out[start:end], lse[start:end] = attend(q[start:end], k, v, scores, mask)
        return out, lse

    @staticmethod
    def _deliver(result: Any, v_scale: Any, out: Any, lse: Any, return_lse: bool) -> Any:
        values, sums = result
        if v_scale is not None:
            values = values * float(v_scale)
        for name, given, wanted in (("out", out, values), ("lse", lse if return_lse else None, sums)):
            if given is not None and (given.shape != wanted.shape or given.dtype != wanted.dtype):
                raise ValueError(
                    f"{name} is {tuple(given.shape)} {given.dtype}, not {tuple(wanted.shape)} {wanted.dtype}"
                )
        values = values if out is None else out.copy_(values)
        if not return_lse:
            return values
        return values, (sums if lse is None else lse.copy_(sums))


class PagedWrapper(Wrapper):
    """Indptr, page indices and last page lengths: the wrapper's own buffers, and what the host planned with."""

    def _take_pages(self, indptr: torch.Tensor, indices: torch.Tensor, last_page_len: torch.Tensor) -> None:
        """What ``plan()`` does: copy into the fixed buffers in CUDA-graph mode, else keep the tensors themselves."""
        if self._use_cuda_graph:
            if len(indices) > len(self._paged_kv_indices_buf):
                raise ValueError("The size of indices should be less than or equal to the allocated buffer")
            self._paged_kv_indptr_buf.copy_(indptr)
            self._paged_kv_last_page_len_buf.copy_(last_page_len)
            self._paged_kv_indices_buf[: len(indices)].copy_(indices)
        else:
            self._paged_kv_indptr_buf = indptr.to(self.device)
            self._paged_kv_indices_buf = indices.to(self.device)
            self._paged_kv_last_page_len_buf = last_page_len.to(self.device)

    def _plan_pages(self, indptr_host: torch.Tensor, last_page_len: torch.Tensor) -> None:
        check_int32(indptr=indptr_host, last_page_len=last_page_len)
        self._planned_kv_indptr = host(indptr_host)
        self._planned_last_page_len = host(last_page_len)

    def _run_pages(self, a: Arguments) -> Any:
        """``run()``; ``self._rows(q)`` is the indptr of the queries."""
        scores = self._scores(a.q.shape[-1], a.q_scale, a.k_scale)
        assert a.window_left is None or a.window_left == self._window_left
        k_cache, v_cache = self._unpack(a.paged_kv_cache)
        self._check_heads(a.q, k_cache, k_cache.shape[2])
        keys = self._keys_of(k_cache, v_cache)
        result = self._compute(a.q, self._rows(a.q), keys, scores, v_cache.shape[3], self._cached_o_data_type)
        return self._deliver(result, a.v_scale, a.out, a.lse, a.return_lse)

    def _keys_of(self, k_cache: torch.Tensor, v_cache: torch.Tensor) -> Any:
        """K and V by request, read from the buffers as they are now."""
        indices = self._paged_kv_indices_buf
        check_int32(
            paged_kv_indptr=self._paged_kv_indptr_buf,
            paged_kv_indices=indices,
            paged_kv_last_page_len=self._paged_kv_last_page_len_buf,
        )
        indptr = check_planned("paged_kv_indptr", self._paged_kv_indptr_buf, self._planned_kv_indptr)
        last = check_planned("paged_kv_last_page_len", self._paged_kv_last_page_len_buf, self._planned_last_page_len)
        check_indptr("paged_kv_indptr", indptr, len(indices))

        def keys(i: int) -> Tuple[torch.Tensor, torch.Tensor]:
            pages = indices[indptr[i] : indptr[i + 1]]
            if pages.numel() and not 1 <= last[i] <= self._page_size:
                raise ValueError(f"request {i}: last_page_len {last[i]} with pages of {self._page_size}")
            tokens = (pages.numel() - 1) * self._page_size + last[i] if pages.numel() else 0
            return gather_pages(k_cache, pages, tokens), gather_pages(v_cache, pages, tokens)

        return keys
