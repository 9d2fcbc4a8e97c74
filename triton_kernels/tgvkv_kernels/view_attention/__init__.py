"""Attention of query rows over their requests' views, merged by LSE with the dense part."""

from tgvkv_kernels.view_attention.api import view_attention

__all__ = ["view_attention"]
