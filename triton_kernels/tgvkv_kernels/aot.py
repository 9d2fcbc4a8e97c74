"""Compile every kernel for a GPU that is not here.

The launches of `tgvkv_kernels.warm_up` run, on small CPU tensors, with Triton's driver replaced by one that only names
a target: what is compiled is exactly what a launch on that GPU would ask for, and lands in Triton's cache under the
same key. So
``TRITON_CACHE_DIR=dir python -m tgvkv_kernels.aot --arch 90 ...`` here, and ``TRITON_CACHE_DIR=dir`` there, spares the
GPU machine all compiling (same Triton version and the same source files needed).
"""

import argparse
import contextlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from tgvkv_kernels.common.errors import KernelBackendError
from tgvkv_kernels.warm_up import ModelShape, warm_up


@dataclass(frozen=True)
class Resources:
    """Per-thread and per-block resources of one cubin; ``stack`` and ``local`` above 0 mean register spills."""

    registers: int
    stack: int
    local: int
    shared: int


class _TargetOnlyDriver:
    """Names a target for the compiler; has no device."""

    def __init__(self, arch: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self) -> int:
        return 1000 + self.target.arch  # keeps each target's kernels apart in Triton's per-device table

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def compile_only(arch: int) -> Iterator[dict[str, list]]:
    """Within the block each kernel launch compiles for ``sm_<arch>`` and does not run.

    Yields:
        A dict filled with the compiled kernels by kernel name.

    Raises:
        KernelBackendError: Triton was imported with TRITON_INTERPRET=1, so there is no compiler in this process.
    """
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    from tgvkv_kernels.pack_units.kernel import move_rows_kernel

    if not isinstance(move_rows_kernel, JITFunction):
        raise KernelBackendError("Triton was imported with TRITON_INTERPRET=1: compile in a process without it")
    compiled: dict[str, list] = {}
    previous_driver, previous_run = driver._active, JITFunction.run

    def run(self, *args, grid, warmup, **kwargs):
        kernel = previous_run(self, *args, grid=grid, warmup=True, **kwargs)
        if kernel not in compiled.setdefault(self.fn.__name__, []):
            compiled[self.fn.__name__].append(kernel)
        return kernel

    driver.set_active(_TargetOnlyDriver(arch))
    JITFunction.run = run
    try:
        yield compiled
    finally:
        JITFunction.run = previous_run
        driver._active = previous_driver


def resources(kernel) -> Resources:
    """Read a compiled kernel's resources from its cubin with the ``cuobjdump`` that Triton ships."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    # Dynamic shared memory is fixed at launch, so the cubin does not have it: Triton's metadata does.
    return Resources(found["REG"], found["STACK"], found["LOCAL"], kernel.metadata.shared)


def blocks_per_multiprocessor(kernel, arch: int) -> int:
    """Blocks of a compiled kernel that one multiprocessor holds at once, by registers, shared memory and threads."""
    shared_kib, threads = {80: (164, 2048), 90: (228, 2048), 100: (228, 2048)}[arch]
    needed, warps = resources(kernel), kernel.metadata.num_warps
    warp_registers = -(-needed.registers * 32 // 256) * 256  # allocated 256 at a time
    by_registers = 65536 // (warp_registers * warps)
    by_shared = shared_kib * 1024 // (needed.shared + 1024)  # 1 KiB of each block is the system's
    return min(by_registers, by_shared, threads // (32 * warps))


def main() -> None:
    """Fill Triton's cache for one model shape and print each kernel's resources."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--arch", type=int, default=90, help="compute capability times ten: 80, 90, 100")
    parser.add_argument("--q-heads", type=int, required=True)
    parser.add_argument("--kv-heads", type=int, required=True)
    parser.add_argument("--head-dim", type=int, required=True)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--kv-dtype", choices=("float8_e4m3fn", "float8_e5m2"), help="of the KV pool, else --dtype")
    parser.add_argument("--scaled", action="store_true", help="the checkpoint has factors for K and V")
    parser.add_argument("--layers", type=int, default=36)
    args = parser.parse_args()
    dtypes = [None if name is None else getattr(torch, name) for name in (args.dtype, args.kv_dtype)]
    shape = ModelShape(args.q_heads, args.kv_heads, args.head_dim, dtypes[0], args.layers, dtypes[1], args.scaled)
    with compile_only(args.arch) as compiled:
        warm_up(shape, "cpu")
    for name, kernels in compiled.items():
        for kernel in kernels:
            print(name, resources(kernel))


if __name__ == "__main__":
    main()
