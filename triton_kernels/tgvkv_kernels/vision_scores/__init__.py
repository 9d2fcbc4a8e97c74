"""Text-weighted scores of a span's vision tokens and the layer's text-to-vision mass (TWR, TVB)."""

from tgvkv_kernels.vision_scores.api import vision_scores

__all__ = ["vision_scores"]
