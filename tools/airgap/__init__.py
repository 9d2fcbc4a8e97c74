"""Bring a tgvkv server to a machine without a network: see README.md."""
