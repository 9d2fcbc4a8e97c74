"""Index rows of the dense part: a request's slots without its viewed vision spans."""

from tgvkv_kernels.dense_rows.api import dense_rows

__all__ = ["dense_rows"]
