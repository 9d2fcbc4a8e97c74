"""TGV-KV without its text weights: what text-weighted ranking (TWR) buys is the difference to this."""

from .attention_sums import AttentionSums


class UniformAttention(AttentionSums):
    """``score_v = sum_t A[t, v]``: each token of the new text counts the same. Budgets as the paper's (TVB)."""
