"""`view_attention`: reference against one softmax over all keys, kernel against the reference."""

import math

import pytest
import torch
from tgvkv_kernels.common.lse import LOG2_E
from tgvkv_kernels.view_attention import view_attention
from tgvkv_kernels.view_attention.reference import attend

from tests.kernels.kernel_support import (
    NAN,
    assert_close_to_oracle,
    assert_same_bits,
    generator,
    normal,
    poisoned_storage,
)

DTYPES = ("float32", "float16", "bfloat16")
HEAD_DIMS = (64, 80, 96, 128, 256)
GROUPS = (1, 4, 8)


def view_case(seed, lengths, rows, group, head_dim, dtype, kv_heads=2, kv_dtype=None):
    """Views of the given lengths in poisoned storage, with a unit table that goes on with ids that do not exist.

    ``rows``: request of each query row, or None for decode. Returns the inputs and the dense part ``(out, lse_b2)``.
    """
    gen = generator(seed)
    used = sum(lengths)
    slots = 2 * used + 3
    ids = torch.randperm(slots, generator=gen)[:used]
    units = torch.cat([ids, torch.full((9,), 2**31 - 1)]).to(torch.int32)
    k_flat, v_flat = (poisoned_storage(gen, slots, kv_heads, head_dim, kv_dtype or dtype, ids) for _ in range(2))
    indptr = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    row_map = None if rows is None else torch.tensor(rows, dtype=torch.int32)
    count = len(lengths) if rows is None else len(rows)
    q = normal(gen, count, group * kv_heads, head_dim, dtype=dtype)
    dense = normal(gen, *q.shape, dtype=dtype), normal(gen, *q.shape[:2]) + 2.0
    return [q, k_flat, v_flat, units, indptr, row_map, head_dim**-0.5], dense


def to_double(value):
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def merged(args, dense, backend, v_scale=1.0):
    """``(out, lse_b2)`` with the view's part, the given ones left as they are."""
    out, lse_b2 = (tensor.clone() for tensor in dense)
    view_attention(*args, out, lse_b2, v_scale=v_scale, backend=backend)
    return out, lse_b2


def check(case, v_scale=1.0):
    args, dense = case
    doubles = [to_double(a) for a in args]
    doubles[2] = doubles[2] * v_scale
    exact = merged(doubles, [to_double(d) for d in dense], "reference")
    low, got = (merged(args, dense, backend, v_scale) for backend in ("reference", "triton"))
    # The dtype's own error on the dense values passes through unchanged, so only rows with units are compared.
    busy = rows_with_units(args)
    for name, g, lo, ex, source in zip(("out", "lse_b2"), got, low, exact, dense, strict=True):
        if busy.any():
            assert_close_to_oracle(name, g[busy], lo[busy], ex[busy])
        if (~busy).any():
            assert_same_bits(f"{name} of rows without units", g[~busy], source[~busy])
            assert_same_bits(f"{name} of rows without units, reference", lo[~busy], source[~busy])


def rows_with_units(args):
    q, indptr, row_map = args[0], args[4], args[5]
    request = torch.arange(q.shape[0]) if row_map is None else row_map.long()
    lengths = torch.cat([indptr.diff(), torch.zeros(1, dtype=torch.int32)])  # -1 finds the appended 0
    return lengths[request] > 0


def with_launch(monkeypatched, function, *args):
    """Run a check with other launch constants."""
    from tgvkv_kernels.view_attention import launch

    kept = {name: getattr(launch, name) for name in monkeypatched}
    try:
        for name, value in monkeypatched.items():
            setattr(launch, name, value)
        return function(*args)
    finally:
        for name, value in kept.items():
            setattr(launch, name, value)


def check_grid(seed, group, head_dim, dtype_name):
    dtype = getattr(torch, dtype_name)
    lengths = [33, 0, 1, 290]  # one chunk, none, one, two
    check(view_case(seed, lengths, None, group, head_dim, dtype))
    rows = [0] * 5 + [-1] + [3] * 7 + [1] * 2
    check(view_case(seed + 2, [33, 0, 1, 70], rows, group, head_dim, dtype))


def check_quantised(kv_dtype_name, dtype_name):
    """K and V of 8 bits beside queries of more; what they were divided by."""
    dtype, kv_dtype = getattr(torch, dtype_name), getattr(torch, kv_dtype_name)
    for rows in (None, [0] * 5 + [-1] + [3] * 7 + [1] * 2):
        args, dense = view_case(40, [33, 0, 1, 290], rows, 4, 80, dtype, kv_dtype=kv_dtype)
        args[-1] *= 0.37
        check((args, dense), v_scale=2.5)


def check_edges(case):
    dtype = torch.bfloat16
    if case == "chunk edges":
        for length in (63, 64, 65, 255, 256, 257, 512, 513):
            check(view_case(length, [length], None, 1, 64, dtype))
    elif case == "skewed budgets":
        check(view_case(1, [40, 1300, 7, 0, 60, 300], None, 4, 64, dtype))
    elif case == "chunks that grow":  # more units than MAX_CHUNKS chunks of the least size hold
        small = {"CHUNK": 64, "MAX_CHUNKS": 3}
        for length in (192, 193, 384, 385, 900):
            with_launch(small, check, view_case(length, [5, length], None, 4, 64, dtype))
    elif case == "more requests than a block":
        lengths = [*torch.randint(0, 20, (37,), generator=generator(2)).tolist(), 300, 0, 2]
        with_launch({"REQUEST_BLOCK": 16}, check, view_case(2, lengths, None, 1, 16, torch.float32, kv_heads=1))
    elif case == "all views empty":
        check(view_case(4, [0, 0], None, 4, 64, dtype))
        check(view_case(4, [0, 0], [0, 1, 1], 4, 64, dtype))
    elif case == "prefill rows out of order":
        check(view_case(5, [40, 1, 67], [2, 0, -1, 2, 1, 0, 0, 2, 1, 1, -1, 0] * 3, 4, 64, dtype))
    elif case == "prefill rows of many tiles":
        check(view_case(6, [30, 66], [0] * 40 + [1] * 41, 4, 64, dtype))
    elif case == "group of three":
        check(view_case(7, [30, 266], None, 3, 64, torch.float32))
        check(view_case(7, [30, 66], [0] * 23 + [1] * 9, 3, 64, torch.float32))
    elif case == "large logits":
        args, dense = view_case(9, [30, 266], None, 4, 64, torch.float32)
        args[0] = args[0] * 100  # exp of the bare logits overflows
        check((args, dense))
    else:
        raise ValueError(case)


EDGES = (
    "chunk edges",
    "skewed budgets",
    "chunks that grow",
    "more requests than a block",
    "all views empty",
    "prefill rows out of order",
    "prefill rows of many tiles",
    "group of three",
    "large logits",
)


def check_same_in_any_batch():
    """A request's bits do not change with its neighbours, nor with how many programs share the work."""
    lengths = [40, 1300, 0, 7, 300, 256]
    args, dense = view_case(30, lengths, None, 4, 64, torch.bfloat16)
    whole = merged(args, dense, "triton")
    for programs in (1, 2, 5):
        for name, got, want in zip(
            ("out", "lse_b2"),
            with_launch({"DECODE_PROGRAMS": programs}, merged, args, dense, "triton"),
            whole,
            strict=True,
        ):
            assert_same_bits(f"{name} by {programs} programs", got, want)
    q, k_flat, v_flat, units, indptr, _, scale = args
    for row in range(len(lengths)):
        own = units[indptr[row] : indptr[row + 1]]
        bounds = torch.tensor([0, len(own)], dtype=torch.int32)
        one = slice(row, row + 1)
        alone = merged([q[one], k_flat, v_flat, own, bounds, None, scale], [d[one] for d in dense], "triton")
        for name, got, want in zip(("out", "lse_b2"), alone, whole, strict=True):
            assert_same_bits(f"{name} of request {row} alone", got, want[one])


def check_prefill_same_in_any_batch():
    rows = [0] * 5 + [1] * 9 + [2] * 20
    args, dense = view_case(31, [40, 700, 9], rows, 4, 64, torch.bfloat16)
    whole = merged(args, dense, "triton")
    q, k_flat, v_flat, units, indptr, row_map, scale = args
    for request in range(3):
        mine = row_map == request
        own = units[indptr[request] : indptr[request + 1]]
        bounds = torch.tensor([0, len(own)], dtype=torch.int32)
        zeros = torch.zeros(int(mine.sum()), dtype=torch.int32)
        alone = merged([q[mine], k_flat, v_flat, own, bounds, zeros, scale], [d[mine] for d in dense], "triton")
        for got, want in zip(alone, whole, strict=True):
            assert_same_bits(f"request {request} alone", got, want[mine])


def check_dense_without_keys():
    """A dense part with LSE -inf has weight 0, whatever its output memory holds."""
    for rows in (None, [0, 1]):
        args, dense = view_case(10, [300, 0], rows, 4, 64, torch.float32)
        dense[1][:] = -math.inf
        dense[0][:] = NAN
        out, lse_b2 = merged(args, dense, "triton")
        q, k_flat, v_flat, units, indptr, _, scale = args
        ids = units[: indptr[1]].long()
        alone, lse_e = attend(q[:1], k_flat[ids], v_flat[ids], scale)
        torch.testing.assert_close(out[:1], alone)
        torch.testing.assert_close(lse_b2[:1], lse_e * LOG2_E)
        assert_same_bits("row without keys at all", out[1], dense[0][1])
        assert bool((lse_b2[1] == -math.inf).all())


def check_writes_stay_inside():
    """Outputs that are slices of a larger buffer: nothing around them changes."""
    args, dense = view_case(11, [20, 300, 0], None, 4, 80, torch.float16)
    buffer = torch.full((5, 10, 96), 7.0, dtype=torch.float16)
    lse_buffer = torch.full((5, 10), 7.0)
    out, lse_b2 = buffer[1:4, 1:9, 8:88], lse_buffer[1:4, 1:9]
    out.copy_(dense[0])
    lse_b2.copy_(dense[1])
    view_attention(*args, out, lse_b2, backend="triton")
    plain = merged(args, dense, "triton")
    assert_same_bits("out", out, plain[0])
    assert_same_bits("lse", lse_b2, plain[1])
    out.fill_(7.0)
    lse_b2.fill_(7.0)
    assert bool((buffer == 7).all()) and bool((lse_buffer == 7).all())


def most_units_of_a_program(lengths, kv_heads):
    """The longest program of a decode launch, by the launch's own rules, in units."""
    from tgvkv_kernels.common.tiles import ceil_div
    from tgvkv_kernels.view_attention.launch import CHUNK, DECODE_PROGRAMS, MAX_CHUNKS, most_chunks

    work = []
    for length in lengths:
        size = max(1, ceil_div(ceil_div(length, MAX_CHUNKS), CHUNK)) * CHUNK
        work += [min(size, length - start) for start in range(0, length, size)]
    assert len(work) <= most_chunks(len(lengths), sum(lengths))
    programs = min(most_chunks(len(lengths), sum(lengths)), ceil_div(DECODE_PROGRAMS, kv_heads))
    return max(sum(work[program::programs]) for program in range(programs))


def check_no_tail():
    """16 requests of 205 units a layer, one of them with ten times as many: no program gets more than one chunk."""
    assert most_units_of_a_program([205] * 15 + [2050], kv_heads=8) <= 256
    assert most_units_of_a_program([205] * 64, kv_heads=8) == 205
    assert most_units_of_a_program([16384], kv_heads=8) == 1024


def test_reference_is_one_softmax_over_dense_and_view_keys():
    args, _ = view_case(20, [6, 0, 9], None, 4, 64, torch.float64)
    q, k_flat, v_flat, units, indptr, _, scale = args
    gen = generator(21)
    dense_k, dense_v = (normal(gen, 5, 2, 64, dtype=torch.float64) for _ in range(2))
    out, lse_e = attend(q, dense_k, dense_v, scale)
    lse_b2 = lse_e * LOG2_E
    view_attention(*args, out, lse_b2)
    for row in range(3):
        ids = units[indptr[row] : indptr[row + 1]].long()
        keys, values = torch.cat([dense_k, k_flat[ids]]), torch.cat([dense_v, v_flat[ids]])
        expected = torch.nn.functional.scaled_dot_product_attention(
            q[row][:, None], keys.transpose(0, 1), values.transpose(0, 1), scale=scale, enable_gqa=True
        )
        torch.testing.assert_close(out[row], expected[:, 0])
        logits = torch.einsum("hd,nhd->hn", q[row], keys.repeat_interleave(4, dim=1)) * scale
        torch.testing.assert_close(torch.exp2(lse_b2[row]), logits.exp().sum(-1))


@pytest.mark.parametrize("rows", [None, [0, 1, 1]])
def test_without_units_nothing_is_read_or_written(rows):
    """No launch, no look at the bounds: on CUDA either would cost every layer of such a batch."""
    args, dense = view_case(22, [0, 0], rows, 4, 64, torch.bfloat16)
    args[3] = args[3][:0]
    for name, got, want in zip(("out", "lse_b2"), merged(args, dense, "auto"), dense, strict=True):
        assert_same_bits(name, got, want)


def test_a_large_budget_is_no_tail(compiler):
    compiler(check_no_tail)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_kernel_matches_reference(interpreted, head_dim, group, dtype):
    interpreted(check_grid, head_dim + group, group, head_dim, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kv_dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_kernel_reads_quantised_kv(interpreted, kv_dtype, dtype):
    interpreted(check_quantised, kv_dtype, dtype)


@pytest.mark.parametrize("case", EDGES)
def test_kernel_edges(interpreted, case):
    interpreted(check_edges, case)


@pytest.mark.parametrize("checked", [check_same_in_any_batch, check_prefill_same_in_any_batch])
def test_a_request_has_the_same_bits_in_any_batch(interpreted, checked):
    interpreted(checked)


def test_dense_part_without_keys(interpreted):
    interpreted(check_dense_without_keys)


def test_kernel_writes_only_its_output(interpreted):
    interpreted(check_writes_stay_inside)
