"""VL-Cache (arXiv 2410.23317): post-vision attention, budgets by sparsity."""

from .attention_sums import AttentionSums


class VlCache(AttentionSums):
    """``score_v = sum_t A[t, v]`` over the new text after the image, with the budget rule ``vl-cache``.

    Its recent window (a tenth of the budget) lies in that text, which is always kept.
    """

    budget = "vl-cache"
