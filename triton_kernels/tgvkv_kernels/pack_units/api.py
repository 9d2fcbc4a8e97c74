"""Public entry of `pack_units`."""

import torch

from tgvkv_kernels.common.checks import check_flat, check_same_device, check_shape, check_units
from tgvkv_kernels.common.dispatch import use_triton
from tgvkv_kernels.common.errors import KernelInputError
from tgvkv_kernels.pack_units.reference import pack_units_reference


def pack_units(
    k_flat: torch.Tensor,
    v_flat: torch.Tensor,
    src_units: torch.Tensor,
    dst_units: torch.Tensor,
    *,
    backend: str = "auto",
) -> None:
    """Copy unit ``src_units[i]`` to ``dst_units[i]`` in K and in V, for all i at once, bit for bit.

    All sources are read before any destination is written (through a buffer of N units of K and V), so the two lists
    may overlap in any way. Units of all layers go in one call.

    Args:
        k_flat, v_flat: ``[L*slots, Hkv, D]`` flat storage, any dtype.
        src_units, dst_units: ``[N]`` int32 or int64. Destinations must differ from each other.
        backend: see `tgvkv_kernels.common.dispatch.use_triton`.

    Raises:
        KernelInputError: shapes, dtypes, units or devices that do not fit; repeated destinations (CPU only: on CUDA the
            check would synchronise).
    """
    check_flat("k_flat", k_flat)
    check_flat("v_flat", v_flat)
    check_shape("v_flat", v_flat, tuple(k_flat.shape))
    if v_flat.dtype != k_flat.dtype:
        raise KernelInputError(f"v_flat is {v_flat.dtype} but k_flat is {k_flat.dtype}: they must agree")
    check_units("src_units", src_units, k_flat.shape[0])
    check_units("dst_units", dst_units, k_flat.shape[0])
    check_shape("dst_units", dst_units, tuple(src_units.shape))
    check_same_device(k_flat=k_flat, v_flat=v_flat, src_units=src_units, dst_units=dst_units)
    count = src_units.shape[0]
    if dst_units.device.type == "cpu" and dst_units.unique().numel() != count:
        raise KernelInputError(f"dst_units repeats a unit among its {count}: each destination must occur once")
    if count == 0:
        return
    if not use_triton(backend, k_flat.device):
        pack_units_reference(k_flat, v_flat, src_units, dst_units)
        return
    from tgvkv_kernels.pack_units.launch import launch_pack_units

    launch_pack_units(k_flat, v_flat, src_units, dst_units)
