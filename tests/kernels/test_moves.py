"""`pack_units` and `dense_rows`: references against Python lists, kernels equal to the references bit for bit."""

import pytest
import torch
from tgvkv_kernels.common.errors import KernelInputError
from tgvkv_kernels.dense_rows import dense_rows
from tgvkv_kernels.pack_units import pack_units

from tests.kernels.kernel_support import assert_same_bits, generator

STORAGE = {
    "bfloat16 8x128": (torch.bfloat16, 8, 128),
    "float16 2x80": (torch.float16, 2, 80),
    "float32 1x256": (torch.float32, 1, 256),
    "uint8 4x96 (fp8)": (torch.uint8, 4, 96),
    "float16 3x7, odd rows": (torch.float16, 3, 7),
    "float32 9x256, longer than a tile": (torch.float32, 9, 256),
}
OVERLAPS = ("disjoint", "same", "swap", "shift up", "shift down", "random")


def storage(seed, units, kind):
    """Random bit patterns: NaNs with payloads, infinities and denormals among them."""
    dtype, heads, dim = STORAGE[kind]
    raw = torch.randint(0, 256, (units, heads, dim * dtype.itemsize), generator=generator(seed), dtype=torch.uint8)
    return raw.view(dtype)


def unit_lists(overlap, count):
    total = 3 * count + 2
    order = torch.arange(total)
    gen = generator(count)
    pairs = {
        "disjoint": (order[:count], order[count : 2 * count]),
        "same": (order[:count], order[:count]),
        "swap": (order[:count], order[:count].flip(0)),
        "shift up": (order[:count], order[1 : count + 1]),
        "shift down": (order[1 : count + 1], order[:count]),
        "random": tuple(torch.randperm(total, generator=gen)[:count] for _ in range(2)),
    }
    return total, *pairs[overlap]


def check_pack(kind, overlap, count):
    total, src, dst = unit_lists(overlap, count)
    start = [storage(seed, total, kind) for seed in (1, 2)]
    expected = [flat.clone() for flat in start]
    pack_units(*expected, src, dst)
    got = [flat.clone() for flat in start]
    pack_units(*got, src.int(), dst, backend="triton")
    for name, g, ex in zip("kv", got, expected, strict=True):
        assert_same_bits(f"{name} of {kind}, {overlap}", g, ex)


def check_pack_layouts():
    """Storage that is a slice of a wider one (strided rows)."""
    wide = torch.randint(0, 256, (2, 20, 600), generator=generator(3), dtype=torch.uint8).view(torch.float16)
    src, dst = torch.tensor([4, 0, 9]), torch.tensor([0, 1, 2])
    expected, got = wide.clone(), wide.clone()
    for flats, backend in ((expected, "reference"), (got, "triton")):
        k_flat, v_flat = (flats[half, :, 3:259].unflatten(1, (2, 128)) for half in range(2))
        pack_units(k_flat, v_flat, src, dst, backend=backend)
    assert_same_bits("storage and what lies beside it", got, expected)


def rows_case(seed, lengths, hole_lists, pools=None, width=700):
    gen = generator(seed)
    batch = len(lengths)
    table = torch.randint(1, 10**6, (batch + 2, width), generator=gen, dtype=torch.int32)
    pools = (
        torch.randperm(batch + 2, generator=gen)[:batch] if pools is None else torch.tensor(pools, dtype=torch.int64)
    )
    for row, length in zip(pools.tolist(), lengths, strict=True):
        if row >= 0:
            table[row, length:] = -(2**31)  # never to be read
    holes = [hole for row in hole_lists for hole in row]
    start, end = (torch.tensor([hole[side] for hole in holes], dtype=torch.int32) for side in range(2))
    indptr = torch.tensor([0] + [len(row) for row in hole_lists]).cumsum(0).to(torch.int32)
    return table, pools, torch.tensor(lengths, dtype=torch.int64), start, end, indptr


CASES = {
    "no requests": ([], []),
    "one token": ([1], [[]]),
    "empty row": ([0, 3], [[], []]),
    "all hole": ([6], [[(0, 6)]]),
    "ragged": (
        [600, 1, 513, 512],
        [[(2, 300), (300, 301), (400, 599)], [], [(0, 1), (511, 513)], [(7, 7), (100, 500)]],
    ),
    "padding": ([40, 9, 3], [[(1, 30)], [(0, 2)], []], [2, -1, 0]),
}


def python_rows(table, pools, lengths, start, end, indptr):
    rows = []
    for b, (pool, length) in enumerate(zip(pools.tolist(), lengths.tolist(), strict=True)):
        hidden = {p for h in range(indptr[b], indptr[b + 1]) for p in range(int(start[h]), int(end[h]))}
        rows.append([int(table[pool, p]) for p in range(length) if p not in hidden] if pool >= 0 else [])
    return rows


def rows_of(args, backend):
    """``(kv_indices [total], kv_indptr [B+1])`` out of larger buffers: what lies beyond them stays as it was."""
    batch, total = args[1].shape[0], sum(map(len, python_rows(*args)))
    indices = torch.full((total + 5,), -7, dtype=torch.int32)
    indptr = torch.full((batch + 4,), -7, dtype=torch.int32)
    dense_rows(*args, indices, indptr, backend=backend)
    assert bool((indices[total:] == -7).all()) and bool((indptr[batch + 1 :] == -7).all())
    return indices[:total], indptr[: batch + 1]


def check_rows(case):
    args = rows_case(5, *CASES[case])
    for got, want in zip(rows_of(args, "triton"), rows_of(args, "reference"), strict=True):
        assert_same_bits(case, got, want)


def check_many_requests():
    """More requests than the bounds kernel holds at once."""
    lengths = torch.randint(0, 9, (1300,), generator=generator(8)).tolist()
    args = rows_case(8, lengths, [[(0, length // 2)] for length in lengths], width=16)
    indptr = torch.full((1301,), -7, dtype=torch.int32)
    from tgvkv_kernels.dense_rows.launch import launch_row_bounds

    launch_row_bounds(args[1:], indptr)
    assert_same_bits("indptr", indptr, rows_of(args, "reference")[1])


@pytest.mark.parametrize("overlap", OVERLAPS)
def test_pack_reference_equals_a_python_copy(overlap):
    total, src, dst = unit_lists(overlap, 7)
    k_flat, v_flat = (storage(seed, total, "float16 2x80") for seed in (1, 2))
    want = []
    for flat in (k_flat, v_flat):
        rows = [row.clone() for row in flat]
        for s, d in zip(src.tolist(), dst.tolist(), strict=True):
            rows[d] = flat[s].clone()
        want.append(torch.stack(rows))
    pack_units(k_flat, v_flat, src, dst)
    assert_same_bits("k", k_flat, want[0])
    assert_same_bits("v", v_flat, want[1])


@pytest.mark.parametrize("case", CASES)
def test_rows_reference_equals_python_lists(case):
    args = rows_case(5, *CASES[case])
    rows = python_rows(*args)
    kv_indices, kv_indptr = rows_of(args, "reference")
    assert kv_indices.tolist() == sum(rows, [])
    assert kv_indptr.diff().tolist() == [len(row) for row in rows] and int(kv_indptr[0]) == 0


@pytest.mark.parametrize("kind", STORAGE)
def test_pack_kernel_is_exact(interpreted, kind):
    for overlap in OVERLAPS:
        interpreted(check_pack, kind, overlap, 13)
    interpreted(check_pack, kind, "random", 1)
    interpreted(check_pack, kind, "disjoint", 0)


def test_pack_kernel_layouts(interpreted):
    interpreted(check_pack_layouts)


@pytest.mark.parametrize("case", CASES)
def test_rows_kernels_are_exact(interpreted, case):
    interpreted(check_rows, case)


def test_rows_kernel_with_many_requests(interpreted):
    interpreted(check_many_requests)


def test_errors_name_the_value():
    k_flat, v_flat = (torch.zeros(4, 1, 8) for _ in range(2))
    with pytest.raises(KernelInputError, match="dst_units repeats"):
        pack_units(k_flat, v_flat, torch.tensor([0, 1]), torch.tensor([2, 2]))
    with pytest.raises(KernelInputError, match=r"\[0, 4\]"):
        pack_units(k_flat, v_flat, torch.tensor([0, 4]), torch.tensor([2, 3]))
    args = rows_case(5, [6], [[(3, 5), (4, 6)]])
    with pytest.raises(KernelInputError, match=r"hole 1 = \[4, 6\)"):
        dense_rows(*args, torch.empty(6, dtype=torch.int32), torch.empty(2, dtype=torch.int32))
    args = rows_case(5, [6], [[]])
    with pytest.raises(KernelInputError, match="holds 5 indices, 6 are needed"):
        dense_rows(*args, torch.empty(5, dtype=torch.int32), torch.empty(2, dtype=torch.int32))
