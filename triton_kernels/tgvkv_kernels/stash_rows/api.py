"""Public entry of `stash_rows`."""

import torch

from tgvkv_kernels.common.checks import (
    INDEX_DTYPES,
    check_dtype,
    check_last_dim_contiguous,
    check_same_device,
    check_shape,
)
from tgvkv_kernels.common.dispatch import use_triton
from tgvkv_kernels.common.errors import KernelInputError
from tgvkv_kernels.stash_rows.reference import stash_rows_reference


def stash_rows(
    q: torch.Tensor,
    lse_b2: torch.Tensor,
    rows: torch.Tensor,
    targets: torch.Tensor,
    q_stash: torch.Tensor,
    lse_stash_b2: torch.Tensor,
    *,
    backend: str = "auto",
) -> None:
    """``q_stash[targets[i]] = q[rows[i]]`` and the same of the LSE, for one layer and all scoring requests at once.

    Args:
        q: ``[R, Hq, D]`` the forward's queries. lse_b2: ``[R, Hq]`` float32 LSE of their whole attention rows, base 2.
        rows, targets: ``[t]`` int32 or int64; targets differ from each other.
        q_stash: ``[T, Hq, D]`` (dtype of ``q``). lse_stash_b2: ``[T, Hq]`` float32. Both contiguous: one layer of the
            stash ``[L, T, Hq, D]``, ``[L, T, Hq]`` that `tgvkv_kernels.batch_scores` reads. Other rows are left.
        backend: see `tgvkv_kernels.common.dispatch.use_triton`.

    Raises:
        KernelInputError: shapes, dtypes or devices that do not fit.
    """
    check_shape("q", q, (None, None, None))
    heads, head_dim = q.shape[1:]
    check_shape("lse_b2", lse_b2, (q.shape[0], heads))
    check_shape("rows", rows, (None,))
    check_shape("targets", targets, tuple(rows.shape))
    check_shape("q_stash", q_stash, (None, heads, head_dim))
    check_shape("lse_stash_b2", lse_stash_b2, (q_stash.shape[0], heads))
    check_dtype("rows", rows, INDEX_DTYPES)
    check_dtype("targets", targets, INDEX_DTYPES)
    check_dtype("q_stash", q_stash, (q.dtype,))
    for name, tensor in (("q_stash", q_stash), ("lse_stash_b2", lse_stash_b2)):
        if not tensor.is_contiguous():
            raise KernelInputError(f"{name} has strides {tensor.stride()}: it must be contiguous")
    check_same_device(q=q, lse_b2=lse_b2, rows=rows, targets=targets, q_stash=q_stash, lse_stash_b2=lse_stash_b2)
    if rows.shape[0] == 0:
        return
    if not use_triton(backend, q.device):
        stash_rows_reference(q, lse_b2, rows, targets, q_stash, lse_stash_b2)
        return
    from tgvkv_kernels.stash_rows.launch import launch_stash_rows

    check_last_dim_contiguous("q", q)
    check_last_dim_contiguous("lse_b2", lse_b2)
    launch_stash_rows(q, lse_b2, rows, targets, q_stash, lse_stash_b2)
