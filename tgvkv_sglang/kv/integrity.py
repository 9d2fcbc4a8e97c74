"""The ownership invariant: every slot has exactly one owner (docs/design.md "Rules")."""

from __future__ import annotations

import torch

from ..errors import IntegrityError
from .evictor import Evictor
from .radix import SpanTree


def owned_slots(tree: SpanTree) -> torch.Tensor:
    """All slots owned by nodes and packed views, with repetitions if there are any. int64."""
    parts = [torch.empty(0, dtype=torch.int64)]
    for node in tree.nodes():
        if node.value is not None:
            parts.append(node.value.cpu())
        parts.extend(view.block.cpu() for view in node.views if view.block is not None)
    return torch.cat(parts)


def check_sums(tree: SpanTree, free: int, capacity: int) -> None:
    """Raise unless ``free`` slots and those of the tree are all there are; for when no request holds any.

    Raises:
        IntegrityError: with the numbers.
    """
    if free + tree.total != capacity:
        raise IntegrityError(
            f"KV slot accounting is broken: free {free} + tree and views {tree.total} != total {capacity}"
        )


def check(evictor: Evictor, free: torch.Tensor, capacity: int, held_by_requests: int = 0) -> None:
    """Raise unless ``free + tree + views + requests = total``, with no slot owned twice and slot 0 owned by nobody.

    Reads every slot, from the device too: milliseconds in a large pool.

    Args:
        free: slots in the allocator's free list.
        capacity: slots 1..capacity exist.
        held_by_requests: slots that running requests hold privately.

    Raises:
        IntegrityError: with the numbers.
    """
    tree = evictor.tree
    owned = owned_slots(tree)
    everything = torch.cat([owned, free.cpu()])
    problems = []
    if len(owned) != tree.total:
        problems.append(f"the tree accounts {tree.total} slots and owns {len(owned)}")
    if len(everything) + held_by_requests != capacity:
        problems.append(
            f"free {len(free)} + tree and views {len(owned)} + requests {held_by_requests} != total {capacity}"
        )
    values, counts = torch.unique(everything, return_counts=True)
    if (counts > 1).any():
        problems.append(f"slots with two owners: {values[counts > 1][:8].tolist()}")
    if len(values) and (int(values[0]) < 1 or int(values[-1]) > capacity):
        problems.append(f"slots outside 1..{capacity}: from {int(values[0])} to {int(values[-1])}")
    locked = sum(node.own_slots for node in tree.nodes() if node.lock_ref)
    if locked != tree.locked:
        problems.append(f"locked nodes own {locked} slots, the tree accounts {tree.locked}")
    for node in tree.nodes():
        if len(node.through) > node.lock_ref:
            problems.append(f"span [{node.start}, {node.end}): {len(node.through)} users hold {node.lock_ref} locks")
    if not 0 <= evictor.evictable <= tree.total:
        problems.append(f"evictable {evictor.evictable} of total {tree.total}, locked {locked}")
    if problems:
        raise IntegrityError("KV slot accounting is broken: " + "; ".join(problems))
