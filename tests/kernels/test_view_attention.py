"""`view_attention`: reference against one softmax over all keys, kernel against the reference."""

import math

import pytest
import torch
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


def view_case(seed, lengths, rows, group, head_dim, dtype, kv_heads=2, dense=True):
    """Views of the given lengths in poisoned storage, with a unit table that goes on with ids that do not exist.

    ``rows``: request of each query row, or None for decode.
    """
    gen = generator(seed)
    used = sum(lengths)
    slots = 2 * used + 3
    ids = torch.randperm(slots, generator=gen)[:used]
    units = torch.cat([ids, torch.full((9,), 2**31 - 1)]).to(torch.int32)
    k_flat, v_flat = (poisoned_storage(gen, slots, kv_heads, head_dim, dtype, ids) for _ in range(2))
    indptr = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    row_map = None if rows is None else torch.tensor(rows, dtype=torch.int32)
    count = len(lengths) if rows is None else len(rows)
    q = normal(gen, count, group * kv_heads, head_dim, dtype=dtype)
    args = [q, k_flat, v_flat, units, indptr, row_map, head_dim**-0.5]
    if dense:
        dense_out = normal(gen, *q.shape, dtype=dtype)
        return args, {"dense_out": dense_out, "dense_lse_e": normal(gen, *q.shape[:2]) + 2.0}
    return args, {}


def to_double(value):
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def check(case, num_splits, in_place=False):
    args, dense = case
    exact = view_attention(*map(to_double, args), **{k: to_double(v) for k, v in dense.items()})
    low = view_attention(*args, **dense)
    given = {k: v.clone() for k, v in dense.items()}
    if in_place:
        given |= {"out": given["dense_out"], "out_lse_e": given["dense_lse_e"]}
    got = view_attention(*args, **given, num_splits=num_splits, backend="triton")
    if in_place:
        assert got[0] is given["dense_out"] and got[1] is given["dense_lse_e"]
    # The dtype's own error on the dense values passes through unchanged, so only rows with units are compared.
    busy = rows_with_units(args)
    for name, g, lo, ex in zip(("out", "lse_e"), got, low, exact, strict=True):
        if busy.any():
            assert_close_to_oracle(name, g[busy], lo[busy], ex[busy])
        if (~busy).any():
            assert_same_bits(f"{name} of rows without units", g[~busy], lo[~busy])
            if dense:
                source = dense["dense_out" if name == "out" else "dense_lse_e"]
                assert_same_bits(f"{name} passed through", g[~busy], source[~busy])


def rows_with_units(args):
    q, indptr, row_map = args[0], args[4], args[5]
    request = torch.arange(q.shape[0]) if row_map is None else row_map.long()
    lengths = torch.cat([indptr.diff(), torch.zeros(1, dtype=torch.int32)])  # -1 finds the appended 0
    return lengths[request] > 0


def check_grid(seed, group, head_dim, dtype_name):
    dtype = getattr(torch, dtype_name)
    lengths = [33, 0, 1, 70]
    check(view_case(seed, lengths, None, group, head_dim, dtype), num_splits=1)
    check(view_case(seed + 1, lengths, None, group, head_dim, dtype), num_splits=3, in_place=True)
    rows = [0] * 5 + [-1] + [3] * 7 + [1] * 2
    check(view_case(seed + 2, lengths, rows, group, head_dim, dtype), num_splits=1)


def check_edges(case):
    dtype = torch.bfloat16
    if case == "one request, default splits":
        check(view_case(1, [150], None, 4, 64, dtype), num_splits=None)
    elif case == "more splits than units":
        check(view_case(2, [3, 0, 2], None, 4, 64, dtype), num_splits=5)
    elif case == "block edges":
        for length in (63, 64, 65, 128, 129):
            check(view_case(length, [length], None, 1, 64, dtype), num_splits=2)
    elif case == "no dense part":
        for splits in (1, 2):
            check(view_case(3, [0, 5, 90], None, 8, 64, dtype, dense=False), num_splits=splits)
    elif case == "all views empty":
        check(view_case(4, [0, 0], None, 4, 64, dtype), num_splits=1)
        check(view_case(4, [0, 0], None, 4, 64, dtype), num_splits=2, in_place=True)
    elif case == "prefill rows out of order":
        rows = [2, 0, -1, 2, 1, 0, 0, 2, 1, 1, -1, 0] * 3
        for splits in (1, 2):
            check(view_case(5, [40, 1, 67], rows, 4, 64, dtype), num_splits=splits)
    elif case == "prefill rows of many tiles":
        check(view_case(6, [30, 66], [0] * 40 + [1] * 41, 4, 64, dtype), num_splits=1)
    elif case == "group of three":
        check(view_case(7, [30, 66], None, 3, 64, torch.float32), num_splits=1)
        check(view_case(7, [30, 66], [0] * 23 + [1] * 9, 3, 64, torch.float32), num_splits=2)
    elif case == "large logits":
        args, dense = view_case(9, [30, 66], None, 4, 64, torch.float32)
        args[0] = args[0] * 100  # exp of the bare logits overflows
        check((args, dense), num_splits=2)
    else:
        raise ValueError(case)


EDGES = (
    "one request, default splits",
    "more splits than units",
    "block edges",
    "no dense part",
    "all views empty",
    "prefill rows out of order",
    "prefill rows of many tiles",
    "group of three",
    "large logits",
)


def check_dense_without_keys():
    """A dense part with LSE -inf has weight 0, whatever its output memory holds."""
    args, dense = view_case(10, [20, 0], None, 4, 64, torch.float32)
    dense["dense_lse_e"][:] = -math.inf
    dense["dense_out"][:] = NAN
    alone = view_attention(*args, num_splits=1, backend="triton")
    for splits in (1, 2):
        out, lse_e = view_attention(*args, **dense, num_splits=splits, backend="triton")
        torch.testing.assert_close(out[0], alone[0][0])
        torch.testing.assert_close(lse_e[0], alone[1][0])
        assert_same_bits("row without keys at all", out[1], dense["dense_out"][1])
        assert bool((lse_e[1] == -math.inf).all())


def check_writes_stay_inside():
    """Outputs that are slices of a larger buffer: nothing around them changes."""
    args, dense = view_case(11, [20, 70, 0], None, 4, 80, torch.float16)
    for splits in (1, 3):
        buffer = torch.full((5, 10, 96), 7.0, dtype=torch.float16)
        lse_buffer = torch.full((5, 10), 7.0)
        out, out_lse_e = buffer[1:4, 1:9, 8:88], lse_buffer[1:4, 1:9]
        view_attention(*args, **dense, out=out, out_lse_e=out_lse_e, num_splits=splits, backend="triton")
        plain = view_attention(*args, **dense, num_splits=splits, backend="triton")
        assert_same_bits("out", out, plain[0])
        assert_same_bits("lse", out_lse_e, plain[1])
        out.fill_(7.0)
        out_lse_e.fill_(7.0)
        assert bool((buffer == 7).all()) and bool((lse_buffer == 7).all())


def test_reference_is_one_softmax_over_dense_and_view_keys():
    args, _ = view_case(20, [6, 0, 9], None, 4, 64, torch.float64, dense=False)
    q, k_flat, v_flat, units, indptr, _, scale = args
    gen = generator(21)
    dense_k, dense_v = (normal(gen, 5, 2, 64, dtype=torch.float64) for _ in range(2))
    dense_out, dense_lse_e = attend(q, dense_k, dense_v, scale)
    out, _ = view_attention(*args, dense_out=dense_out, dense_lse_e=dense_lse_e)
    for row in range(3):
        ids = units[indptr[row] : indptr[row + 1]].long()
        keys, values = torch.cat([dense_k, k_flat[ids]]), torch.cat([dense_v, v_flat[ids]])
        expected = torch.nn.functional.scaled_dot_product_attention(
            q[row][:, None], keys.transpose(0, 1), values.transpose(0, 1), scale=scale, enable_gqa=True
        )
        torch.testing.assert_close(out[row], expected[:, 0])


def test_no_units_returns_the_dense_part_itself():
    args, dense = view_case(22, [0, 0], None, 4, 64, torch.bfloat16)
    args[3] = args[3][:0]
    out, lse_e = view_attention(*args, **dense)
    assert out is dense["dense_out"] and lse_e is dense["dense_lse_e"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_kernel_matches_reference(interpreted, head_dim, group, dtype):
    interpreted(check_grid, head_dim + group, group, head_dim, dtype)


@pytest.mark.parametrize("case", EDGES)
def test_kernel_edges(interpreted, case):
    interpreted(check_edges, case)


def test_dense_part_without_keys(interpreted):
    interpreted(check_dense_without_keys)


def test_kernel_writes_only_its_output(interpreted):
    interpreted(check_writes_stay_inside)
