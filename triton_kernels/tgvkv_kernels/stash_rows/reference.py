"""`stash_rows` in plain torch; defines correctness."""

import torch


def stash_rows_reference(
    q: torch.Tensor,
    lse_b2: torch.Tensor,
    rows: torch.Tensor,
    targets: torch.Tensor,
    q_stash: torch.Tensor,
    lse_stash_b2: torch.Tensor,
) -> None:
    """See `tgvkv_kernels.stash_rows.api.stash_rows`."""
    q_stash[targets.long()] = q[rows.long()]
    lse_stash_b2[targets.long()] = lse_b2[rows.long()].to(lse_stash_b2.dtype)
