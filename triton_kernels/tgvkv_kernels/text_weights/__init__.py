"""Weights of the text tokens (TWR): causal column means of the text block of the attention matrix."""

from tgvkv_kernels.text_weights.api import text_weights

__all__ = ["text_weights"]
