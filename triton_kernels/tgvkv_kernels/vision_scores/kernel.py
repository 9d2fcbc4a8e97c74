"""Triton kernels of `vision_scores`: weighted column sums over paged keys, then one fixed-order reduction."""

import triton
import triton.language as tl

from tgvkv_kernels.common.tiles import LOG2_E, attention_tile, load_flat_rows, load_queries


@triton.jit(
    do_not_specialize=["T", "V", "scale_log2"],
    do_not_specialize_on_alignment=["p_lse", "p_w", "p_units", "p_q_pos", "p_v_pos"],
)
def vision_columns_kernel(
    p_q,  # [T, Hq, D]
    p_lse,  # [T, Hq] base e
    p_w,  # [T] float32
    p_k,  # [units, Hkv, D]
    p_units,  # [V]
    p_q_pos,  # [T]
    p_v_pos,  # [V]
    p_partial,  # [splits * Hkv, V] float32
    p_mass,  # [blocks of V, splits * Hkv] float32
    T,
    V,
    scale_log2,
    s_qt,
    s_qh,
    s_unit,
    s_lt,
    G: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    i_n, i_h, i_s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    parts = tl.num_programs(2) * tl.num_programs(1)
    i_part = i_s * tl.num_programs(1) + i_h
    key = i_n * BN + tl.arange(0, BN)
    m_key = key < V
    unit = tl.load(p_units + key, mask=m_key, other=0)
    key_pos = tl.load(p_v_pos + key, mask=m_key, other=0)
    b_k = load_flat_rows(p_k, unit, i_h, m_key, s_unit, D, BD)  # [BN, BD], once for the group's G query heads
    b_score = tl.zeros([BM, BN], dtype=tl.float32)
    b_mass = tl.zeros([BM, BN], dtype=tl.float32)

    tiles = tl.cdiv(T * G, BM)
    per_split = tl.cdiv(tiles, tl.num_programs(2))
    for i_tile in range(i_s * per_split, min(tiles, (i_s + 1) * per_split)):
        row = i_tile * BM + tl.arange(0, BM)
        token = row // G
        head = i_h * G + row % G
        m_row = token < T
        b_q = load_queries(p_q, token, head, m_row, s_qt, s_qh, D, BD)
        b_lse_b2 = tl.load(p_lse + token * s_lt + head, mask=m_row, other=0.0).to(tl.float32) * LOG2_E
        b_w = tl.load(p_w + token, mask=m_row, other=0.0).to(tl.float32)
        query_pos = tl.load(p_q_pos + token, mask=m_row, other=0)
        b_a = attention_tile(b_q, b_k, b_lse_b2, scale_log2)
        m_pair = m_row[:, None] & m_key[None, :] & (key_pos[None, :] < query_pos[:, None])
        b_a = tl.where(m_pair, b_a, 0.0)
        b_score += b_w[:, None] * b_a
        b_mass += b_a
    tl.store(p_partial + i_part.to(tl.int64) * V + key, tl.sum(b_score, axis=0), mask=m_key)
    tl.store(p_mass + i_n * parts + i_part, tl.sum(tl.sum(b_mass, axis=0), axis=0))


@triton.jit(do_not_specialize=["V", "parts", "masses", "heads"], do_not_specialize_on_alignment=["p_scores", "p_mass"])
def vision_reduce_kernel(
    p_partial,  # [parts, V] float32
    p_mass_partial,  # [masses] float32
    p_scores,  # [V] float32
    p_mass,  # [] float32
    V,
    parts,
    masses,
    heads,
    BN: tl.constexpr,
):
    i_n = tl.program_id(0)
    key = i_n * BN + tl.arange(0, BN)
    m_key = key < V
    b_sum = tl.zeros([BN], dtype=tl.float32)
    p_part = p_partial + key
    for _ in range(parts):
        b_sum += tl.load(p_part, mask=m_key, other=0.0)
        p_part += V
    tl.store(p_scores + key, b_sum / heads.to(tl.float32), mask=m_key)
    if i_n == 0:
        b_mass = tl.zeros([BN], dtype=tl.float32)
        for start in range(0, masses, BN):
            index = start + tl.arange(0, BN)
            b_mass += tl.load(p_mass_partial + index, mask=index < masses, other=0.0)
        tl.store(p_mass, tl.sum(b_mass, axis=0) / heads.to(tl.float32))
