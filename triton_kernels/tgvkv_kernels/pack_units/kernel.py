"""Triton kernel of `pack_units`: copies storage rows to a buffer, or a buffer to storage rows, as raw words."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["N"], do_not_specialize_on_alignment=["p_units"])
def move_rows_kernel(
    p_k,  # [units, row words]
    p_v,  # [units, row words]
    p_buffer,  # [2, N, row words]
    p_units,  # [N]
    N,
    s_k,
    s_v,
    WORDS: tl.constexpr,
    BN: tl.constexpr,
    BW: tl.constexpr,
    GATHER: tl.constexpr,
):
    """Program (i, half, j): BN units, K or V, BW words of each row. GATHER: storage -> buffer, else back."""
    i_n, i_half, i_w = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    index = i_n * BN + tl.arange(0, BN)
    word = i_w * BW + tl.arange(0, BW)
    m_n = index < N
    m_move = m_n[:, None] & (word < WORDS)[None, :]
    unit = tl.load(p_units + index, mask=m_n, other=0).to(tl.int64)
    line = (i_half.to(tl.int64) * N + index) * WORDS
    p_lines = p_buffer + line[:, None] + word[None, :]
    if i_half == 0:  # noqa: SIM108 - reads like the two storages it is
        p_rows = p_k + (unit * s_k)[:, None] + word[None, :]
    else:
        p_rows = p_v + (unit * s_v)[:, None] + word[None, :]
    if GATHER:
        tl.store(p_lines, tl.load(p_rows, mask=m_move, other=0), mask=m_move)
    else:
        tl.store(p_rows, tl.load(p_lines, mask=m_move, other=0), mask=m_move)
