"""Check unpacked parts on a machine without a GPU, as far as that goes, before any GPU time is spent.

    uv venv --python 3.12 SIM && VIRTUAL_ENV=SIM uv pip install -r tools/airgap/machine.txt
    SIM/bin/python tools/airgap/install.py .airgap/parts/1 --to DIR --allow-cpu
    SIM/bin/python tools/airgap/verify.py --at DIR

1. Everything a server imports, with torch's CUDA queries answered as on an H200, so that SGLang takes its CUDA branches
   and loads its sm_90 library (against a driver library without functions).
2. The arguments of every server of the programme, read by SGLang itself as on an H200.
3. FlashInfer's and SGLang's prebuilt modules are found and load, nothing is compiled; FlashAttention 3 has the kernels
   that were kept.
4. Triton finds this project's kernels in the cache; nothing is compiled.

Standard library only in this process; the checks run in children with DIR's environment.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from install import environment  # noqa: E402 - beside this file

# Put first on the path as sitecustomize: the children of the children see the same machine.
PRETEND = """
import types, torch
_p = types.SimpleNamespace(major=9, minor=0, name="NVIDIA H200", total_memory=150 * 2**30, multi_processor_count=132,
                           warp_size=32, gcnArchName="", L2_cache_size=60 * 2**20, uuid="none",
                           shared_memory_per_block_optin=232448)
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1
torch.cuda.current_device = lambda: 0
torch.cuda.get_device_capability = lambda *a, **k: (9, 0)
torch.cuda.get_device_properties = lambda *a, **k: _p
torch.cuda.get_device_name = lambda *a, **k: _p.name
torch.cuda.mem_get_info = lambda *a, **k: (140 * 2**30, 141 * 2**30)
torch.cuda.get_arch_list = lambda: ["sm_80", "sm_90", "sm_100"]
"""

IMPORTS = """
import importlib, sys, torch
for name in (
    "sglang.launch_server sgl_kernel.flash_attn flashinfer flashinfer.sampling sglang.srt.managers.scheduler "
    "sglang.srt.managers.detokenizer_manager sglang.srt.managers.tokenizer_manager sglang.srt.entrypoints.http_server "
    "sglang.srt.model_executor.model_runner sglang.srt.layers.attention.flashinfer_backend sglang.srt.layers.sampler "
    "sglang.srt.layers.attention.vision sglang.srt.models.qwen3_vl sglang.srt.multimodal.processors.qwen_vl "
    "sglang.srt.model_loader.loader sglang.srt.mem_cache.memory_pool xgrammar "
    "bench.gpu.__main__"
).split():
    importlib.import_module(name)
import sgl_kernel
assert "/sm90/" in sgl_kernel.common_ops.__file__, sgl_kernel.common_ops
from sglang.srt.plugins import load_plugins
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
load_plugins()
assert "tgvkv" in ATTENTION_BACKENDS, sorted(ATTENTION_BACKENDS)
import tgvkv_sglang.sglang_seam.flashinfer_backend
from sglang.srt.models.registry import ModelRegistry
assert all(hasattr(torch.ops.sgl_kernel, name) for name in ("fwd", "get_scheduler_metadata"))
assert "Qwen3VLForConditionalGeneration" in ModelRegistry.get_supported_archs()
print("imports as on an H200, with", sgl_kernel.common_ops.__file__.rsplit("/", 2)[1] + "/common_ops")
"""

COMMANDS = """
import sys
from pathlib import Path
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.server_args import prepare_server_args
from bench.gpu.models import model_directory
from bench.gpu.programme import gpu_programme
from bench.gpu.servers import Setup, command
work = Path(sys.argv[1])
setup = Setup(False, work, ("--mm-attention-backend=triton_attn",))
count = 0
for part in gpu_programme():
    for spec in part.servers:
        words = command(spec, model_directory(spec.model, work), 30000, setup)
        parsed = prepare_server_args(words[3:])
        assert parsed.attention_backend == (spec.backend or "fa3") and parsed.device == "cuda", parsed
        assert parsed.cuda_graph_config.decode.backend == "full" and not parsed.disable_overlap_schedule, parsed
        assert not parsed.disable_radix_cache, parsed
        count += 1
print(count, "servers' arguments are accepted, with decode graphs, overlap and radix cache on")
"""

MODULES = """
import tvm_ffi.cpp
def refuse(name, **_):
    raise AssertionError(f"{name} is not prebuilt")
tvm_ffi.cpp.load_inline = refuse
import mmap
from sgl_kernel.flash_attn import flash_ops
from tools.airgap.fatbins import fat_binaries, source
from tools.airgap.modules import MODELS, flashinfer_specs, sglang_modules
for spec in flashinfer_specs():
    assert spec.is_aot, f"{spec.name} is not prebuilt"
    spec.build_and_load()
for name, load in sglang_modules():
    load()
with open(flash_ops.__file__, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
    sources = {source(data, binary) for binary in fat_binaries(data, 0, len(data))}
for dim in {model.head_dim for model in MODELS}:
    for kind in ("paged", "paged_split"):
        assert f"flash_fwd_hdim{dim}_bf16_{kind}_sm90" in sources, f"no FlashAttention 3 for heads of {dim}"
print(len(flashinfer_specs()), "FlashInfer and", len(sglang_modules()), "SGLang modules load, and FlashAttention 3")
"""

KERNELS = """
import os
from pathlib import Path
from tools.airgap.modules import MODELS
import torch
from tgvkv_kernels.aot import compile_only
from tgvkv_kernels.warm_up import ModelShape, warm_up
cache = Path(os.environ["TRITON_CACHE_DIR"])
before = {path.name for path in cache.iterdir()}
with compile_only(90) as compiled:
    for model in MODELS:
        warm_up(ModelShape(model.q_heads, model.kv_heads, model.head_dim, torch.bfloat16, model.layers), "cpu")
new = {path.name for path in cache.iterdir()} - before
assert compiled and not new, f"{len(new)} kernels were compiled: {sorted(new)[:5]}"
print(sum(map(len, compiled.values())), "Triton kernels from the cache")
"""


def driver_stub(directory: Path, site: Path) -> None:
    """A ``libcuda.so.1`` with the functions that SGLang's library wants, none of which does anything."""
    library = site / "sgl_kernel" / "sm90" / "common_ops.abi3.so"
    listed = subprocess.run(["nm", "-D", "--undefined-only", str(library)], check=True, capture_output=True, text=True)
    names = {line.split()[-1] for line in listed.stdout.splitlines()}
    driver = sorted(name for name in names if name.startswith("cu") and name[2:3].isupper())
    code = "".join(f"int {name}(void) {{ return 999; }}\n" for name in driver)
    code += "int cuInit(unsigned f) { return 100; }\nint cuDriverGetVersion(int *v) { *v = 13000; return 0; }\n"
    (directory / "stub.c").write_text(code)
    target = str(directory / "libcuda.so.1")
    command = ["gcc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", target, str(directory / "stub.c")]
    subprocess.run(command, check=True)


def run(name: str, code: str, env: dict[str, str], cwd: Path, scratch: Path) -> bool:
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code, str(scratch)], env=env, cwd=cwd, capture_output=True, text=True)
    seconds = time.monotonic() - began
    if done.returncode == 0:
        print(f"ok     {name}: {done.stdout.strip().splitlines()[-1]} ({seconds:.0f} s)", flush=True)
    else:
        print(f"FAILED {name} ({seconds:.0f} s)\n{done.stderr[-3000:]}", flush=True)
    return done.returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--at", type=Path, required=True, help="where install.py unpacked the parts")
    args = parser.parse_args()
    at = args.at.resolve()
    if not (at / "env.sh").is_file():
        raise SystemExit(f"{at}/env.sh is not there: run install.py --to {at} first")
    with tempfile.TemporaryDirectory(prefix="tgvkv-verify-") as scratch:
        directory = Path(scratch)
        driver_stub(directory, at / "site")
        (directory / "sitecustomize.py").write_text(PRETEND)
        env = {**os.environ, **environment(at)}
        pretend = {
            **env,
            "PYTHONPATH": f"{directory}:{env['PYTHONPATH']}",
            "LD_LIBRARY_PATH": str(directory),
            "FLASHINFER_CUDA_ARCH_LIST": "9.0a",
        }
        results = [
            run("imports", IMPORTS, pretend, at / "src", directory),
            run("arguments", COMMANDS, pretend, at / "src", directory),
            run("modules", MODULES, pretend, at / "src", directory),
            run("kernels", KERNELS, env, at / "src", directory),
        ]
    sys.exit(not all(results))


if __name__ == "__main__":
    main()
