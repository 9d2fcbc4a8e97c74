"""Kernels of tgvkv-sglang: one folder per operation, each with `api`, `kernel`, `launch` and `reference`.

Import the operation from its folder, e.g. ``from tgvkv_kernels.view_attention import view_attention``. Importing this
package or any api imports torch only; Triton is imported by the first call that runs a Triton kernel.
"""
