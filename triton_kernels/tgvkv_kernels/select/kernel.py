"""Triton kernels of `select`: budgets, stable top-k by bitwise search, view tables."""

import triton
import triton.language as tl

from tgvkv_kernels.common.tiles import zero


@triton.jit
def share_out(mass, m_layer, L, total, cap, BL: tl.constexpr, QUANTUM_BITS: tl.constexpr):
    """Budgets ``[BL]`` int64 of L layers with masses ``[BL]`` float64 (0 past L). The same steps as the reference."""
    layer = tl.arange(0, BL)
    mass = tl.where((mass > 0) & (mass < float("inf")), mass, 0.0)
    open_layer = m_layer
    share = tl.zeros([BL], dtype=tl.float64)
    full = cap.to(tl.float64)
    for _ in range(L):  # each round closes at least one more layer, or nothing changes any more
        open_mass = tl.where(open_layer, mass, 0.0)
        open_mass = tl.where(tl.sum(open_mass, axis=0) > 0, open_mass, tl.where(open_layer, 1.0, 0.0))
        sum_mass = tl.sum(open_mass, axis=0)
        closed = tl.sum((m_layer & (open_layer == 0)).to(tl.int64), axis=0)
        rest = (total - cap * closed).to(tl.float64)
        part = rest * (open_mass / tl.where(sum_mass > 0, sum_mass, 1.0))
        share = tl.where(open_layer, part, tl.where(m_layer, full, 0.0))
        open_layer = open_layer & (share < full)
    share = tl.where(share < full, share, tl.where(m_layer, full, 0.0))

    one = tl.full([BL], 1, dtype=tl.int64) << QUANTUM_BITS
    quanta = (share * one.to(tl.float64) + 0.5).to(tl.int64)
    floor = quanta >> QUANTUM_BITS
    remainder = quanta - (floor << QUANTUM_BITS)
    remainder = tl.where(m_layer & (floor < cap), remainder, -1)  # a full layer takes no more
    left = total - tl.sum(tl.where(m_layer, floor, 0), axis=0)
    rank = tl.zeros([BL], dtype=tl.int64)
    for i_other in range(L):  # rank by larger remainder, then lower layer
        other = tl.sum(tl.where(layer == i_other, remainder, 0), axis=0)
        rank += ((other > remainder) | ((other == remainder) & (i_other < layer))).to(tl.int64)
    return tl.where(m_layer, floor + (rank < left).to(tl.int64), 0)


@triton.jit
def sortable_key(b_score):
    """float32 -> int64 in 0..2^32-1 with the same order; -0 equals +0 and NaN counts as -inf."""
    b_score = tl.where(b_score != b_score, float("-inf"), b_score)  # noqa: PLR0124 - the NaN test
    b_score = tl.where(b_score == 0.0, 0.0, b_score)
    bits = b_score.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) + 2147483648


@triton.jit
def kth_key(p_row, count, V, BV: tl.constexpr):
    """The count-th largest key of a row, found bit by bit, and how many of those equal to it belong to the best."""
    threshold = zero(tl.int64)  # largest key that at least `count` keys reach
    bit = threshold + 2147483648
    for _ in range(32):
        candidate = threshold + bit
        b_reached = tl.zeros([BV], dtype=tl.int32)  # counted per lane: one sum over the block a bit
        for start in range(0, V, BV):
            position = start + tl.arange(0, BV)
            m_v = position < V
            key = sortable_key(tl.load(p_row + position, mask=m_v, other=0.0))  # [BV]
            b_reached += (m_v & (key >= candidate)).to(tl.int32)
        threshold = tl.where(tl.sum(b_reached, axis=0) >= count, candidate, threshold)
        bit = bit // 2

    above = zero(tl.int32)
    for start in range(0, V, BV):
        position = start + tl.arange(0, BV)
        m_v = position < V
        key = sortable_key(tl.load(p_row + position, mask=m_v, other=0.0))  # [BV]
        above += tl.sum((m_v & (key > threshold)).to(tl.int32), axis=0)
    return threshold, count - above


@triton.jit
def keep_flags(p_row, start, V, threshold, wanted_ties, ties, BV: tl.constexpr):
    """Positions of a block ``[BV]``, which of them are kept (ties: the lowest), and the ties met so far."""
    position = start + tl.arange(0, BV)
    m_v = position < V
    key = sortable_key(tl.load(p_row + position, mask=m_v, other=0.0))  # [BV]
    tie = (m_v & (key == threshold)).to(tl.int32)
    tie_rank = ties + tl.cumsum(tie, axis=0) - tie
    keep = (m_v & ((key > threshold) | ((tie == 1) & (tie_rank < wanted_ties)))).to(tl.int32)
    return position, keep, ties + tl.sum(tie, axis=0)


@triton.jit(
    do_not_specialize=["L", "N", "slots_per_layer"],
    do_not_specialize_on_alignment=["p_positions", "p_layer_ptr", "p_slots", "p_units"],
)
def view_units_kernel(
    p_positions,  # [N]
    p_layer_ptr,  # [L + 1]
    p_slots,  # [V]
    p_units,  # [N] int32 or int64
    L,
    N,
    slots_per_layer,
    BN: tl.constexpr,
):
    index = tl.program_id(0) * BN + tl.arange(0, BN)
    m_n = index < N
    position = tl.load(p_positions + index, mask=m_n, other=0)
    layer = tl.zeros([BN], dtype=tl.int64)
    for i_layer in range(1, L):
        layer += (index >= tl.load(p_layer_ptr + i_layer)).to(tl.int64)
    slot = tl.load(p_slots + position, mask=m_n, other=0).to(tl.int64)
    unit = layer * slots_per_layer + slot
    tl.store(p_units + index, unit.to(p_units.dtype.element_ty), mask=m_n)


@triton.jit(
    do_not_specialize=["L", "S", "s_layer", "slots_per_layer"],
    do_not_specialize_on_alignment=[
        "p_requests", "p_scores", "p_share", "p_slots", "p_positions", "p_layer_ptr", "p_units",
    ],
)  # fmt: skip
def select_batch_kernel(
    p_requests,  # [S, 4] int32: first vision token, vision tokens, total to keep, where the kept ones start
    p_scores,  # [L, V] float32
    p_share,  # [L, S] int32 budgets if GIVEN, else float32 masses
    p_slots,  # [V]
    p_positions,  # [N] int32
    p_layer_ptr,  # [S, L + 1] int32
    p_units,  # [N] int32 or int64
    L,
    S,
    s_layer,
    slots_per_layer,
    BL: tl.constexpr,
    BV: tl.constexpr,
    QUANTUM_BITS: tl.constexpr,
    GIVEN: tl.constexpr,
):
    """Program (layer, request): all the request's budgets (each program for itself), then its layer's best tokens."""
    i_layer, i_request = tl.program_id(0), tl.program_id(1)
    p_request = p_requests + i_request * 4
    first = tl.load(p_request)
    vision = tl.load(p_request + 1)
    total = tl.load(p_request + 2).to(tl.int64)
    kept = tl.load(p_request + 3)
    layer = tl.arange(0, BL)
    m_layer = layer < L
    share = tl.load(p_share + layer * S + i_request, mask=m_layer, other=0)
    if GIVEN:
        budgets = share
    else:
        mass = share.to(tl.float64)
        budgets = share_out(mass, m_layer, L, total, vision.to(tl.int64), BL, QUANTUM_BITS).to(tl.int32)
    base = tl.sum(tl.where(layer < i_layer, budgets, 0), axis=0)
    count = tl.sum(tl.where(layer == i_layer, budgets, 0), axis=0)
    p_bound = p_layer_ptr + i_request * (L + 1) + i_layer
    tl.store(p_bound, base)
    if i_layer == L - 1:
        tl.store(p_bound + 1, base + count)
    p_row = p_scores + i_layer.to(tl.int64) * s_layer + first
    first_unit = i_layer.to(tl.int64) * slots_per_layer
    threshold, wanted_ties = kth_key(p_row, count, vision, BV)
    written, ties = kept + base, zero(tl.int32)
    for start in range(0, vision, BV):
        position, keep, ties = keep_flags(p_row, start, vision, threshold, wanted_ties, ties, BV)
        m_keep = keep == 1
        target = written + tl.cumsum(keep, axis=0) - keep
        slot = tl.load(p_slots + first + position, mask=m_keep, other=0).to(tl.int64)  # [BV]
        tl.store(p_positions + target, position.to(tl.int32), mask=m_keep)
        tl.store(p_units + target, (first_unit + slot).to(p_units.dtype.element_ty), mask=m_keep)
        written += tl.sum(keep, axis=0)
