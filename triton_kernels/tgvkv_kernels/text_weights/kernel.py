"""Triton kernels of `text_weights`: causal column sums of the text block, then one fixed-order reduction."""

import triton
import triton.language as tl

from tgvkv_kernels.common.tiles import LOG2_E, attention_tile, load_flat_rows, load_queries


@triton.jit(do_not_specialize=["T", "scale_log2"], do_not_specialize_on_alignment=["p_lse"])
def text_columns_kernel(
    p_q,  # [T, Hq, D]
    p_k,  # [T, Hkv, D]
    p_lse,  # [T, Hq] base e
    p_partial,  # [splits * Hkv, T] float32
    T,
    scale_log2,
    s_qt,
    s_qh,
    s_kt,
    s_lt,
    G: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    i_n, i_h, i_s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    key = i_n * BN + tl.arange(0, BN)
    m_key = key < T
    b_k = load_flat_rows(p_k, key, i_h, m_key, s_kt, D, BD)  # [BN, BD], once for the group's G query heads
    b_sum = tl.zeros([BM, BN], dtype=tl.float32)

    tiles = tl.cdiv(T * G, BM)
    per_split = tl.cdiv(tiles, tl.num_programs(2))
    first = max(i_s * per_split, (i_n * BN * G) // BM)  # rows before the block's first key see none of it
    last = min(tiles, (i_s + 1) * per_split)
    for i_tile in range(first, last):
        row = i_tile * BM + tl.arange(0, BM)
        token = row // G
        head = i_h * G + row % G
        m_row = token < T
        b_q = load_queries(p_q, token, head, m_row, s_qt, s_qh, D, BD)
        b_lse_b2 = tl.load(p_lse + token * s_lt + head, mask=m_row, other=0.0).to(tl.float32) * LOG2_E
        b_a = attention_tile(b_q, b_k, b_lse_b2, scale_log2)
        m_pair = m_row[:, None] & m_key[None, :] & (key[None, :] <= token[:, None])
        b_sum += tl.where(m_pair, b_a, 0.0)
    tl.store(p_partial + (i_s * tl.num_programs(1) + i_h) * T + key, tl.sum(b_sum, axis=0), mask=m_key)


@triton.jit(do_not_specialize=["T", "parts", "heads"], do_not_specialize_on_alignment=["p_w"])
def text_reduce_kernel(
    p_partial,  # [parts, T] float32
    p_w,  # [T] float32
    T,
    parts,
    heads,
    BN: tl.constexpr,
):
    key = tl.program_id(0) * BN + tl.arange(0, BN)
    m_key = key < T
    b_sum = tl.zeros([BN], dtype=tl.float32)
    p_part = p_partial + key
    for _ in range(parts):
        b_sum += tl.load(p_part, mask=m_key, other=0.0)
        p_part += T
    queries = tl.where(m_key, T - key, 1).to(tl.float32)
    tl.store(p_w + key, b_sum / heads.to(tl.float32) / queries, mask=m_key)
