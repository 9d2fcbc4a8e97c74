"""Launch of `stash_rows`."""

import torch

from tgvkv_kernels.common.tiles import block_dim, ceil_div, next_power_of_2
from tgvkv_kernels.stash_rows.kernel import stash_rows_kernel

ROW_BYTES = 8192  # of a program: 4 accesses of 16 bytes a thread


def launch_stash_rows(
    q: torch.Tensor,
    lse_b2: torch.Tensor,
    rows: torch.Tensor,
    targets: torch.Tensor,
    q_stash: torch.Tensor,
    lse_stash_b2: torch.Tensor,
) -> None:
    """Checked arguments of `tgvkv_kernels.stash_rows.api.stash_rows`; one launch."""
    _, heads, head_dim = q.shape
    width = block_dim(head_dim)
    block = min(next_power_of_2(heads), max(1, ROW_BYTES // (width * q.element_size())))
    stash_rows_kernel[(rows.shape[0], ceil_div(heads, block))](
        q, lse_b2, rows.contiguous(), targets.contiguous(), q_stash, lse_stash_b2, *q.stride()[:2], lse_b2.stride(0),
        H=heads, D=head_dim, BD=width, BH=block, num_warps=4,
    )  # fmt: skip
