"""Triton kernels of `view_attention`: split-KV attention over paged units, then a merging epilogue."""

import triton
import triton.language as tl

from tgvkv_kernels.common.tiles import LN2, LOG2_E, load_flat_rows, load_queries


@triton.jit
def merge_dense_and_store(
    b_view,  # [BM, BD] float32, normalised view output (0 where empty)
    b_view_lse_b2,  # [BM]
    row,
    head,
    m_row,
    p_dense,
    p_dense_lse,
    p_out,
    p_lse,
    s_dt,
    s_dh,
    s_dlt,
    s_ot,
    s_oh,
    s_olt,
    D: tl.constexpr,
    BD: tl.constexpr,
    HAS_DENSE: tl.constexpr,
):
    """Merge with the dense part by LSE and write; a row without units passes its dense part on untouched."""
    d = tl.arange(0, BD)
    m_out = m_row[:, None] & (d < D)[None, :]
    row = row.to(tl.int64)
    p_row_out = p_out + (row * s_ot + head * s_oh)[:, None] + d[None, :]
    p_row_lse = p_lse + row * s_olt + head
    if HAS_DENSE:
        b_raw = tl.load(p_dense + (row * s_dt + head * s_dh)[:, None] + d[None, :], mask=m_out, other=0.0)
        b_raw_lse_e = tl.load(p_dense_lse + row * s_dlt + head, mask=m_row, other=0.0)
        b_dense_lse_b2 = b_raw_lse_e.to(tl.float32) * LOG2_E
        m_view = b_view_lse_b2 != float("-inf")
        m_dense = b_dense_lse_b2 != float("-inf")
        b_top = tl.maximum(b_view_lse_b2, b_dense_lse_b2)
        b_top = tl.where(m_view | m_dense, b_top, 0.0)
        w_view = tl.exp2(b_view_lse_b2 - b_top)
        w_dense = tl.exp2(b_dense_lse_b2 - b_top)
        total = tl.where(m_view | m_dense, w_view + w_dense, 1.0)
        # A dense part without keys may hold anything: select it away, 0 * nan is nan.
        b_dense = tl.where(m_dense[:, None], b_raw.to(tl.float32), 0.0)
        b_merged = b_view * (w_view / total)[:, None] + b_dense * (w_dense / total)[:, None]
        b_lse_e = (b_top + tl.log2(total)) * LN2
        b_out = tl.where(m_view[:, None], b_merged.to(p_out.dtype.element_ty), b_raw)
        b_lse_e = tl.where(m_view, b_lse_e.to(p_lse.dtype.element_ty), b_raw_lse_e)
        tl.store(p_row_out, b_out, mask=m_out)
        tl.store(p_row_lse, b_lse_e, mask=m_row)
    else:
        tl.store(p_row_out, b_view.to(p_out.dtype.element_ty), mask=m_out)
        tl.store(p_row_lse, (b_view_lse_b2 * LN2).to(p_lse.dtype.element_ty), mask=m_row)


@triton.jit(
    do_not_specialize=["R", "scale_log2"],
    # A layer's bounds are a row of one table for all layers, so they start at any 4 bytes.
    do_not_specialize_on_alignment=["p_units", "p_indptr", "p_row_request"],
)
def view_attention_kernel(
    p_q,  # [R, Hq, D]
    p_k,  # [units, Hkv, D]
    p_v,  # [units, Hkv, D]
    p_units,  # [N]
    p_indptr,  # [B + 1]
    p_row_request,  # [R], or unused
    p_dense,  # [R, Hq, D], or unused
    p_dense_lse,  # [R, Hq] base e, or unused
    p_out,  # [R, Hq, D]
    p_lse,  # [R, Hq] base e
    p_part_out,  # [splits, R, Hq, D] float32, or unused
    p_part_lse,  # [splits, R, Hq] base 2, or unused
    R,
    scale_log2,
    s_qt,
    s_qh,
    s_k,
    s_v,
    s_dt,
    s_dh,
    s_dlt,
    s_ot,
    s_oh,
    s_olt,
    G: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    SPLIT: tl.constexpr,
    HAS_ROW_MAP: tl.constexpr,
    HAS_DENSE: tl.constexpr,
):
    i_tile, i_h, i_s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    lane = tl.arange(0, BM)  # lane = query row * G + head within the group
    row = i_tile * ROWS + lane // G
    head = i_h * G + lane % G
    m_row = (lane < ROWS * G) & (row < R)
    if HAS_ROW_MAP:
        request = tl.load(p_row_request + row, mask=m_row, other=-1).to(tl.int32)
        last = tl.max(request, axis=0)
        first = tl.min(tl.where(request >= 0, request, last + 1), axis=0)
    else:  # ROWS == 1
        request = tl.where(m_row, row, -1)
        first = i_tile
        last = i_tile

    b_q = load_queries(p_q, row, head, m_row, s_qt, s_qh, D, BD)
    b_top = tl.full([BM], float("-inf"), dtype=tl.float32)
    b_total = tl.zeros([BM], dtype=tl.float32)
    b_acc = tl.zeros([BM, BD], dtype=tl.float32)
    for i_request in range(first, last + 1):  # one request, unless the tile's rows belong to several
        begin = tl.load(p_indptr + i_request).to(tl.int32)
        end = tl.load(p_indptr + i_request + 1).to(tl.int32)
        chunk = tl.cdiv(tl.cdiv(end - begin, tl.num_programs(2)), BN) * BN
        begin += i_s * chunk
        end = min(end, begin + chunk)
        m_mine = request == i_request
        for start in range(begin, end, BN):
            index = start + tl.arange(0, BN)
            m_unit = index < end
            unit = tl.load(p_units + index, mask=m_unit, other=0)  # [BN]
            b_k = load_flat_rows(p_k, unit, i_h, m_unit, s_k, D, BD)  # [BN, BD]
            b_logit = tl.dot(b_q, tl.trans(b_k), input_precision="tf32x3") * scale_log2
            b_logit = tl.where(m_mine[:, None] & m_unit[None, :], b_logit, float("-inf"))
            b_new_top = tl.maximum(b_top, tl.max(b_logit, axis=1))
            b_shift = tl.where(b_new_top == float("-inf"), 0.0, b_new_top)  # rows of other requests: stay empty
            b_p = tl.exp2(b_logit - b_shift[:, None])
            b_keep = tl.exp2(b_top - b_shift)
            b_v = load_flat_rows(p_v, unit, i_h, m_unit, s_v, D, BD)  # [BN, BD]
            b_total = b_total * b_keep + tl.sum(b_p, axis=1)
            b_acc = b_acc * b_keep[:, None] + tl.dot(b_p.to(b_v.dtype), b_v, input_precision="tf32x3")
            b_top = b_new_top

    m_some = b_total > 0
    b_out = b_acc / tl.where(m_some, b_total, 1.0)[:, None]
    b_lse_b2 = tl.where(m_some, b_top + tl.log2(tl.where(m_some, b_total, 1.0)), float("-inf"))
    if not SPLIT:
        merge_dense_and_store(
            b_out, b_lse_b2, row, head, m_row, p_dense, p_dense_lse, p_out, p_lse,
            s_dt, s_dh, s_dlt, s_ot, s_oh, s_olt, D, BD, HAS_DENSE,
        )  # fmt: skip
    else:
        d = tl.arange(0, BD)
        line = (i_s * R + row).to(tl.int64) * (tl.num_programs(1) * G) + head
        tl.store(p_part_out + line[:, None] * D + d[None, :], b_out, mask=m_row[:, None] & (d < D)[None, :])
        tl.store(p_part_lse + line, b_lse_b2, mask=m_row)


@triton.jit(do_not_specialize=["R", "splits"])
def view_merge_kernel(
    p_part_out,  # [splits, R, Hq, D] float32
    p_part_lse,  # [splits, R, Hq] base 2
    p_dense,
    p_dense_lse,
    p_out,
    p_lse,
    R,
    splits,
    s_dt,
    s_dh,
    s_dlt,
    s_ot,
    s_oh,
    s_olt,
    H: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BH: tl.constexpr,
    HAS_DENSE: tl.constexpr,
):
    i_row = tl.program_id(0)
    head = tl.program_id(1) * BH + tl.arange(0, BH)
    m_head = head < H
    d = tl.arange(0, BD)
    b_top = tl.full([BH], float("-inf"), dtype=tl.float32)
    b_total = tl.zeros([BH], dtype=tl.float32)
    b_acc = tl.zeros([BH, BD], dtype=tl.float32)
    for i_s in range(splits):  # always in this order: the sum is deterministic
        line = (i_s * R + i_row).to(tl.int64) * H + head
        b_lse_b2 = tl.load(p_part_lse + line, mask=m_head, other=float("-inf"))  # [BH]
        b_part = tl.load(
            p_part_out + line[:, None] * D + d[None, :], mask=m_head[:, None] & (d < D)[None, :], other=0.0
        )  # [BH, BD]
        b_new_top = tl.maximum(b_top, b_lse_b2)
        b_shift = tl.where(b_new_top == float("-inf"), 0.0, b_new_top)
        b_keep = tl.exp2(b_top - b_shift)
        b_weight = tl.exp2(b_lse_b2 - b_shift)
        b_total = b_total * b_keep + b_weight
        b_acc = b_acc * b_keep[:, None] + b_part * b_weight[:, None]
        b_top = b_new_top
    m_some = b_total > 0
    b_out = b_acc / tl.where(m_some, b_total, 1.0)[:, None]
    b_lse_b2 = tl.where(m_some, b_top + tl.log2(tl.where(m_some, b_total, 1.0)), float("-inf"))
    row = tl.zeros([BH], dtype=tl.int32) + i_row
    merge_dense_and_store(
        b_out, b_lse_b2, row, head, m_head, p_dense, p_dense_lse, p_out, p_lse,
        s_dt, s_dh, s_dlt, s_ot, s_oh, s_olt, D, BD, HAS_DENSE,
    )  # fmt: skip
