"""Triton kernels of `view_attention`: attention over paged units, merged into the dense part's output and LSE.

Decode (`view_decode_kernel`, `view_merge_kernel`): a piece of work is one chunk of one request's units. Where the
chunks end depends on the request's own units alone, so a result has the same bits in every batch. Prefill
(`view_prefill_kernel`): a tile of query rows walks its requests' units from first to last.
"""

import triton
import triton.language as tl

from tgvkv_kernels.common.tiles import load_flat_rows, load_queries, zero


@triton.jit
def chunk_length(units, CHUNK: tl.constexpr, MAX_CHUNKS: tl.constexpr):
    """Units per chunk of a request with so many: the least multiple of CHUNK that leaves at most MAX_CHUNKS."""
    return tl.maximum(tl.cdiv(tl.cdiv(units, MAX_CHUNKS), CHUNK), 1) * CHUNK


@triton.jit
def block_chunks(p_indptr, request, B, CHUNK: tl.constexpr, MAX_CHUNKS: tl.constexpr):
    """Chunks of each of a block of requests, ``[BB]`` int32; 0 past the batch."""
    m_request = request < B
    begin = tl.load(p_indptr + request, mask=m_request, other=0).to(tl.int32)  # [BB]
    end = tl.load(p_indptr + request + 1, mask=m_request, other=0).to(tl.int32)  # [BB]
    return tl.cdiv(end - begin, chunk_length(end - begin, CHUNK, MAX_CHUNKS))


@triton.jit
def count_chunks(p_indptr, B, BB: tl.constexpr, CHUNK: tl.constexpr, MAX_CHUNKS: tl.constexpr):
    """Chunks of all B requests."""
    total = zero(tl.int32)
    for start in range(0, B, BB):
        total += tl.sum(block_chunks(p_indptr, start + tl.arange(0, BB), B, CHUNK, MAX_CHUNKS), axis=0)
    return total


@triton.jit
def find_chunk(item, p_indptr, B, BB: tl.constexpr, CHUNK: tl.constexpr, MAX_CHUNKS: tl.constexpr):
    """Request and chunk within it of the ``item``-th chunk, counted request by request."""
    i_request, first, total = zero(tl.int32), zero(tl.int32), zero(tl.int32)
    for start in range(0, B, BB):
        request = start + tl.arange(0, BB)
        chunks = block_chunks(p_indptr, request, B, CHUNK, MAX_CHUNKS)
        ends = total + tl.cumsum(chunks, axis=0)
        m_before = (request < B) & (ends <= item)
        i_request += tl.sum(m_before.to(tl.int32), axis=0)
        first = tl.maximum(first, tl.max(tl.where(m_before, ends, 0), axis=0))
        total += tl.sum(chunks, axis=0)
    return i_request, item - first


@triton.jit
def attend_units(
    b_q,  # [BM, BD]
    b_top,  # [BM] float32, base 2
    b_total,  # [BM] float32
    b_acc,  # [BM, BD] float32
    m_row,  # [BM] rows that see these units
    p_k,
    p_v,
    p_units,
    begin,
    end,
    i_h,
    s_k,
    s_v,
    scale_log2,
    D: tl.constexpr,
    BD: tl.constexpr,
    BN: tl.constexpr,
):
    """Online softmax over the units ``begin..end``; returns ``(b_top, b_total, b_acc)``."""
    for start in range(begin, end, BN):
        index = start + tl.arange(0, BN)
        m_unit = index < end
        unit = tl.load(p_units + index, mask=m_unit, other=0)  # [BN]
        b_k = load_flat_rows(p_k, unit, i_h, m_unit, s_k, D, BD)  # [BN, BD]
        b_logit = tl.dot(b_q, tl.trans(b_k.to(b_q.dtype)), input_precision="tf32x3") * scale_log2
        b_logit = tl.where(m_row[:, None] & m_unit[None, :], b_logit, float("-inf"))
        b_new_top = tl.maximum(b_top, tl.max(b_logit, axis=1))
        b_shift = tl.where(b_new_top == float("-inf"), 0.0, b_new_top)  # rows of other requests: stay empty
        b_p = tl.exp2(b_logit - b_shift[:, None])
        b_keep = tl.exp2(b_top - b_shift)
        b_v = load_flat_rows(p_v, unit, i_h, m_unit, s_v, D, BD).to(b_q.dtype)  # [BN, BD]
        b_total = b_total * b_keep + tl.sum(b_p, axis=1)
        b_acc = b_acc * b_keep[:, None] + tl.dot(b_p.to(b_v.dtype), b_v, input_precision="tf32x3")
        b_top = b_new_top
    return b_top, b_total, b_acc


@triton.jit
def normalise(b_top, b_total, b_acc, v_scale):
    """Output ``[BM, BD]`` times ``v_scale`` and LSE ``[BM]`` base 2 of an online softmax; 0 and -inf where nothing was
    seen."""
    m_some = b_total > 0
    b_divisor = tl.where(m_some, b_total, 1.0)
    return b_acc / (b_divisor / v_scale)[:, None], tl.where(m_some, b_top + tl.log2(b_divisor), float("-inf"))


@triton.jit
def merge_into_dense(
    b_view,  # [BM, BD] float32
    b_view_lse_b2,  # [BM]
    row,  # [BM]
    head,  # [BM]
    m_row,  # [BM]
    p_out,
    p_lse,
    s_ot,
    s_oh,
    s_lt,
    D: tl.constexpr,
    BD: tl.constexpr,
):
    """Merge with the dense part by LSE, in place; a row whose view is empty is neither read nor written."""
    d = tl.arange(0, BD)
    row = row.to(tl.int64)
    m_some = m_row & (b_view_lse_b2 != float("-inf"))
    m_out = m_some[:, None] & (d < D)[None, :]
    p_row_out = p_out + (row * s_ot + head * s_oh)[:, None] + d[None, :]
    p_row_lse = p_lse + row * s_lt + head
    b_dense = tl.load(p_row_out, mask=m_out, other=0.0).to(tl.float32)
    b_dense_lse_b2 = tl.load(p_row_lse, mask=m_some, other=float("-inf")).to(tl.float32)
    # A dense part without keys may hold anything: select it away, 0 * nan is nan.
    b_dense = tl.where((b_dense_lse_b2 != float("-inf"))[:, None], b_dense, 0.0)
    b_top = tl.where(m_some, tl.maximum(b_view_lse_b2, b_dense_lse_b2), 0.0)
    w_view = tl.exp2(b_view_lse_b2 - b_top)
    w_dense = tl.exp2(b_dense_lse_b2 - b_top)
    b_total = tl.where(m_some, w_view + w_dense, 1.0)
    b_merged = b_view * (w_view / b_total)[:, None] + b_dense * (w_dense / b_total)[:, None]
    tl.store(p_row_out, b_merged.to(p_out.dtype.element_ty), mask=m_out)
    tl.store(p_row_lse, (b_top + tl.log2(b_total)).to(p_lse.dtype.element_ty), mask=m_some)


@triton.jit(
    do_not_specialize=["B", "scale_log2", "v_scale"],
    # A layer's bounds are a row of one table for all layers, so they start at any 4 bytes.
    do_not_specialize_on_alignment=["p_units", "p_indptr"],
)
def view_decode_kernel(
    p_q,  # [B, Hq, D]
    p_k,  # [units, Hkv, D]
    p_v,  # [units, Hkv, D]
    p_units,  # [N]
    p_indptr,  # [B + 1]
    p_out,  # [B, Hq, D]
    p_lse,  # [B, Hq] base 2
    p_part_out,  # [chunks of the longest request, B, Hq, D] float32
    p_part_lse,  # [chunks of the longest request, B, Hq] base 2
    B,
    scale_log2,
    v_scale,
    s_qt,
    s_qh,
    s_k,
    s_v,
    s_ot,
    s_oh,
    s_lt,
    G: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BB: tl.constexpr,
    CHUNK: tl.constexpr,
    MAX_CHUNKS: tl.constexpr,
):
    """Program (p, h): every num_programs(0)-th chunk of the batch, for the G query heads of KV head h."""
    i_h = tl.program_id(1)
    lane = tl.arange(0, BM)  # query head within the group
    head = i_h * G + lane
    m_head = lane < G
    d = tl.arange(0, BD)
    total = count_chunks(p_indptr, B, BB, CHUNK, MAX_CHUNKS)
    for item in range(tl.program_id(0), total, tl.num_programs(0)):
        i_request, i_chunk = find_chunk(item, p_indptr, B, BB, CHUNK, MAX_CHUNKS)
        begin = tl.load(p_indptr + i_request).to(tl.int32)
        end = tl.load(p_indptr + i_request + 1).to(tl.int32)
        length = chunk_length(end - begin, CHUNK, MAX_CHUNKS)
        row = tl.full([BM], 0, dtype=tl.int32) + i_request
        b_q = load_queries(p_q, row, head, m_head, s_qt, s_qh, D, BD)  # [BM, BD]
        b_top = tl.full([BM], float("-inf"), dtype=tl.float32)
        b_total = tl.zeros([BM], dtype=tl.float32)
        b_acc = tl.zeros([BM, BD], dtype=tl.float32)
        start = begin + i_chunk * length
        b_top, b_total, b_acc = attend_units(
            b_q, b_top, b_total, b_acc, m_head, p_k, p_v, p_units, start, min(end, start + length), i_h, s_k, s_v,
            scale_log2, D, BD, BN,
        )  # fmt: skip
        b_out, b_lse_b2 = normalise(b_top, b_total, b_acc, v_scale)
        if end - begin <= length:
            merge_into_dense(b_out, b_lse_b2, row, head, m_head, p_out, p_lse, s_ot, s_oh, s_lt, D, BD)
        else:
            line = (i_chunk * B + row).to(tl.int64) * (tl.num_programs(1) * G) + head
            m_out = m_head[:, None] & (d < D)[None, :]
            tl.store(p_part_out + line[:, None] * D + d[None, :], b_out, mask=m_out)
            tl.store(p_part_lse + line, b_lse_b2, mask=m_head)


@triton.jit(do_not_specialize=["B"], do_not_specialize_on_alignment=["p_indptr"])
def view_merge_kernel(
    p_indptr,  # [B + 1]
    p_part_out,  # [chunks of the longest request, B, Hq, D] float32
    p_part_lse,  # [chunks of the longest request, B, Hq] base 2
    p_out,  # [B, Hq, D]
    p_lse,  # [B, Hq] base 2
    B,
    s_ot,
    s_oh,
    s_lt,
    H: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BH: tl.constexpr,
    CHUNK: tl.constexpr,
    MAX_CHUNKS: tl.constexpr,
):
    """Program (request, heads): the chunks of a request that has several, in order, then its dense part."""
    i_request = tl.program_id(0)
    units = (tl.load(p_indptr + i_request + 1) - tl.load(p_indptr + i_request)).to(tl.int32)
    chunks = tl.cdiv(units, chunk_length(units, CHUNK, MAX_CHUNKS))
    if chunks > 1:
        head = tl.program_id(1) * BH + tl.arange(0, BH)
        m_head = head < H
        d = tl.arange(0, BD)
        b_top = tl.full([BH], float("-inf"), dtype=tl.float32)
        b_total = tl.zeros([BH], dtype=tl.float32)
        b_acc = tl.zeros([BH, BD], dtype=tl.float32)
        for i_chunk in range(chunks):
            line = (i_chunk * B + i_request).to(tl.int64) * H + head
            m_part = m_head[:, None] & (d < D)[None, :]
            b_part = tl.load(p_part_out + line[:, None] * D + d[None, :], mask=m_part, other=0.0)  # [BH, BD]
            b_lse_b2 = tl.load(p_part_lse + line, mask=m_head, other=float("-inf"))  # [BH]
            b_new_top = tl.maximum(b_top, b_lse_b2)
            b_shift = tl.where(b_new_top == float("-inf"), 0.0, b_new_top)
            b_keep = tl.exp2(b_top - b_shift)
            b_weight = tl.exp2(b_lse_b2 - b_shift)
            b_total = b_total * b_keep + b_weight
            b_acc = b_acc * b_keep[:, None] + b_part * b_weight[:, None]
            b_top = b_new_top
        b_out, b_lse_b2 = normalise(b_top, b_total, b_acc, 1.0)
        row = tl.full([BH], 0, dtype=tl.int32) + i_request
        merge_into_dense(b_out, b_lse_b2, row, head, m_head, p_out, p_lse, s_ot, s_oh, s_lt, D, BD)


@triton.jit(
    do_not_specialize=["R", "scale_log2", "v_scale"],
    do_not_specialize_on_alignment=["p_units", "p_indptr", "p_row_request"],
)
def view_prefill_kernel(
    p_q,  # [R, Hq, D]
    p_k,  # [units, Hkv, D]
    p_v,  # [units, Hkv, D]
    p_units,  # [N]
    p_indptr,  # [B + 1]
    p_row_request,  # [R]
    p_out,  # [R, Hq, D]
    p_lse,  # [R, Hq] base 2
    R,
    scale_log2,
    v_scale,
    s_qt,
    s_qh,
    s_k,
    s_v,
    s_ot,
    s_oh,
    s_lt,
    G: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Program (tile, h): ROWS query rows, each over its request's units."""
    i_tile, i_h = tl.program_id(0), tl.program_id(1)
    lane = tl.arange(0, BM)  # query row * G + head within the group
    row = i_tile * ROWS + lane // G
    head = i_h * G + lane % G
    m_row = (lane < ROWS * G) & (row < R)
    request = tl.load(p_row_request + row, mask=m_row, other=-1).to(tl.int32)
    last = tl.max(request, axis=0)
    first = tl.min(tl.where(request >= 0, request, last + 1), axis=0)
    b_q = load_queries(p_q, row, head, m_row, s_qt, s_qh, D, BD)
    b_top = tl.full([BM], float("-inf"), dtype=tl.float32)
    b_total = tl.zeros([BM], dtype=tl.float32)
    b_acc = tl.zeros([BM, BD], dtype=tl.float32)
    for i_request in range(first, last + 1):  # one, unless the tile's rows belong to several
        begin = tl.load(p_indptr + i_request).to(tl.int32)
        end = tl.load(p_indptr + i_request + 1).to(tl.int32)
        b_top, b_total, b_acc = attend_units(
            b_q, b_top, b_total, b_acc, request == i_request, p_k, p_v, p_units, begin, end, i_h, s_k, s_v,
            scale_log2, D, BD, BN,
        )  # fmt: skip
    b_out, b_lse_b2 = normalise(b_top, b_total, b_acc, v_scale)
    merge_into_dense(b_out, b_lse_b2, row, head, m_row, p_out, p_lse, s_ot, s_oh, s_lt, D, BD)
