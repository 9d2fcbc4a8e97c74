"""Move units inside the flat K and V storage: one gather, one scatter, exact."""

from tgvkv_kernels.pack_units.api import pack_units

__all__ = ["pack_units"]
