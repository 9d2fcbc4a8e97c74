"""Budgets, stable top-k and view tables on the device."""

from tgvkv_kernels.select.api import select_batch, view_units

__all__ = ["select_batch", "view_units"]
