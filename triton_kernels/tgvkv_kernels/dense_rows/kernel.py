"""Triton kernels of `dense_rows`: row bounds, compact rows. Each output has one writer."""

import triton
import triton.language as tl

from tgvkv_kernels.common.tiles import zero

# Slices of larger tensors, which start at any 4 or 8 bytes: a variant for each alignment would be compiled when the
# first batch has it, in the middle of serving.
ANYWHERE = ["p_pool", "p_seq_lens", "p_hole_start", "p_hole_end", "p_hole_indptr", "p_indices", "p_indptr"]


@triton.jit(do_not_specialize=["B"], do_not_specialize_on_alignment=ANYWHERE)
def row_bounds_kernel(
    p_pool,  # [B]
    p_seq_lens,  # [B]
    p_hole_start,  # [H]
    p_hole_end,  # [H]
    p_hole_indptr,  # [B + 1]
    p_indptr,  # [B + 1] int32
    B,
    BB: tl.constexpr,
):
    """One program: lengths without holes and their running sum."""
    total = zero(tl.int32)
    tl.store(p_indptr, total)
    for start in range(0, B, BB):
        request = start + tl.arange(0, BB)
        m_request = request < B
        first = tl.load(p_hole_indptr + request, mask=m_request, other=0).to(tl.int32)
        holes = tl.load(p_hole_indptr + request + 1, mask=m_request, other=0).to(tl.int32) - first
        length = tl.load(p_seq_lens + request, mask=m_request, other=0).to(tl.int32)  # [BB]
        for i_hole in range(tl.max(holes, axis=0)):
            m_hole = m_request & (i_hole < holes)
            begin = tl.load(p_hole_start + first + i_hole, mask=m_hole, other=0).to(tl.int32)  # [BB]
            end = tl.load(p_hole_end + first + i_hole, mask=m_hole, other=0).to(tl.int32)
            length -= end - begin
        pool = tl.load(p_pool + request, mask=m_request, other=-1)  # [BB]
        length = tl.where(pool >= 0, length, 0)
        tl.store(p_indptr + 1 + request, total + tl.cumsum(length, axis=0), mask=m_request)
        total += tl.sum(length, axis=0)


@triton.jit(do_not_specialize=["s_req"], do_not_specialize_on_alignment=ANYWHERE)
def fill_rows_kernel(
    p_req_to_token,  # [rows, max_len] int32
    p_pool,  # [B]
    p_hole_start,  # [H]
    p_hole_end,  # [H]
    p_hole_indptr,  # [B + 1]
    p_indices,  # [>= total] int32
    p_indptr,  # [B + 1] int32, from row_bounds_kernel
    s_req,
    BN: tl.constexpr,
):
    """Program (b, j): every num_programs(1)-th block of request b's compact row."""
    i_b, i_j = tl.program_id(0), tl.program_id(1)
    pool = tl.load(p_pool + i_b).to(tl.int64)
    first = tl.load(p_hole_indptr + i_b).to(tl.int32)
    last = tl.load(p_hole_indptr + i_b + 1).to(tl.int32)
    row_start = tl.load(p_indptr + i_b)
    length = tl.load(p_indptr + i_b + 1) - row_start
    for start in range(i_j * BN, length, tl.num_programs(1) * BN):
        compact = start + tl.arange(0, BN)
        m_row = compact < length
        position = compact
        for i_hole in range(first, last):  # holes ascend, so each one before the entry shifts it once
            begin = tl.load(p_hole_start + i_hole).to(tl.int32)
            end = tl.load(p_hole_end + i_hole).to(tl.int32)
            position += tl.where(position >= begin, end - begin, 0)
        slot = tl.load(p_req_to_token + pool * s_req + position, mask=m_row, other=0)  # [BN]
        tl.store(p_indices + row_start + compact, slot, mask=m_row)
