"""Text-grounded KV eviction for vision-language models (TGV-KV, arXiv 2606.03075) as an SGLang plugin."""

__version__ = "0.1.0"
