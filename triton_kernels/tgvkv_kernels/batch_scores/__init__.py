"""Text weights (TWR) and vision scores and masses (TWR, TVB) of all layers and all scoring requests of a prefill."""

from tgvkv_kernels.batch_scores.api import batch_text_weights, batch_vision_scores
from tgvkv_kernels.batch_scores.plan import ScorePlan

__all__ = ["ScorePlan", "batch_text_weights", "batch_vision_scores"]
