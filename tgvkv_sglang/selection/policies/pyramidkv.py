"""PyramidKV (arXiv 2406.02069): SnapKV's scores, budgets that fall with depth."""

from .snapkv import SnapKv


class PyramidKv(SnapKv):
    """Scores of :class:`SnapKv` with the budget rule ``pyramid``."""

    budget = "pyramid"
