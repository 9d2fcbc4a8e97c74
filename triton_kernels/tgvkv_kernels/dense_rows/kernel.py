"""Triton kernels of `dense_rows`: row bounds, compact rows, one-slot append. Each output has one writer."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["B"])
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
    total = B * 0
    tl.store(p_indptr, total)
    for start in range(0, B, BB):
        request = start + tl.arange(0, BB)
        m_request = request < B
        first = tl.load(p_hole_indptr + request, mask=m_request, other=0).to(tl.int32)
        holes = tl.load(p_hole_indptr + request + 1, mask=m_request, other=0).to(tl.int32) - first
        length = tl.load(p_seq_lens + request, mask=m_request, other=0).to(tl.int32)
        for i_hole in range(tl.max(holes, axis=0)):
            m_hole = m_request & (i_hole < holes)
            begin = tl.load(p_hole_start + first + i_hole, mask=m_hole, other=0).to(tl.int32)
            end = tl.load(p_hole_end + first + i_hole, mask=m_hole, other=0).to(tl.int32)
            length -= end - begin
        pool = tl.load(p_pool + request, mask=m_request, other=-1)
        length = tl.where(pool >= 0, length, 0)
        tl.store(p_indptr + 1 + request, total + tl.cumsum(length, axis=0), mask=m_request)
        total += tl.sum(length, axis=0)


@triton.jit
def fill_rows_kernel(
    p_req_to_token,  # [rows, max_len] int32
    p_pool,  # [B]
    p_seq_lens,  # [B]
    p_hole_start,  # [H]
    p_hole_end,  # [H]
    p_hole_indptr,  # [B + 1]
    p_target,  # TABLE: [rows, width]; else kv_indices
    p_place,  # TABLE: table row of each request; else kv_indptr
    p_row_lens,  # TABLE: [rows] int32; else unused
    s_req,
    s_target,
    BN: tl.constexpr,
    TABLE: tl.constexpr,
):
    """Program (b, j): every num_programs(1)-th block of request b's compact row."""
    i_b, i_j = tl.program_id(0), tl.program_id(1)
    pool = tl.load(p_pool + i_b).to(tl.int64)
    first = tl.load(p_hole_indptr + i_b).to(tl.int32)
    last = tl.load(p_hole_indptr + i_b + 1).to(tl.int32)
    length = tl.load(p_seq_lens + i_b).to(tl.int32)
    for i_hole in range(first, last):
        length -= tl.load(p_hole_end + i_hole).to(tl.int32) - tl.load(p_hole_start + i_hole).to(tl.int32)
    length = tl.where(pool >= 0, length, 0)
    place = tl.load(p_place + i_b).to(tl.int64)
    if TABLE:
        p_row = p_target + place * s_target
        if (i_j == 0) & (place >= 0):
            tl.store(p_row_lens + place, length)
        length = tl.where(place >= 0, length, 0)
    else:
        p_row = p_target + place
    for start in range(i_j * BN, length, tl.num_programs(1) * BN):
        compact = start + tl.arange(0, BN)
        m_row = compact < length
        position = compact
        for i_hole in range(first, last):  # holes ascend, so each one before the entry shifts it once
            begin = tl.load(p_hole_start + i_hole).to(tl.int32)
            end = tl.load(p_hole_end + i_hole).to(tl.int32)
            position += tl.where(position >= begin, end - begin, 0)
        slot = tl.load(p_req_to_token + pool * s_req + position, mask=m_row, other=0)
        tl.store(p_row + compact, slot, mask=m_row)


@triton.jit(do_not_specialize=["B"])
def extend_rows_kernel(
    p_table,  # [rows, width] int32
    p_row_lens,  # [rows] int32
    p_rows,  # [B]
    p_slots,  # [B]
    B,
    s_table,
    BB: tl.constexpr,
):
    index = tl.program_id(0) * BB + tl.arange(0, BB)
    row = tl.load(p_rows + index, mask=index < B, other=-1).to(tl.int64)
    m_row = row >= 0
    length = tl.load(p_row_lens + row, mask=m_row, other=0)
    slot = tl.load(p_slots + index, mask=m_row, other=0).to(tl.int32)
    tl.store(p_table + row * s_table + length, slot, mask=m_row)
    tl.store(p_row_lens + row, length + 1, mask=m_row)
