"""Budgets, stable top-k and view tables in plain torch; defines correctness."""

from collections.abc import Sequence

import torch

from tgvkv_kernels.select.limits import QUANTUM_BITS


def layer_budgets_reference(layer_mass: torch.Tensor, total: int, cap: int) -> torch.Tensor:
    """See `tgvkv_kernels.select.api.layer_budgets`."""
    layers = layer_mass.shape[0]
    mass = layer_mass.to(torch.float64)
    mass = torch.where(mass.isfinite(), mass.clamp_min(0.0), 0.0)
    capped = torch.zeros(layers, dtype=torch.bool, device=mass.device)
    share = torch.zeros_like(mass)
    for _ in range(layers):  # each round caps at least one more layer, or nothing changes any more
        free_mass = torch.where(capped, 0.0, mass)
        # Where no open layer has mass the rest is shared evenly, else it could not be placed at all.
        free_mass = torch.where(free_mass.sum() > 0, free_mass, (~capped).to(torch.float64))
        rest = total - cap * capped.sum()
        share = torch.where(capped, float(cap), rest * (free_mass / free_mass.sum().clamp_min(1e-300)))
        capped = capped | (share >= cap)
    share = share.clamp_max(float(cap))
    quanta = (share * 2**QUANTUM_BITS + 0.5).to(torch.int64)
    floor = quanta >> QUANTUM_BITS
    remainder = quanta - (floor << QUANTUM_BITS)
    remainder = torch.where(floor >= cap, -1, remainder)  # a full layer takes no more
    order = torch.argsort(remainder, descending=True, stable=True)  # ties: lower layer first
    rank = torch.empty_like(order)
    rank[order] = torch.arange(layers, device=order.device)
    return (floor + (rank < total - floor.sum())).to(torch.int32)


def top_positions_reference(scores: torch.Tensor, budget: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``budget[l]`` best positions of each row, ascending -> ``(positions [N] int32, layer_ptr [L+1] int32)``."""
    layers, _ = scores.shape
    clean = torch.where(torch.isnan(scores), -torch.inf, scores)
    order = torch.argsort(clean, dim=1, descending=True, stable=True)  # ties: lower position first
    kept = [order[layer, :count].sort().values for layer, count in enumerate(budget.tolist())]
    layer_ptr = torch.zeros(layers + 1, dtype=torch.int32, device=scores.device)
    layer_ptr[1:] = budget.cumsum(0)
    return torch.cat(kept).to(torch.int32), layer_ptr


def view_units_reference(
    positions: torch.Tensor, layer_ptr: torch.Tensor, span_slots: torch.Tensor, slots_per_layer: int
) -> torch.Tensor:
    """See `tgvkv_kernels.select.api.view_units`."""
    layers = layer_ptr.shape[0] - 1
    layer = torch.repeat_interleave(torch.arange(layers, device=positions.device), layer_ptr.diff().long())
    units = layer * slots_per_layer + span_slots.long()[positions.long()]
    return units.to(torch.int32 if layers * slots_per_layer <= 2**31 else torch.int64)


def select_batch_reference(
    scores: torch.Tensor,
    layer_mass: torch.Tensor | None,
    vision_lens: Sequence[int],
    totals: Sequence[int],
    span_slots: torch.Tensor,
    slots_per_layer: int,
    budgets: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `tgvkv_kernels.select.api.select_batch`: one request after the other."""
    chosen, start = [], 0
    for request, (vision, total) in enumerate(zip(vision_lens, totals, strict=True)):
        own = slice(start, start + vision)
        budget = (
            layer_budgets_reference(layer_mass[:, request], total, vision) if budgets is None else budgets[:, request]
        )
        positions, layer_ptr = top_positions_reference(scores[:, own], budget)
        units = view_units_reference(positions, layer_ptr, span_slots[own], slots_per_layer)
        chosen.append((positions, layer_ptr, units))
        start += vision
    positions, layer_ptr, units = zip(*chosen, strict=True)
    return torch.cat(positions), torch.stack(layer_ptr), torch.cat(units)
