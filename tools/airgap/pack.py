"""Put SGLang, its wheels and prebuilt kernels into parts for a GPU machine that has no network.

    python -m tools.airgap.pack --python SIM/bin/python   # into .airgap/ (a quarter of an hour; wheels are kept)
    python -m tools.airgap.pack ... --part-mib 40         # in files of at most 40 MiB
    python -m tools.airgap.pack --step parts              # only that step again

Run it with this project's environment on Linux x86_64. It needs pip's registry, ``strip``, and what modules.py needs
(nvcc 13, gcc, ninja, and the GPU machine's Python, torch and Triton: README.md). Steps: ``wheels`` (pip download),
``site`` (install into a folder, prune, strip), ``modules`` (kernels for sm_90), ``parts`` (one xz archive, cut if
asked). install.py puts them together again on the other side.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

from tools.airgap.fatbins import trim
from tools.airgap.install import MANIFEST, part_name
from tools.airgap.modules import PYTHON, add_python, check_python

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
STEPS = ("wheels", "site", "modules", "parts")
GLIBC_MINORS = (17, 24, 26, 27, 28, 31, 34, 35)
MIB = 2**20

# What a tgvkv server on an sm_90 machine never opens. Sizes are of the files themselves.
PRUNE = (
    "sgl_kernel/flashmla_ops.abi3.so",
    "sgl_kernel/infllm_ops*.so",
    "sgl_kernel/spatial_ops.abi3.so",
    "sgl_kernel/sm100/*",
    "xgrammar/lib/*",  # a static library
    "xgrammar/include/*",
    *(f"flashinfer/data/cutlass/{name}/*" for name in ("test", "python", "examples")),
    *(f"flashinfer/data/cccl/{name}/*" for name in ("ci", "docs", "benchmarks", "python")),
    "sglang/multimodal_gen/*",
    "sglang/test/*",
    "sglang/srt/server/*.so",  # the Rust server
    "sglang/srt/grpc/*.so",
    "bin/*",
    "*.pyi",
    "*/__pycache__/*",
)
STRIP_ABOVE = 8 * MIB  # xgrammar's library has 49 MB of debug information
# FlashAttention 3 is 1.1 GB, nearly all of it kernels. What the programme serves needs: bfloat16, no soft cap, models'
# heads of 64 and 128 and the vision tower's of 72 (padded to 96).
FLASH_ATTENTION = "sgl_kernel/flash_ops.abi3.so"
FLASH_SOURCES = re.compile(
    "flash_prepare_scheduler|flash_fwd_combine|flash_fwd_hdim(64|96|128)_bf16(_packgqa|_paged|_split|_paged_split)?_sm90"
)


def wanted() -> list[str]:
    """``name==version`` of every package of packages.txt, versions from constraints.txt."""
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        requirement, _, marker = line.split("#")[0].partition(";")
        if requirement.strip() and "< '3.12'" not in marker:
            name, _, version = requirement.strip().partition("==")
            pins[name] = version
    lines = [line.split("#")[0].strip() for line in (HERE / "packages.txt").read_text().splitlines()]
    names = [line for line in lines if line]
    unknown = [name for name in names if name not in pins]
    if unknown:
        raise SystemExit(f"{', '.join(unknown)} of tools/airgap/packages.txt: no such line in constraints.txt")
    return [f"{name}=={pins[name]}" for name in names]


def pip(*arguments: str) -> None:
    tags = [f"manylinux_2_{minor}_x86_64" for minor in GLIBC_MINORS]
    tags += ["manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64"]
    target = ["--only-binary=:all:", "--python-version", PYTHON, "--implementation", "cp"]
    for tag in tags:
        target += ["--platform", tag]
    subprocess.run([sys.executable, "-m", "pip", *arguments, "-qq", "--no-deps", *target], check=True)


def download(out: Path) -> None:
    """One wheel a package; those that are there are kept, others (old versions) are removed."""
    wheels = out / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    kept = set()
    for requirement in wanted():
        name, _, version = requirement.partition("==")
        pattern = f"{name.replace('-', '_')}-{version}-*.whl"
        if not list(wheels.glob(pattern)):
            pip("download", "-d", str(wheels), requirement)
        found = list(wheels.glob(pattern))
        if len(found) != 1:
            raise SystemExit(f"{requirement}: expected one wheel {pattern} in {wheels}, found {len(found)}")
        kept.add(found[0])
    for wheel in set(wheels.glob("*.whl")) - kept:
        wheel.unlink()
    print(f"wheels: {len(kept)}, {size_of(wheels) / MIB:.1f} MiB")


def pruned(path: str) -> bool:
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in PRUNE)


def make_site(out: Path) -> None:
    """Install the wheels into ``site``, without what :data:`PRUNE` names and without most of FlashAttention 3."""
    site = out / "site"
    shutil.rmtree(site, ignore_errors=True)
    wheels = sorted(map(str, (out / "wheels").glob("*.whl")))
    if not wheels:
        raise SystemExit(f"no wheels in {out / 'wheels'}: run the step 'wheels' first")
    pip("install", "--no-index", "--no-compile", "--target", str(site), *wheels)
    for path in sorted(site.rglob("*")):
        if not path.is_dir() and pruned(str(path.relative_to(site))):
            path.unlink()
    for path in sorted(site.rglob("*.so*")):
        if path.is_file() and path.stat().st_size > STRIP_ABOVE:
            subprocess.run(["strip", "--strip-unneeded", str(path)], check=True)
    kept, emptied = trim(site / FLASH_ATTENTION, FLASH_SOURCES)
    print(f"  FlashAttention 3: kernels of {len(kept)} sources kept, of {emptied} dropped")
    print(f"site: {size_of(site) / MIB:.1f} MiB")


def build_modules(out: Path, python: str) -> None:
    command = ["-m", "tools.airgap.modules", "--to", str(out / "modules"), "--python", python]
    subprocess.run([sys.executable, *command], check=True, cwd=ROOT)


def size_of(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def make_archive(out: Path, archive: Path) -> None:
    """``site`` (with FlashInfer's modules in it), ``tvm-ffi`` and ``triton``, in one xz archive."""
    modules = out / "modules"
    roots = {"site": out / "site", "tvm-ffi": modules / "tvm-ffi", "triton": modules / "triton"}
    roots["site/flashinfer/data/aot"] = modules / "aot"
    for name, path in roots.items():
        if not path.is_dir():
            raise SystemExit(f"{path} is not there: run the steps before 'parts' first")
        print(f"  {size_of(path) / MIB:6.1f} MiB  {name}")
    with tarfile.open(archive, "w:xz", preset=6) as tar:
        for name, path in roots.items():
            tar.add(path, name, filter=anonymous)


def anonymous(info: tarfile.TarInfo) -> tarfile.TarInfo:
    info.uid = info.gid = 0
    info.uname = info.gname = "root"
    return info


def make_parts(out: Path, part_mib: int | None) -> None:
    """Cut the archive into ``parts/1/part-1`` and so on, each in a folder of its own; None: one part."""
    parts = out / "parts"
    shutil.rmtree(parts, ignore_errors=True)
    parts.mkdir(parents=True)
    archive = out / "all.tar.xz"
    make_archive(out, archive)
    sums, sizes = [], []
    with archive.open("rb") as whole:
        while block := whole.read(-1 if part_mib is None else part_mib * MIB):
            number = len(sums) + 1
            (parts / str(number)).mkdir()
            (parts / str(number) / part_name(number)).write_bytes(block)
            sums.append(hashlib.sha256(block).hexdigest())
            sizes.append(len(block))
    archive.unlink()
    manifest = {"parts": sums, "packages": wanted(), "packed": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())}
    for number in range(1, len(sums) + 1):
        (parts / str(number) / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    print(f"{len(sums)} part(s): " + ", ".join(f"{size / MIB:.1f} MiB" for size in sizes))


def check_ignored(out: Path) -> None:
    """A part inside the checkout must be ignored by git, or it would be committed (and copied) with everything."""
    if not out.is_relative_to(ROOT):
        return
    name = str(out.relative_to(ROOT))
    if subprocess.run(["git", "check-ignore", "-q", name + "/parts"], cwd=ROOT).returncode != 0:
        remedy = f"mkdir -p .git/info; echo /{name}/ >> .git/info/exclude"
        raise SystemExit(f"git does not ignore {name}; first run: {remedy}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / ".airgap")
    parser.add_argument("--step", choices=STEPS, action="append", help="only this step (may be repeated)")
    add_python(parser)
    parser.add_argument("--part-mib", type=int, help="size of the largest part (default: one part)")
    args = parser.parse_args()
    out = args.out.resolve()
    if args.part_mib is not None and args.part_mib < 1:
        raise SystemExit(f"--part-mib {args.part_mib}: a part has at least 1 MiB")
    check_ignored(out)
    if args.step is None or "modules" in args.step:
        check_python(args.python)  # now, not after what takes minutes
    out.mkdir(parents=True, exist_ok=True)
    os.environ.pop("TRITON_INTERPRET", None)
    steps = {
        "wheels": lambda: download(out),
        "site": lambda: make_site(out),
        "modules": lambda: build_modules(out, args.python),
        "parts": lambda: make_parts(out, args.part_mib),
    }
    for name in STEPS:
        if args.step is None or name in args.step:
            began = time.monotonic()
            print(f"{name} ...", flush=True)
            steps[name]()
            print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
