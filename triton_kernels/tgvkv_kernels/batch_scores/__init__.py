"""Text weights (TWR), vision scores (TWR, peaks) and masses (TVB) of all layers and scoring requests of a prefill."""

from tgvkv_kernels.batch_scores.api import batch_peak_scores, batch_text_weights, batch_vision_scores
from tgvkv_kernels.batch_scores.plan import ScorePlan

__all__ = ["ScorePlan", "batch_peak_scores", "batch_text_weights", "batch_vision_scores"]
