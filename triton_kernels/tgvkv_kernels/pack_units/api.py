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
    buffer: torch.Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Copy unit ``src_units[i]`` to ``dst_units[i]`` in K and in V, for all i at once, bit for bit.

    All sources are read before any destination is written (through a buffer of N units of K and V), so the two lists
    may overlap in any way. Units of all layers go in one call.

    Args:
        k_flat, v_flat: ``[L*slots, Hkv, D]`` flat storage, any dtype.
        src_units, dst_units: ``[N]`` int32 or int64. Destinations must differ from each other.
        buffer: uint8 scratch of at least ``2 * N * Hkv * D * itemsize`` bytes, 16-byte aligned; default: allocated.
        backend: see `tgvkv_kernels.common.dispatch.use_triton`.

    Raises:
        KernelInputError: shapes, dtypes, units or devices that do not fit; repeated destinations (CPU only: on CUDA the
            check would synchronise); a buffer too small.
    """
    check_flat("k_flat", k_flat)
    check_flat("v_flat", v_flat)
    check_shape("v_flat", v_flat, tuple(k_flat.shape))
    if v_flat.dtype != k_flat.dtype:
        raise KernelInputError(f"v_flat is {v_flat.dtype} but k_flat is {k_flat.dtype}: they must agree")
    check_units("src_units", src_units, k_flat.shape[0])
    check_units("dst_units", dst_units, k_flat.shape[0])
    check_shape("dst_units", dst_units, tuple(src_units.shape))
    check_same_device(k_flat=k_flat, v_flat=v_flat, src_units=src_units, dst_units=dst_units, buffer=buffer)
    count = src_units.shape[0]
    if dst_units.device.type == "cpu" and dst_units.unique().numel() != count:
        raise KernelInputError(f"dst_units repeats a unit among its {count}: each destination must occur once")
    needed = 2 * count * k_flat.shape[1] * k_flat.shape[2] * k_flat.element_size()
    if buffer is not None and (buffer.dtype != torch.uint8 or buffer.numel() < needed or not buffer.is_contiguous()):
        raise KernelInputError(
            f"buffer is {buffer.dtype} with {buffer.numel()} elements: need contiguous uint8 with at least {needed}"
        )
    if count == 0:
        return
    if not use_triton(backend, k_flat.device):
        pack_units_reference(k_flat, v_flat, src_units, dst_units)
        return
    from tgvkv_kernels.pack_units.launch import launch_pack_units

    launch_pack_units(k_flat, v_flat, src_units, dst_units, buffer)
