"""The unit store: one tensor for K and one for V, addressed by flat unit ids (docs/design.md "Terms").

Layer ``l`` of slot ``s`` is row ``l * slots + s`` of the flat view. A packed view may keep a layer's unit in any
row, which is why everything past selection speaks of units and never of (layer, slot) pairs.
"""

from __future__ import annotations

from typing import Sequence

import torch
from tgvkv_kernels.pack_units.api import pack_units

from ..errors import KVLayoutError

INT32_LIMIT = 2**31


class UnitStore:
    """Flat views of the KV pool.

    Args:
        k: ``[L, slots, kv_heads, head_dim]`` contiguous.
        v: ``[L, slots, kv_heads, v_head_dim]`` contiguous.

    Attributes:
        k_flat, v_flat: ``[L * slots, kv_heads, dim]`` in the dtype that is stored (8 bits with quantised KV).
        factors: of each layer, what its K and its V were divided by when they were stored; 1.0 unless :meth:`scale`.
        k_scales: ``[L]`` float32 the factors of K on the device; None where all are 1.

    Raises:
        KVLayoutError: a tensor is not one contiguous block, or the unit ids would not fit 32 bits (kernels read int32).
    """

    def __init__(self, k: torch.Tensor, v: torch.Tensor):
        if not (k.is_contiguous() and v.is_contiguous()) or k.shape[:2] != v.shape[:2]:
            raise KVLayoutError(f"K {tuple(k.shape)} and V {tuple(v.shape)} must be contiguous [L, slots, heads, dim]")
        self.layers, self.slots = int(k.shape[0]), int(k.shape[1])
        if self.layers * self.slots >= INT32_LIMIT:
            raise KVLayoutError(
                f"{self.layers} layers x {self.slots} slots exceed the 2^31 unit ids that kernels address: lower "
                "--max-total-tokens"
            )
        self.k_flat = k.flatten(0, 1)
        self.v_flat = v.flatten(0, 1)
        self._layer_rows = torch.arange(self.layers, device=k.device) * self.slots  # [L] the row of each layer's slot 0
        self.factors: Sequence[tuple[float, float]] = [(1.0, 1.0)] * self.layers
        self.k_scales: torch.Tensor | None = None
        self._stream: torch.cuda.Stream | None = None

    @property
    def device(self) -> torch.device:
        return self.k_flat.device

    def scale(self, factors: Sequence[tuple[float, float]]) -> None:
        """Whoever writes K and V divides them by these factors from now on, a pair for each layer."""
        self.factors = list(factors)
        keys = [k for k, _ in self.factors]
        self.k_scales = None if set(keys) == {1.0} else torch.tensor(keys, dtype=torch.float32).to(self.device)

    def keys(self, units: torch.Tensor, layer: int) -> torch.Tensor:
        """K of some units of one layer as the model made it, float32 ``[n, kv_heads, head_dim]``."""
        return self.k_flat[units].float() * self.factors[layer][0]

    def units_of(self, slots: torch.Tensor, layer: int | torch.Tensor) -> torch.Tensor:
        """Unit ids of one layer's share of ``slots`` (any int dtype, any shape); a tensor gives each slot its layer."""
        return slots.to(torch.int64) + layer * self.slots

    def dense_units(self, slots: torch.Tensor, count: int) -> torch.Tensor:
        """The first ``count`` units of ``slots``, slot by slot, each slot's layers in order. int64 ``[count]``."""
        return (slots.to(torch.int64)[: self.slots_for(count), None] + self._layer_rows).flatten()[:count]

    def slots_for(self, units: int) -> int:
        """Whole slots that ``units`` units occupy when packed densely."""
        return -(-units // self.layers)

    def move_on(self, stream: "torch.cuda.Stream") -> None:
        """Move on this stream from now on: the one that forwards run on, where that is not the caller's current one.

        A decode step may be in flight when the scheduler reclaims a span; it must have read the span before the span
        is written over, and the next step must come after.
        """
        self._stream = stream

    def move(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copy units ``source[i]`` to ``target[i]``; the two may overlap in any way."""
        if self._stream is None:
            self._move(source, target)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            self._move(source, target)
        for tensor in (source, target):
            tensor.record_stream(self._stream)
        # The current stream need not wait for the copy: only forwards read or write KV, and they follow on the same
        # stream. If it did wait, whoever next reads a value back on it would wait for the decode step in flight.

    def put(self, target: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Write units ``target[i]``, in order with forwards like :meth:`move`."""
        if self._stream is None:
            self.k_flat[target], self.v_flat[target] = k, v
            return
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            self.k_flat[target], self.v_flat[target] = k, v
        for tensor in (target, k, v):
            tensor.record_stream(self._stream)

    def _move(self, source: torch.Tensor, target: torch.Tensor) -> None:
        if self.k_flat.shape == self.v_flat.shape:
            pack_units(self.k_flat, self.v_flat, source, target)
            return
        for flat in (self.k_flat, self.v_flat):
            flat[target] = flat[source]
