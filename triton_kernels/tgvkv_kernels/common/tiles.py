"""Triton helpers shared by the attention kernels. The only module of `common` that imports Triton.

Names: ``p_*`` pointers, ``i_*`` program ids and scalar indices, ``b_*`` blocks, ``m_*`` masks, ``s_*`` strides.
"""

import triton
import triton.language as tl

from tgvkv_kernels.common import lse

LOG2_E = tl.constexpr(lse.LOG2_E)
# Dots say input_precision="tf32x3": it concerns float32 data only (three tensor-core products, about float32 accuracy);
# "ieee" would run them on the FMA units and spill registers.
MIN_DOT = 16  # tl.dot takes no operand dimension below this
TARGET_PROGRAMS = 264  # two waves on the 132 multiprocessors of an H100/H200; a constant, so results do not vary by GPU


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


@triton.jit
def attention_tile(b_q, b_k, b_lse_b2, scale_log2):
    """``exp(q.k*scale - lse)`` of ``[BM, BD]`` queries and ``[BN, BD]`` keys -> ``[BM, BN]`` float32."""
    b_logit = tl.dot(b_q, tl.trans(b_k), input_precision="tf32x3")
    return tl.exp2(b_logit * scale_log2 - b_lse_b2[:, None])


def next_power_of_2(n: int) -> int:
    """Smallest power of two >= n (1 for n <= 1)."""
    return 1 << max(n - 1, 0).bit_length()


def ceil_div(n: int, d: int) -> int:
    """``n / d`` rounded up."""
    return -(-n // d)


def block_dim(head_dim: int) -> int:
    """Padded head dimension of a tile."""
    return max(MIN_DOT, next_power_of_2(head_dim))


def column_blocks(head_dim: int, itemsize: int) -> dict[str, int]:
    """Tile sizes of the column-sum kernels (`text_weights`, `vision_scores`) and their launch options.

    64 x 64 tiles of 16-bit data; halved where a tile row is 512 bytes or more, so that the query and key tiles with
    two stages stay below 100 KB of shared memory.
    """
    wide = block_dim(head_dim) * itemsize >= 512
    side = 32 if wide else 64
    return {"BM": side, "BN": side, "BD": block_dim(head_dim), "num_warps": 8 if itemsize == 4 else 4, "num_stages": 2}


def row_splits(row_tiles: int, other_programs: int) -> int:
    """Parts that the loop over query rows is cut into, from shapes alone (so the result does not vary by device)."""
    return max(1, min(row_tiles, TARGET_PROGRAMS // max(other_programs, 1)))
