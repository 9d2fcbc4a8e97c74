"""Log-sum-exp bases. Ours is base e (suffix ``_e``, as torch's logsumexp); FlashInfer's is base 2 (suffix ``_b2``)."""

import math

import torch

LN2 = math.log(2.0)
LOG2_E = 1.0 / LN2


def compute_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The dtype references calculate in: float64 for float64 inputs (the oracle of the tests), else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def merge_by_lse(
    out_a: torch.Tensor, lse_a_e: torch.Tensor, out_b: torch.Tensor, lse_b_e: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge two attention results over disjoint key sets.

    ``out_*`` are ``[R, H, D]`` and ``lse_*_e`` ``[R, H]``; a part with no keys has ``lse = -inf`` and weight 0 whatever
    its output holds. Where both are empty the result is 0 with ``lse = -inf``. Calculated and returned in the LSE's
    dtype. Source: the associative attention-state operator of FlashInfer (cascade inference), here in base e.
    """
    top = torch.maximum(lse_a_e, lse_b_e)
    safe_top = torch.where(top == -math.inf, torch.zeros_like(top), top)
    weight_a, weight_b = (torch.exp(lse - safe_top) for lse in (lse_a_e, lse_b_e))
    total = weight_a + weight_b
    divisor = torch.where(total == 0, torch.ones_like(total), total)
    # An empty part may carry uninitialised output: drop it before multiplying, 0 * nan is nan.
    parts = [
        torch.where((weight > 0)[..., None], out.to(top.dtype) * (weight / divisor)[..., None], 0.0)
        for out, weight in ((out_a, weight_a), (out_b, weight_b))
    ]
    return parts[0] + parts[1], safe_top + torch.log(total)
