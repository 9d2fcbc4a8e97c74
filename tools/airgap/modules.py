"""Build for sm_90, on a machine without a GPU, what a server would otherwise compile there before its first answer.

FlashInfer's attention modules, the CUDA sources that SGLang compiles at run time, and this project's Triton kernels.
Needs nvcc 13 (``CUDA_HOME``, default /usr/local/cuda), a C++ compiler, ninja, and this project's environment.

    python -m tools.airgap.modules --to DIR --python SIM/bin/python   # DIR/aot, /tvm-ffi, /triton, /modules.json

Triton's cache is good for the one build of Triton that filled it, and each version of Python has a build of its own:
``--python`` names an interpreter of the GPU machine's version, with its torch and Triton.

SGLang's own Triton kernels are not among them: what a launch compiles depends on its arguments, which only a running
server has. They are compiled there, once (install.py gives all servers one cache).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterator

ROOT = Path(__file__).resolve().parents[2]
PYTHON = "3.12"
"""Version of Python on the GPU machine."""
ARCH = (9, 0)
CUDA_HOME = Path("/usr/local/cuda")


@dataclass(frozen=True)
class Heads:
    """What of a model selects modules and kernel variants."""

    name: str
    q_heads: int
    kv_heads: int
    head_dim: int
    layers: int

    @property
    def row_bytes(self) -> int:
        """Bytes of K of one token in one layer, bfloat16."""
        return 2 * self.kv_heads * self.head_dim


MODELS = (
    Heads("Qwen3-VL-8B", 32, 8, 128, 36),
    Heads("demo model", 4, 2, 64, 4),
    Heads("stand-in of the stress run", 4, 2, 128, 4),
)


def need(path: Path, why: str) -> Path:
    if not path.exists():
        raise SystemExit(f"{path} is needed {why} and is not there; set CUDA_HOME to a CUDA 13 toolkit with nvcc")
    return path


def check_python(python: Path | str) -> None:
    """Raises:
        SystemExit: it is no Python of the GPU machine's version with torch and Triton.
    """
    code = "import sys, torch, triton; print(*sys.version_info[:2], sep='.')"
    try:
        done = subprocess.run([str(python), "-c", code], capture_output=True, text=True)
        found = done.stdout.strip() or done.stderr.strip().splitlines()[-1]
    except OSError as error:
        found = str(error)
    if found != PYTHON:
        raise SystemExit(f"{python} ({found}) cannot compile the GPU machine's Triton kernels: name a Python {PYTHON} "
                         "with the torch and Triton of tools/airgap/machine.txt: --python DIR/bin/python")  # fmt: skip


def stub_driver(directory: Path) -> Path:
    """A ``libcuda.so`` to link against where there is no driver; the GPU machine's own is loaded there."""
    directory.mkdir(parents=True, exist_ok=True)
    source = directory / "libcuda.c"
    source.write_text("int cuInit(unsigned flags) { return 100; }\n")
    library = directory / "libcuda.so.1"
    command = ["gcc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", str(library), str(source)]
    subprocess.run(command, check=True)
    link = directory / "libcuda.so"
    link.unlink(missing_ok=True)
    link.symlink_to(library.name)
    return directory


def build_environment(to: Path) -> dict[str, str]:
    """Environment of the builds. Call before FlashInfer is imported: it reads these once."""
    home = Path(os.environ.get("CUDA_HOME", CUDA_HOME))
    need(home / "bin" / "nvcc", "to compile CUDA sources")
    stubs = stub_driver(to / "build" / "stubs")
    return {
        "CUDA_HOME": str(home),
        "FLASHINFER_CUDA_ARCH_LIST": f"{ARCH[0]}.{ARCH[1]}a",
        "FLASHINFER_WORKSPACE_BASE": str(to / "build" / "flashinfer"),
        "LIBRARY_PATH": str(stubs),
        "TVM_FFI_CACHE_DIR": str(to / "tvm-ffi"),
        "TRITON_CACHE_DIR": str(to / "triton"),
        "MAX_JOBS": os.environ.get("MAX_JOBS", "2"),
    }


def flashinfer_specs() -> list:
    """The modules of SGLang's FlashInfer backend and ours: both ask for fa2 by name, for prefill and for decode."""
    import torch
    from flashinfer.jit.attention import gen_batch_decode_module, gen_batch_prefill_module

    kinds = (torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.int32)
    specs = []
    for dim in sorted({model.head_dim for model in MODELS}):
        specs.append(gen_batch_prefill_module("fa2", *kinds, dim, dim, 0, False, False, False))
        specs.append(gen_batch_decode_module(*kinds, dim, dim, 0, False, False))
    return specs


def build_flashinfer(to: Path) -> Iterator[tuple[str, int]]:
    """Into ``to/aot/NAME/NAME.so``, the layout of FlashInfer's ahead-of-time directory."""
    for spec in flashinfer_specs():
        target = to / "aot" / spec.name / f"{spec.name}.so"
        if not target.is_file():
            spec.build(verbose=False)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(spec.jit_library_path, target)
        yield spec.name, target.stat().st_size


def sglang_modules() -> list[tuple[str, Callable[[], object]]]:
    """What SGLang's Qwen3-VL compiles at run time on CUDA: found by reading its code paths, not yet seen on a GPU."""
    import torch
    from sglang.kernels.ops.activation.activation import activation_module
    from sglang.kernels.ops.attention.clamp_position import _jit_clamp_position_module
    from sglang.kernels.ops.kvcache.kvcache import _jit_kvcache_module
    from sglang.kernels.ops.layernorm.norm import _jit_qknorm_module

    bf16 = torch.bfloat16
    modules: list[tuple[str, Callable[[], object]]] = [
        ("activation", lambda: activation_module(bf16)),
        ("clamp_position int64", lambda: _jit_clamp_position_module(torch.int64)),
        ("clamp_position int32", lambda: _jit_clamp_position_module(torch.int32)),
    ]
    for dim in sorted({model.head_dim for model in MODELS}):
        modules.append((f"qknorm {dim}", lambda dim=dim: _jit_qknorm_module(dim, bf16)))
    for row in sorted({model.row_bytes for model in MODELS}):
        modules.append((f"kvcache {row}", lambda row=row: _jit_kvcache_module(row, row)))
    return modules


def build_sglang(to: Path) -> Iterator[tuple[str, int]]:
    """Into ``to/tvm-ffi``, under the names that SGLang's loader looks for."""
    import tvm_ffi.cpp
    from sglang.kernels.jit.utils.arch import override_jit_cuda_arch

    built: list[Path] = []

    def only_build(name, **options):
        built.append(Path(tvm_ffi.cpp.build_inline(name, **options)))

    load_inline, tvm_ffi.cpp.load_inline = tvm_ffi.cpp.load_inline, only_build
    try:
        with override_jit_cuda_arch(*ARCH):
            for name, build in sglang_modules():
                build()
                yield name, built[-1].stat().st_size if built else 0
    finally:
        tvm_ffi.cpp.load_inline = load_inline
    for path in (to / "tvm-ffi").rglob("*"):
        if path.is_file() and path.suffix != ".so":
            path.unlink()  # objects and ninja files: the loader takes the library alone


def build_triton(to: Path, python: Path | str) -> Iterator[tuple[str, int]]:
    """Into ``to/triton``, from scratch, by ``python``: this project's kernels for every model here."""
    shutil.rmtree(to / "triton", ignore_errors=True)
    env = {**os.environ, "PYTHONPATH": str(ROOT / "triton_kernels"), "TRITON_CACHE_DIR": str(to / "triton")}
    env.pop("TRITON_INTERPRET", None)
    for model in MODELS:
        command = [str(python), "-m", "tgvkv_kernels.aot", "--arch", f"{ARCH[0]}{ARCH[1]}"]
        command += ["--q-heads", str(model.q_heads), "--kv-heads", str(model.kv_heads)]
        command += ["--head-dim", str(model.head_dim), "--layers", str(model.layers)]
        subprocess.run(command, check=True, env=env, stdout=subprocess.DEVNULL)
        yield model.name, sum(path.stat().st_size for path in (to / "triton").rglob("*") if path.is_file())


def add_python(parser: argparse.ArgumentParser) -> None:
    what = f"a Python {PYTHON} with the GPU machine's torch and Triton, to compile our kernels (default: this one)"
    parser.add_argument("--python", default=sys.executable, help=what)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, required=True)
    add_python(parser)
    args = parser.parse_args()
    to = args.to.resolve()
    check_python(args.python)
    os.environ.update(build_environment(to))
    report: dict[str, dict] = {}
    builds = {
        "flashinfer": build_flashinfer(to),
        "sglang": build_sglang(to),
        "triton": build_triton(to, args.python),
    }
    for kind, built in builds.items():
        began = time.monotonic()
        for name, size in built:
            seconds, began = time.monotonic() - began, time.monotonic()
            report[f"{kind} {name}"] = {"bytes": size, "seconds": round(seconds, 1)}
            print(f"{kind:10} {seconds:6.1f} s {size:9} bytes  {name}", flush=True)
    (to / "modules.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
