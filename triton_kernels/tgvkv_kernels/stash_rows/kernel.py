"""Triton kernel of `stash_rows`."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize_on_alignment=["p_rows", "p_targets"])
def stash_rows_kernel(
    p_q,  # [R, Hq, D]
    p_lse,  # [R, Hq]
    p_rows,  # [t]
    p_targets,  # [t]
    p_q_stash,  # [T, Hq, D]
    p_lse_stash,  # [T, Hq]
    s_qt,
    s_qh,
    s_lt,
    H: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BH: tl.constexpr,
):
    """Program (i, j): BH heads of the i-th row."""
    i_row, i_h = tl.program_id(0), tl.program_id(1)
    source = tl.load(p_rows + i_row).to(tl.int64)
    target = tl.load(p_targets + i_row).to(tl.int64)
    head = i_h * BH + tl.arange(0, BH)
    d = tl.arange(0, BD)
    m_head = head < H
    m_q = m_head[:, None] & (d < D)[None, :]
    b_q = tl.load(p_q + source * s_qt + (head * s_qh)[:, None] + d[None, :], mask=m_q)
    tl.store(p_q_stash + target * H * D + (head * D)[:, None] + d[None, :], b_q, mask=m_q)
    b_lse = tl.load(p_lse + source * s_lt + head, mask=m_head)
    tl.store(p_lse_stash + target * H + head, b_lse, mask=m_head)
