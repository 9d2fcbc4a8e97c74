"""On the machine without a network: put the parts that pack.py made together, and check that they work.

    python3 tools/airgap/install.py .airgap/parts/1 --to /opt/tgvkv

Standard library only. With parts missing it stores the one it got and says so; with the last one it unpacks, copies
this project beside it (so that the files of a running server stay as they are), registers the plugin, and writes
``/opt/tgvkv/env.sh`` to be sourced. Run again it does nothing but check.
"""

from __future__ import annotations

import argparse
import compileall
import hashlib
import io
import json
import lzma
import os
import shutil
import subprocess
import sys
import tarfile
import time
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MANIFEST = "manifest.json"
SOURCES = ("tgvkv_sglang", "triton_kernels", "training", "bench", "tools", "pyproject.toml")
CHECK = """
import importlib.metadata as m, torch
assert torch.cuda.is_available() or {allow_cpu}, "torch sees no CUDA device"
names = {{e.name for g in ("sglang.srt.plugins", "sglang.srt.platforms") for e in m.entry_points(group=g)}}
assert {{"tgvkv", "tgvkv_cpu"}} <= names, f"plugin entry points not found: {{names}}"
import flashinfer, transformers, tokenizers, sglang.launch_server
if torch.cuda.is_available():
    import sgl_kernel.flash_attn
for name in ("sglang", "flashinfer-python", "transformers", "tokenizers", "torch", "triton", "numpy"):
    print(name, m.version(name))
"""


def part_name(number: int) -> str:
    return f"part-{number}"


def store(source: Path, to: Path) -> dict:
    """Copy what ``source`` holds into ``to/parts``; returns the manifest.

    Raises:
        SystemExit: no manifest, a part whose checksum is wrong, or a part of another packing.
    """
    if not (source / MANIFEST).is_file():
        raise SystemExit(f"{source}/{MANIFEST} is not there: name a folder that pack.py made")
    manifest = json.loads((source / MANIFEST).read_text())
    parts = to / "parts"
    parts.mkdir(parents=True, exist_ok=True)
    known = parts / MANIFEST
    if known.is_file() and json.loads(known.read_text()) != manifest:
        raise SystemExit(f"{to} holds parts of another packing; remove it")
    known.write_text(json.dumps(manifest))
    for number, expected in enumerate(manifest["parts"], 1):
        path = source / part_name(number)
        if path.is_file():
            if hashlib.sha256(path.read_bytes()).hexdigest() != expected:
                raise SystemExit(f"{path} arrived damaged (sha256); copy it again")
            shutil.copyfile(path, parts / part_name(number))
    return manifest


def missing(manifest: dict, to: Path) -> list[int]:
    numbers = range(1, len(manifest["parts"]) + 1)
    return [number for number in numbers if not (to / "parts" / part_name(number)).is_file()]


class Joined(io.RawIOBase):
    """Several files read as one."""

    def __init__(self, paths: list[Path]):
        self._files = iter([path.open("rb") for path in paths])
        self._file = next(self._files)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while self._file is not None:
            count = self._file.readinto(buffer)
            if count:
                return count
            self._file.close()
            self._file = next(self._files, None)
        return 0


def unpack(manifest: dict, to: Path) -> None:
    paths = [to / "parts" / part_name(number) for number in range(1, len(manifest["parts"]) + 1)]
    # Not tarfile's own "r|xz": it keeps all that a block expands to and copies it for each read, and of FlashAttention
    # 3 a block is many MiB of zeros: a quarter of an hour instead of seconds.
    with (
        lzma.open(io.BufferedReader(Joined(paths), 2**20)) as whole,
        tarfile.open(fileobj=whole, mode="r|", bufsize=2**20) as tar,
    ):
        tar.extractall(to, filter="tar")


def copy_sources(to: Path) -> None:
    src = to / "src"
    shutil.rmtree(src, ignore_errors=True)
    src.mkdir(parents=True)
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, src / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
        else:
            shutil.copyfile(ROOT / name, src / name)


def register_plugin(to: Path) -> None:
    """What ``pip install`` would leave behind: metadata with the entry points, which is how SGLang finds plugins."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    version: dict[str, str] = {}
    exec((ROOT / "tgvkv_sglang" / "__init__.py").read_text(), version)
    info = to / "site" / f"tgvkv_sglang-{version['__version__']}.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    metadata = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {version['__version__']}\n"
    (info / "METADATA").write_text(metadata)
    lines = []
    for group, entries in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {target}" for name, target in entries.items()), ""]
    (info / "entry_points.txt").write_text("\n".join(lines))


def environment(to: Path) -> dict[str, str]:
    """What env.sh exports."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return {
        "PYTHONPATH": f"{to}/site:{to}/src:{to}/src/triton_kernels",
        "FLASHINFER_WORKSPACE_BASE": f"{to}/flashinfer",  # sources that its generators write; modules are in site
        "TVM_FFI_CACHE_DIR": f"{to}/tvm-ffi",
        "TRITON_CACHE_DIR": f"{to}/triton",
        "TORCHINDUCTOR_CACHE_DIR": f"{to}/inductor",
        "CUDA_HOME": home,
        "CUDA_MODULE_LOADING": "LAZY",  # CUDA's default; FlashAttention 3 has kernel images that nobody should load
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "",  # off: else what the machine brings without compiled files is compiled each time
    }


def write_environment(to: Path) -> None:
    lines = [f"export {name}={value}" for name, value in environment(to).items()]
    (to / "env.sh").write_text("\n".join(lines) + "\n")


def check(to: Path, allow_cpu: bool) -> None:
    env = {**os.environ, **environment(to)}
    code = CHECK.format(allow_cpu=allow_cpu)
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=to / "src", capture_output=True, text=True)
    print(done.stdout, end="")
    if done.returncode != 0:
        raise SystemExit("the unpacked packages do not work here:\n" + done.stderr[-3000:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", type=Path, help="folder with one or more parts, as pack.py made it")
    parser.add_argument("--to", type=Path, default=Path("/opt/tgvkv"))
    parser.add_argument("--allow-cpu", action="store_true", help="do not insist on a CUDA device (for trying it out)")
    args = parser.parse_args()
    began = time.monotonic()
    to = args.to.resolve()
    if not (to / "env.sh").is_file():
        manifest = store(args.parts, to)
        if lacking := missing(manifest, to):
            print(f"stored in {to}; part(s) {', '.join(map(str, lacking))} are still missing")
            return
        unpack(manifest, to)
        copy_sources(to)
        register_plugin(to)
        for folder in ("site", "src"):
            compileall.compile_dir(to / folder, quiet=2, workers=0)  # else each of a server's processes compiles it
        write_environment(to)
        shutil.rmtree(to / "parts")
        print(f"unpacked in {time.monotonic() - began:.0f} s")
    check(to, args.allow_cpu)
    print(f"ready after {time.monotonic() - began:.0f} s: source {to}/env.sh")


if __name__ == "__main__":
    main()
