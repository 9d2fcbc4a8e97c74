"""Which implementation runs: plain torch on the CPU, Triton on CUDA."""

import os

import torch

from tgvkv_kernels.common.errors import KernelBackendError, KernelInputError
from tgvkv_kernels.common.interpreter import install_bf16_semantics

BACKENDS = ("auto", "reference", "triton")


def interpreter_requested() -> bool:
    """Whether TRITON_INTERPRET=1 is set (Triton reads it once, when it is imported)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def use_triton(backend: str, device: torch.device) -> bool:
    """Whether to run the Triton kernel.

    ``auto``: Triton on CUDA, else the torch reference. ``reference``: torch anywhere. ``triton``: Triton, which on the
    CPU needs TRITON_INTERPRET=1; the interpreter is never chosen by ``auto``.

    Raises:
        KernelInputError: unknown backend name.
        KernelBackendError: ``triton`` asked for on a CPU tensor without TRITON_INTERPRET=1.
    """
    if backend not in BACKENDS:
        raise KernelInputError(f"backend={backend!r} is not one of {BACKENDS}")
    if backend == "triton" and device.type == "cpu" and not interpreter_requested():
        raise KernelBackendError(
            "backend='triton' was asked for tensors on the CPU: move them to CUDA, use backend='reference', or start "
            "Python with TRITON_INTERPRET=1 to run the kernel in Triton's interpreter (slow, for tests)"
        )
    if backend == "triton" and device.type == "cpu":
        install_bf16_semantics()
    return backend == "triton" or (backend == "auto" and device.type == "cuda")
