"""Data, poison and tolerances shared by the kernel tests."""

import math

import torch

NAN = float("nan")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(gen: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=gen).to(dtype)


def poisoned_storage(gen, slots, kv_heads, head_dim, dtype, used) -> torch.Tensor:
    """``[slots, Hkv, D]`` with values at the used units and NaN everywhere else (freed memory)."""
    flat = torch.full((slots, kv_heads, head_dim), NAN, dtype=dtype)
    flat[used.long()] = normal(gen, used.shape[0], kv_heads, head_dim, dtype=dtype)
    return flat


def attention_lse(q, keys, visible, scale) -> torch.Tensor:
    """Float32 log-sum-exp (base e) ``[T, Hq]`` of ``q [T, Hq, D]`` over ``keys [n, Hkv, D]``, mask ``[T, n]``."""
    wide = keys.double().repeat_interleave(q.shape[1] // keys.shape[1], dim=1)
    logits = torch.einsum("thd,nhd->thn", q.double(), wide) * scale
    return logits.masked_fill(~visible[:, None, :], -math.inf).logsumexp(-1).float()


def assert_close_to_oracle(name, got, low, exact, factor=4.0) -> None:
    """``got`` may err from the float64 ``exact`` by ``factor`` times what the reference errs in the same precision.

    The factor covers another order of summation and, in 16 bits, probabilities rounded before the second product (as
    flash attention does), each of the size of the reference's own rounding. The tolerance itself must be small against
    the values, else the comparison could not fail.
    """
    assert got.shape == exact.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
    finite = torch.isfinite(exact)
    assert torch.equal(got.double()[~finite], exact[~finite]), f"{name}: infinities differ"
    if not bool(finite.any()):
        return
    got, low, exact = got.double()[finite], low.double()[finite], exact[finite]
    assert bool(torch.isfinite(got).all()), f"{name}: {int((~torch.isfinite(got)).sum())} values are not finite"
    largest = exact.abs().max().item()
    ulp = torch.finfo(torch.float32).eps * largest
    tolerance = factor * max((low - exact).abs().max().item(), ulp)
    assert tolerance <= 0.05 * largest, f"{name}: tolerance {tolerance:.3g} is loose beside values of {largest:.3g}"
    error = (got - exact).abs().max().item()
    assert error <= tolerance, f"{name}: error {error:.3g} above {tolerance:.3g} (values up to {largest:.3g})"


def assert_same_bits(name, got, expected) -> None:
    """Bitwise equality, NaN payloads included."""
    assert got.shape == expected.shape and got.dtype == expected.dtype, f"{name}: {got.dtype} {tuple(got.shape)}"
    as_bytes = [tensor.contiguous().view(torch.uint8) if tensor.numel() else tensor for tensor in (got, expected)]
    assert torch.equal(*as_bytes), f"{name}: bits differ"
