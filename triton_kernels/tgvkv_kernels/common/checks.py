"""Input checks shared by the apis. All are free of device synchronisation on CUDA."""

import torch

from tgvkv_kernels.common.errors import KernelInputError

INT32_LIMIT = 2**31
INDEX_DTYPES = (torch.int32, torch.int64)
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)  # storage may hold either beside queries of any dtype


def check_shape(name: str, tensor: torch.Tensor, expected: tuple[int | None, ...]) -> None:
    """Raise unless ``tensor`` has the expected shape; ``None`` matches any size."""
    matches = tensor.dim() == len(expected) and all(
        want is None or want == have for want, have in zip(expected, tensor.shape, strict=True)
    )
    if not matches:
        shown = "[" + ", ".join("*" if size is None else str(size) for size in expected) + "]"
        raise KernelInputError(f"{name} has shape {list(tensor.shape)}, expected {shown}")


def check_dtype(name: str, tensor: torch.Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    """Raise unless the dtype is one of ``allowed``."""
    if tensor.dtype not in allowed:
        names = ", ".join(str(dtype) for dtype in allowed)
        raise KernelInputError(f"{name} has dtype {tensor.dtype}, expected one of: {names}")


def check_float(name: str, tensor: torch.Tensor) -> None:
    """Raise unless the dtype is a floating point type with at least 16 bits."""
    check_dtype(name, tensor, (torch.float16, torch.bfloat16, torch.float32, torch.float64))


def check_storage_dtype(name: str, flat: torch.Tensor, q: torch.Tensor) -> None:
    """Raise unless the storage holds numbers of the queries' dtype, or of 8 bits."""
    check_dtype(name, flat, (q.dtype, *FP8))


def check_kernel_float(name: str, tensor: torch.Tensor) -> None:
    """Raise unless the dtype is one that the Triton kernels take (float64 exists for the references only)."""
    check_dtype(name, tensor, (torch.float16, torch.bfloat16, torch.float32))


def check_same_device(**tensors: torch.Tensor | None) -> None:
    """Raise unless all tensors that are given lie on one device."""
    given = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    if len(set(given.values())) > 1:
        listed = ", ".join(f"{name} on {device}" for name, device in given.items())
        raise KernelInputError(f"all tensors must be on one device, got {listed}")


def check_heads(q_heads: int, kv_heads: int) -> None:
    """Raise unless every KV head serves the same whole number of query heads."""
    if kv_heads == 0 or q_heads % kv_heads:
        raise KernelInputError(f"{q_heads} query heads cannot share {kv_heads} KV heads: need a whole multiple")


def check_flat(name: str, flat: torch.Tensor) -> None:
    """Raise unless ``flat`` is a ``[L*slots, Hkv, D]`` view whose rows are contiguous."""
    check_shape(name, flat, (None, None, None))
    if flat.numel() and (flat.stride(2) != 1 or flat.stride(1) != flat.shape[2]):
        raise KernelInputError(
            f"{name} has strides {flat.stride()}; each row [Hkv, D] must be contiguous: pass the storage's flat view"
        )


def check_last_dim_contiguous(name: str, tensor: torch.Tensor) -> None:
    """Raise unless the last dimension has stride 1."""
    if tensor.numel() and tensor.stride(-1) != 1:
        raise KernelInputError(f"{name} has strides {tensor.stride()}; its last dimension must be contiguous")


def check_units(name: str, units: torch.Tensor, rows: int) -> None:
    """Raise unless ``units`` is a 1-d list of flat unit ids that its dtype can address.

    int32 is accepted while every row of the storage is below 2^31. Values are checked on the CPU only (on CUDA that
    would synchronise the stream).
    """
    check_shape(name, units, (None,))
    check_dtype(name, units, INDEX_DTYPES)
    if units.dtype == torch.int32 and rows > INT32_LIMIT:
        raise KernelInputError(f"{name} is int32 but the storage has {rows} units (limit {INT32_LIMIT}): use int64")
    if units.device.type == "cpu" and units.numel():
        low, high = int(units.min()), int(units.max())
        if low < 0 or high >= rows:
            raise KernelInputError(f"{name} holds ids in [{low}, {high}], the storage has units 0..{rows - 1}")
