"""Budgets, stable top-k and view tables on the device."""

from tgvkv_kernels.select.api import layer_budgets, select, select_batch, view_units

__all__ = ["layer_budgets", "select", "select_batch", "view_units"]
