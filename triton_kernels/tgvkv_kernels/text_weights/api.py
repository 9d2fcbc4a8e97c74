"""Public entry of `text_weights`."""

import torch

from tgvkv_kernels.common.checks import (
    check_float,
    check_heads,
    check_kernel_float,
    check_last_dim_contiguous,
    check_same_device,
    check_shape,
)
from tgvkv_kernels.common.dispatch import use_triton
from tgvkv_kernels.common.errors import KernelInputError
from tgvkv_kernels.text_weights.reference import text_weights_reference


def text_weights(
    q: torch.Tensor,
    k: torch.Tensor,
    lse_e: torch.Tensor,
    scale: float,
    *,
    total_q_heads: int | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Weight of each text token: ``w_t = (sum_{q>=t} A[q,t]) / #{q>=t}``, ``A`` the mean over query heads of
    ``exp(q.k*scale - lse)`` (TGV-KV, TWR, with the normalisation of the paper's text).

    Args:
        q: ``[T, Hq, D]`` queries of the T text tokens in order (rotary embedding applied).
        k: ``[T, Hkv, D]`` keys of the same tokens.
        lse_e: ``[T, Hq]`` float32 natural log-sum-exp of each query's *whole* attention row.
        scale: softmax scale.
        total_q_heads: heads of the whole model under tensor parallelism; the mean divides by it, so that the ranks'
            results sum to the weight. Default: ``Hq``.
        backend: see `tgvkv_kernels.common.dispatch.use_triton`.

    Returns:
        ``[T]`` float32. One token of attention 1 on itself has weight 1.

    Raises:
        KernelInputError: shapes, dtypes, heads or devices that do not fit.
    """
    check_shape("q", q, (None, None, None))
    tokens, q_heads, head_dim = q.shape
    check_shape("k", k, (tokens, None, head_dim))
    check_shape("lse_e", lse_e, (tokens, q_heads))
    check_heads(q_heads, k.shape[1])
    for name, tensor in (("q", q), ("k", k), ("lse_e", lse_e)):
        check_float(name, tensor)
    if k.dtype != q.dtype:
        raise KernelInputError(f"k is {k.dtype} but q is {q.dtype}: cast the stored keys to the queries' dtype")
    check_same_device(q=q, k=k, lse_e=lse_e)
    heads = q_heads if total_q_heads is None else total_q_heads
    if heads < q_heads:
        raise KernelInputError(f"total_q_heads={heads} is below this rank's {q_heads} query heads")
    if not use_triton(backend, q.device):
        return text_weights_reference(q, k, lse_e, scale, heads)
    from tgvkv_kernels.text_weights.launch import launch_text_weights

    check_kernel_float("q", q)
    check_last_dim_contiguous("q", q)
    check_last_dim_contiguous("k", k)
    return launch_text_weights(q, k, lse_e, scale, heads)
