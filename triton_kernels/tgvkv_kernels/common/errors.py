"""Errors raised by the kernel apis; each message names the received value and the remedy."""


class KernelInputError(ValueError):
    """An argument has a shape, dtype, device or value that the operation does not accept."""


class KernelBackendError(RuntimeError):
    """The requested backend cannot run these tensors on this machine."""
