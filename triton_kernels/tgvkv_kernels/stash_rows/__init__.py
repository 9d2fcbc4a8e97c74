"""Gather the text queries of every scoring request of a forward, and their LSE, in one launch a layer."""

from tgvkv_kernels.stash_rows.api import stash_rows

__all__ = ["stash_rows"]
