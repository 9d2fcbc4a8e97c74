"""Launches of `select`."""

import torch

from tgvkv_kernels.common.tiles import ceil_div, next_power_of_2
from tgvkv_kernels.select.kernel import (
    select_batch_kernel,
    view_units_kernel,
)
from tgvkv_kernels.select.limits import QUANTUM_BITS

TOP_BLOCK = 1024  # one for all image sizes; longer rows loop
UNITS_BLOCK = 256


def launch_view_units(
    positions: torch.Tensor, layer_ptr: torch.Tensor, span_slots: torch.Tensor, slots_per_layer: int
) -> torch.Tensor:
    """Checked arguments of `tgvkv_kernels.select.api.view_units`; one launch."""
    layers, count = layer_ptr.shape[0] - 1, positions.shape[0]
    dtype = torch.int32 if layers * slots_per_layer <= 2**31 else torch.int64
    units = torch.empty(count, dtype=dtype, device=positions.device)
    if count:
        view_units_kernel[(ceil_div(count, UNITS_BLOCK),)](
            positions.contiguous(),
            layer_ptr.contiguous(),
            span_slots.contiguous(),
            units,
            layers,
            count,
            slots_per_layer,
            BN=UNITS_BLOCK,
        )
    return units


def launch_select_batch(
    scores: torch.Tensor,
    layer_mass: torch.Tensor | None,
    budgets: torch.Tensor | None,
    requests: torch.Tensor,
    kept: int,
    span_slots: torch.Tensor,
    slots_per_layer: int,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Checked arguments of `tgvkv_kernels.select.api.select_batch`; one launch. ``requests``: see the kernel.
    ``layer_mass`` is not read where ``budgets`` are given."""
    layers, count, device = scores.shape[0], requests.shape[0], scores.device
    positions = torch.empty(kept, dtype=torch.int32, device=device)
    layer_ptr = torch.empty(count, layers + 1, dtype=torch.int32, device=device)
    units = torch.empty(kept, dtype=dtype, device=device)
    scores = scores if scores.stride(1) == 1 else scores.contiguous()
    select_batch_kernel[(layers, count)](
        requests,
        scores,
        (layer_mass if budgets is None else budgets).contiguous(),
        span_slots.contiguous(),
        positions,
        layer_ptr,
        units,
        layers,
        count,
        scores.stride(0),
        slots_per_layer,
        BL=next_power_of_2(layers),
        BV=TOP_BLOCK,
        QUANTUM_BITS=QUANTUM_BITS,
        GIVEN=budgets is not None,
        num_warps=8,
    )
    return positions, layer_ptr, units
