"""Public entries of `select`."""

from collections.abc import Sequence

import torch

from tgvkv_kernels.common.checks import INDEX_DTYPES, check_dtype, check_float, check_same_device, check_shape
from tgvkv_kernels.common.dispatch import use_triton
from tgvkv_kernels.common.errors import KernelInputError
from tgvkv_kernels.common.upload import upload
from tgvkv_kernels.select.limits import LAYER_LIMIT, TOTAL_LIMIT
from tgvkv_kernels.select.reference import select_batch_reference, view_units_reference


def select_batch(
    scores: torch.Tensor,
    layer_mass: torch.Tensor | None,
    vision_lens: Sequence[int],
    totals: Sequence[int],
    span_slots: torch.Tensor,
    slots_per_layer: int,
    *,
    budgets: torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The best vision tokens of each layer, for S requests at once. Nothing synchronises.

    Budgets are shared out to the layers in proportion to their mass, each at most the request's vision tokens (TGV-KV,
    TVB). Water-filling: a layer that is full is closed and its surplus goes to the open ones by mass (evenly if those
    have none). Integers by largest remainder, ties to the lower layer; they sum to the total exactly. Shares are
    float64 snapped to 2**-30: this equals the exact rational result unless two remainders differ by less than that.
    E.g. masses (3, 1), 4 in all of 2 vision tokens -> (2, 2).

    Args:
        scores: ``[L, V]`` float32, the requests' vision tokens one request after the other (higher = keep; ties go to
            the lower position; NaN counts as -inf).
        layer_mass: ``[L, S]`` float; what is negative or not finite counts as 0. Not read, and may be None, where
            ``budgets`` are given.
        vision_lens: vision tokens of each request, V in all. totals: kept tokens of each over all layers, known on the
            host, ``0 <= totals[r] <= L*vision_lens[r]``.
        span_slots: ``[V]`` int32 or int64 slot of each vision token. slots_per_layer: slots of the storage.
        budgets: ``[L, S]`` int32, kept tokens of each layer and request, instead of those made from ``layer_mass``:
            each in 0..vision_lens[r], each request's summing to its total (trusted where they are not on the CPU).

    Returns:
        ``(positions [N] int32, layer_ptr [S, L+1] int32, units [N])`` with ``N = sum(totals)``, one request after the
        other: ``positions`` count from 0 in each request and ascend within each layer; layer ``l`` of request ``r``
        owns its entries ``layer_ptr[r, l]..layer_ptr[r, l+1]``, counted from the request's first. ``units`` are int32
        while ``L*slots_per_layer <= 2**31``, else int64. A request's choice does not depend on the others.

    Raises:
        KernelInputError: shapes, dtypes, lengths or totals that do not fit.
    """
    requests = len(vision_lens)
    check_shape("scores", scores, (None, sum(vision_lens)))
    check_dtype("scores", scores, (torch.float32,))
    layers = scores.shape[0]
    check_shape("span_slots", span_slots, (scores.shape[1],))
    check_dtype("span_slots", span_slots, INDEX_DTYPES)
    if budgets is None:
        if layer_mass is None:
            raise KernelInputError("give layer_mass or budgets")
        check_shape("layer_mass", layer_mass, (layers, requests))
        check_float("layer_mass", layer_mass)
        check_same_device(scores=scores, layer_mass=layer_mass, span_slots=span_slots)
    else:
        check_same_device(scores=scores, budgets=budgets, span_slots=span_slots)
    if not 1 <= layers <= LAYER_LIMIT or requests == 0 or len(totals) != requests:
        raise KernelInputError(
            f"{layers} layers, {requests} vision lengths, {len(totals)} totals: need 1..{LAYER_LIMIT} layers and one "
            "length and total for each request"
        )
    table, first, kept = [], 0, 0
    for vision, total in zip(vision_lens, totals, strict=True):
        if vision < 1 or not 0 <= total <= min(layers * vision, TOTAL_LIMIT):
            raise KernelInputError(f"total={total} is outside 0..{layers}*{vision} (layers * vision tokens)")
        table.append([first, vision, total, kept])
        first, kept = first + vision, kept + total
    if budgets is not None:
        _check_budgets(budgets, layers, vision_lens, totals)
    if not use_triton(backend, scores.device):
        return select_batch_reference(scores, layer_mass, vision_lens, totals, span_slots, slots_per_layer, budgets)
    from tgvkv_kernels.select.launch import launch_select_batch

    dtype = torch.int32 if layers * slots_per_layer <= 2**31 else torch.int64
    rows = upload(torch.tensor(table, dtype=torch.int32), scores.device)
    return launch_select_batch(scores, layer_mass, budgets, rows, kept, span_slots, slots_per_layer, dtype)


def _check_budgets(budgets, layers, vision_lens, totals) -> None:
    check_shape("budgets", budgets, (layers, len(vision_lens)))
    check_dtype("budgets", budgets, (torch.int32,))
    if budgets.device.type != "cpu":
        return
    for request, (own, vision, total) in enumerate(zip(budgets.T.tolist(), vision_lens, totals, strict=True)):
        if min(own) < 0 or max(own) > vision or sum(own) != total:
            raise KernelInputError(
                f"budgets of request {request} are {own}: each must lie in 0..{vision}, the number of its vision "
                f"tokens, and they must sum to its total, {total}"
            )


def view_units(
    positions: torch.Tensor,
    layer_ptr: torch.Tensor,
    span_slots: torch.Tensor,
    slots_per_layer: int,
    *,
    backend: str = "auto",
) -> torch.Tensor:
    """Flat unit ids of an index view: ``units[i] = layer(i) * slots_per_layer + span_slots[positions[i]]``.

    Args:
        positions: ``[N]`` int32 from `select`. layer_ptr: ``[L+1]`` int32. span_slots: ``[V]`` int32 or int64 slots.

    Returns:
        ``[N]`` int32 while ``L*slots_per_layer <= 2**31``, else int64.
    """
    check_shape("positions", positions, (None,))
    check_shape("layer_ptr", layer_ptr, (None,))
    check_shape("span_slots", span_slots, (None,))
    for name, tensor in (("positions", positions), ("layer_ptr", layer_ptr), ("span_slots", span_slots)):
        check_dtype(name, tensor, INDEX_DTYPES)
    check_same_device(positions=positions, layer_ptr=layer_ptr, span_slots=span_slots)
    if not use_triton(backend, positions.device):
        return view_units_reference(positions, layer_ptr, span_slots, slots_per_layer)
    from tgvkv_kernels.select.launch import launch_view_units

    return launch_view_units(positions, layer_ptr, span_slots, slots_per_layer)
