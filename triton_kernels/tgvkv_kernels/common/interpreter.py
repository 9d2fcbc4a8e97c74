"""bfloat16 in Triton's CPU interpreter, as the hardware does it.

Triton 3.6 keeps bfloat16 as raw uint16 in the interpreter: its `dot` multiplies those integers, and float32 -> bfloat16
truncates. Both are wrong without an error, so `use_triton` installs these two corrections before it lets the
interpreter run. Remove when Triton's interpreter does both itself (the interpreter tests tell).
"""

import functools

import numpy as np


def bf16_bits_to_f32(bits: np.ndarray) -> np.ndarray:
    """uint16 bfloat16 patterns -> the same values as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def f32_to_bf16_bits(values: np.ndarray) -> np.ndarray:
    """float32 -> uint16 bfloat16 patterns, round to nearest even, NaN kept quiet."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


@functools.cache
def install_bf16_semantics() -> None:
    """Patch the interpreter's builder once per process."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    original_dot, original_cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def upcast(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle(bf16_bits_to_f32(handle.data), tl.float32)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        return original_dot(self, upcast(a), upcast(b), d, input_precision, max_num_imprecise_acc)

    def cast_impl(self, src, dst_type):
        source, target = src.dtype.scalar, dst_type.scalar
        if source == tl.bfloat16 and target != tl.bfloat16:
            return original_cast(self, upcast(src), dst_type) if target != tl.float32 else upcast(src)
        if target == tl.bfloat16 and source != tl.bfloat16:
            values = original_cast(self, src, tl.float32).data if source != tl.float32 else src.data
            return TensorHandle(f32_to_bf16_bits(values), tl.bfloat16)
        return original_cast(self, src, dst_type)

    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.cast_impl = cast_impl
