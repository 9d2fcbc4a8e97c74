"""Triton helpers shared by the attention kernels. The only module of `common` that imports Triton.

Names: ``p_*`` pointers, ``i_*`` program ids and scalar indices, ``b_*`` blocks, ``m_*`` masks, ``s_*`` strides.
"""

import triton
import triton.language as tl

# Dots say input_precision="tf32x3": it concerns float32 data only (three tensor-core products, about float32 accuracy);
# "ieee" would run them on the FMA units and spill registers.
MIN_DOT = 16  # tl.dot takes no operand dimension below this


@triton.jit
def zero(dtype: tl.constexpr):
    """A scalar 0 of that type. A variable that a loop changes must have its type before the loop, and Triton takes a
    bare 0 for int32 (and drops its type where it can)."""
    return tl.full((), 0, dtype)


@triton.jit
def load_queries(p_q, token, head, m_row, s_qt, s_qh, D: tl.constexpr, BD: tl.constexpr):
    """Query rows ``(token, head)`` -> ``[BM, BD]``, zero where masked."""
    d = tl.arange(0, BD)
    offset = token.to(tl.int64) * s_qt + head * s_qh
    return tl.load(p_q + offset[:, None] + d[None, :], mask=m_row[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def load_flat_rows(p_flat, unit, i_head, m_unit, s_unit, D: tl.constexpr, BD: tl.constexpr):
    """One head of the storage rows ``unit`` -> ``[BN, BD]``, zero where masked; int64 addressing."""
    d = tl.arange(0, BD)
    offset = unit.to(tl.int64) * s_unit + i_head * D
    return tl.load(p_flat + offset[:, None] + d[None, :], mask=m_unit[:, None] & (d < D)[None, :], other=0.0)


def next_power_of_2(n: int) -> int:
    """Smallest power of two >= n (1 for n <= 1)."""
    return 1 << max(n - 1, 0).bit_length()


def ceil_div(n: int, d: int) -> int:
    """``n / d`` rounded up."""
    return -(-n // d)


def block_dim(head_dim: int) -> int:
    """Padded head dimension of a tile."""
    return max(MIN_DOT, next_power_of_2(head_dim))
