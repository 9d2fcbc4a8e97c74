"""Triton kernels of `batch_scores`: column sums of the text's attention over keys, ragged over requests and layers.

A program keeps a tile of query rows (tokens x heads of a KV group) and streams keys past it. Keys are the rows of its
tiles (the tensor cores' M), so that a column sum stays inside a thread quad and needs no second accumulator.
"""

import triton
import triton.language as tl

from tgvkv_kernels.common.tiles import load_flat_rows

NEVER = tl.constexpr(2**24)  # a token that no request has (times the group it stays below 2^31)
# Column sums from here on count as not finite: below it, no sum of theirs over tiles, heads and ranks overflows.
LARGEST = tl.constexpr(2.0**100)


@triton.jit(
    do_not_specialize=["T", "P", "first_layer", "slots_per_layer", "scale_log2"],
    do_not_specialize_on_alignment=["p_work", "p_w", "p_slots", "p_first", "p_part", "p_mass", "p_k_scale"],
)
def column_sums_kernel(
    p_work,  # [n, 8] int32, see plan.Pieces
    p_q,  # [L, T, Hq, D]
    p_lse,  # [L, T, Hq] base 2
    p_w,  # [L, T] float32; "weighted" only
    p_k,  # [units, Hkv, D]
    p_k_scale,  # [layers of the storage] float32, or None
    p_slots,  # [N] slot of each key
    p_first,  # [N] int32: the request's first token that sees the key; "text": unused
    p_part,  # [L, Hkv * P] float32
    p_mass,  # [L, n, Hkv] float32; "text": unused
    T,
    P,
    first_layer,
    slots_per_layer,
    scale_log2,
    s_k,
    G: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    KEYS: tl.constexpr,
    KIND: tl.constexpr,
):
    """Program (piece, KV head, layer). What is made of the column of A of each key, by KIND (see launch.KINDS): "text"
    its sum over queries at or after the key; over those after it "weighted" the sum of w*A, "peak" the largest A,
    "peak4" the sum of A^4. All but "text" also sum A over the piece: NaN if a column's value is not finite."""
    i_piece, i_h, i_l = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    kv_heads = tl.num_programs(1)
    p_piece = p_work + i_piece * 8
    row_begin = tl.load(p_piece)
    tokens = tl.load(p_piece + 1)
    i_tile = tl.load(p_piece + 2)
    key_begin = tl.load(p_piece + 3)
    start_key = tl.load(p_piece + 4)
    keys = tl.load(p_piece + 5)
    partial = tl.load(p_piece + 6)

    row = i_tile * BM + tl.arange(0, BM)
    token = row // G
    head = i_h * G + row % G
    m_row = token < tokens
    d = tl.arange(0, BD)
    line = i_l.to(tl.int64) * T + row_begin + token  # of the stash
    offset = (line * kv_heads * G + head) * D
    b_q = tl.load(p_q + offset[:, None] + d[None, :], mask=m_row[:, None] & (d < D)[None, :], other=0.0)  # [BM, BD]
    # Past the last token the LSE is inf, so that A is 0 there.
    b_lse_b2 = tl.load(p_lse + line * kv_heads * G + head, mask=m_row, other=float("inf")).to(tl.float32)
    end_key = min(keys, start_key + KEYS)
    b_w = b_lse_b2
    if KIND == "text":
        end_key = min(end_key, (i_tile * BM + BM - 1) // G + 1)  # keys after the tile's last token: none is seen
    elif KIND == "weighted":
        b_w = tl.load(p_w + line, mask=m_row, other=0.0).to(tl.float32)
    if p_k_scale is not None:
        scale_log2 *= tl.load(p_k_scale + first_layer + i_l)
    first_unit = (first_layer + i_l).to(tl.int64) * slots_per_layer
    p_sums = p_part + i_l.to(tl.int64) * kv_heads * P + partial * kv_heads + (i_tile * kv_heads + i_h) * keys
    b_mass = tl.zeros([BN], dtype=tl.float32)
    for start in range(start_key, end_key, BN):
        key = start + tl.arange(0, BN)
        m_key = key < end_key
        slot = tl.load(p_slots + key_begin + key, mask=m_key, other=0).to(tl.int64)  # [BN]
        # [BN]; a text token sees itself
        first = key if KIND == "text" else tl.load(p_first + key_begin + key, mask=m_key, other=NEVER)
        b_k = load_flat_rows(p_k, first_unit + slot, i_h, m_key, s_k, D, BD)  # [BN, BD]
        b_logit = tl.dot(b_k.to(b_q.dtype), tl.trans(b_q), input_precision="tf32x3")  # [BN, BM]
        b_a = tl.exp2(b_logit * scale_log2 - b_lse_b2[None, :])
        b_a = tl.where(first[:, None] * G <= row[None, :], b_a, 0.0)
        b_all = tl.sum(b_a, axis=1)  # [BN]
        b_column = b_all
        if KIND == "weighted":
            b_column = tl.sum(b_a * b_w[None, :], axis=1)
        elif KIND == "peak":  # a maximum drops NaN on the GPU, a sum of numbers that are not negative does not
            b_column = tl.where(b_all == b_all, tl.max(b_a, axis=1), b_all)  # noqa: PLR0124
        elif KIND == "peak4":
            b_square = b_a * b_a
            b_column = tl.sum(b_square * b_square, axis=1)
        tl.store(p_sums + key, b_column, mask=m_key)
        if KIND != "text":
            b_mass += tl.where(tl.abs(b_column) < LARGEST, b_all, float("nan"))
    if KIND != "text":
        tl.store(p_mass + (i_l * tl.num_programs(0) + i_piece) * kv_heads + i_h, tl.sum(b_mass, axis=0))


@triton.jit(
    do_not_specialize=["P", "N", "S", "heads", "kv_heads", "pieces"],
    do_not_specialize_on_alignment=["p_sums", "p_part", "p_mass_part", "p_out", "p_mass"],
)
def column_reduce_kernel(
    p_sums,  # [m, 8] int32, see plan.Pieces
    p_part,  # [L, Hkv * P] float32
    p_mass_part,  # [L, pieces, Hkv] float32; "text": unused
    p_out,  # [L, N] float32
    p_mass,  # [L, S] float32; "text": unused
    P,
    N,
    S,
    pieces,
    heads,
    kv_heads,
    G: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    KIND: tl.constexpr,
):
    """Program (block of keys, layer): partial results in the order of row tiles and heads. "text" and "weighted" are
    means over the heads of the model, "text" also over the queries that may see the key. But for "text" each request's
    first block adds up its mass."""
    i_block, i_l = tl.program_id(0), tl.program_id(1)
    p_block = p_sums + i_block * 8
    key_begin = tl.load(p_block)
    start_key = tl.load(p_block + 1)
    keys = tl.load(p_block + 2)
    partial = tl.load(p_block + 3)
    row_tiles = tl.load(p_block + 4)
    key = start_key + tl.arange(0, BN)
    m_key = key < keys
    b_sum = tl.zeros([BN], dtype=tl.float32)
    p_line = p_part + i_l.to(tl.int64) * kv_heads * P + partial * kv_heads + key
    first_tile = 0
    if KIND == "text":
        first_tile = start_key * G // BM  # earlier tiles see none of these keys and wrote nothing
    for i_part in range(first_tile * kv_heads, row_tiles * kv_heads):
        m_part = m_key
        if KIND == "text":
            m_part = m_key & (key <= (i_part // kv_heads * BM + BM - 1) // G)
        b_part = tl.load(p_line + i_part * keys, mask=m_part, other=0.0)  # [BN]
        if KIND == "peak":
            b_sum = tl.maximum(b_sum, b_part, propagate_nan=tl.PropagateNan.ALL)
        else:
            b_sum += b_part
    if KIND == "text" or KIND == "weighted":
        b_sum = b_sum / heads.to(tl.float32)
    if KIND == "text":
        b_sum = b_sum / tl.where(m_key, keys - key, 1).to(tl.float32)
    tl.store(p_out + i_l.to(tl.int64) * N + key_begin + key, b_sum, mask=m_key)
    if KIND != "text" and start_key == 0:
        first_piece = tl.load(p_block + 5)
        count = tl.load(p_block + 6) * kv_heads
        request = tl.load(p_block + 7)
        b_mass = tl.zeros([BN], dtype=tl.float32)
        p_parts = p_mass_part + (i_l * pieces + first_piece) * kv_heads
        for start in range(0, count, BN):
            index = start + tl.arange(0, BN)
            b_mass += tl.load(p_parts + index, mask=index < count, other=0.0)  # [BN]
        tl.store(p_mass + i_l * S + request, tl.sum(b_mass, axis=0) / heads.to(tl.float32))
