"""`pack_units` in plain torch; defines correctness."""

import torch


def pack_units_reference(
    k_flat: torch.Tensor, v_flat: torch.Tensor, src_units: torch.Tensor, dst_units: torch.Tensor
) -> None:
    """See `tgvkv_kernels.pack_units.api.pack_units`."""
    for flat in (k_flat, v_flat):
        flat[dst_units.long()] = flat[src_units.long()]  # the right side is a copy, so overlap is harmless
