"""Compile every kernel for a GPU that is not here.

The launches themselves run, on small CPU tensors, with Triton's driver replaced by one that only names a target: what
is compiled is exactly what a launch on that GPU would ask for, and lands in Triton's cache under the same key. So
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


@dataclass(frozen=True)
class ModelShape:
    """What of a model and a server selects kernel variants."""

    q_heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    layers: int = 36
    vision_tokens: tuple[int, ...] = (1024,)
    batch_sizes: tuple[int, ...] = (8,)


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

    from tgvkv_kernels.view_attention.kernel import view_attention_kernel

    if not isinstance(view_attention_kernel, JITFunction):
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


def launch_all(shape: ModelShape) -> None:
    """Launch every operation in every variant that a server with such a model uses (inside `compile_only`)."""
    _launch_attention(shape)
    _launch_moves(shape)


def _launch_attention(shape: ModelShape) -> None:
    from tgvkv_kernels.text_weights.launch import launch_text_weights
    from tgvkv_kernels.view_attention.launch import launch_view_attention
    from tgvkv_kernels.vision_scores.launch import launch_vision_scores

    tokens, heads = 64, shape.q_heads
    q = torch.zeros(tokens, heads, shape.head_dim, dtype=shape.dtype)
    flat = torch.zeros(tokens, shape.kv_heads, shape.head_dim, dtype=shape.dtype)
    lse = torch.zeros(tokens, heads)
    weights, indptr = torch.zeros(tokens), torch.zeros(tokens + 1, dtype=torch.int32)
    units = torch.zeros(tokens, dtype=torch.int32)
    positions = torch.zeros(tokens, dtype=torch.int64)
    launch_text_weights(q, flat, lse, 1.0, heads)
    launch_vision_scores(q, lse, weights, flat, units, positions, positions, 1.0, heads)
    for row_map in (None, units):
        for dense in ((None, None), (q, lse)):
            for splits in (1, 2):
                launch_view_attention(
                    q, flat, flat, units, indptr, row_map, 1.0, *dense, q.clone(), lse.clone(), splits
                )


def _launch_moves(shape: ModelShape) -> None:
    from tgvkv_kernels.dense_rows import launch as rows
    from tgvkv_kernels.pack_units.launch import launch_pack_units
    from tgvkv_kernels.select import launch as select

    flat = torch.zeros(16, shape.kv_heads, shape.head_dim, dtype=shape.dtype)
    units = torch.zeros(16, dtype=torch.int32)
    launch_pack_units(flat, flat, units, units)
    mass = torch.zeros(shape.layers)
    budget = select.launch_layer_budgets(mass, 0, 16)
    for vision in shape.vision_tokens:
        positions, layer_ptr = select.launch_top_positions(torch.zeros(shape.layers, vision), budget, 16)
    for slots in (units, units.long()):
        select.launch_view_units(positions, layer_ptr, slots, 1024)
    table = torch.zeros(16, 1024, dtype=torch.int32)
    for batch in shape.batch_sizes:
        index = torch.zeros(batch, dtype=torch.int64)
        bounds = torch.zeros(batch + 1, dtype=torch.int32)
        request = (table, index, index, units, units, bounds)
        rows.launch_dense_rows(*request, table.flatten(), bounds.clone())


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


def main() -> None:
    """Fill Triton's cache for one model shape and print each kernel's resources."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--arch", type=int, default=90, help="compute capability times ten: 80, 90, 100")
    parser.add_argument("--q-heads", type=int, required=True)
    parser.add_argument("--kv-heads", type=int, required=True)
    parser.add_argument("--head-dim", type=int, required=True)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--vision-tokens", type=int, nargs="+", default=[576, 1024, 2048, 4096])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[2**power for power in range(11)])
    args = parser.parse_args()
    shape = ModelShape(
        args.q_heads,
        args.kv_heads,
        args.head_dim,
        getattr(torch, args.dtype),
        args.layers,
        tuple(args.vision_tokens),
        tuple(args.batch_sizes),
    )
    with compile_only(args.arch) as compiled:
        launch_all(shape)
    for name, kernels in compiled.items():
        for kernel in kernels:
            print(name, resources(kernel))


if __name__ == "__main__":
    main()
