"""Dropping kernels from a library: real kernel images by Triton's assembler, judged by NVIDIA's cuobjdump."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess

import pytest
from triton import knobs

from tools.airgap import fatbins

PTX = """.version 8.0
.target {target}
.address_size 64
.visible .global .align 1 .b8 _ZN36_INTERNAL_01234567_8_{source}_cu_89abcdef1E[1];
.visible .entry kernel_of_{source}() {{ ret; }}
"""
SOURCES = ("flash_fwd_hdim128_bf16_sm90", "flash_fwd_hdim256_bf16_sm90", "flash_fwd_combine")
WANTED = re.compile("flash_fwd_combine|flash_fwd_hdim128_bf16.*")


def image(directory, source: str, target: str) -> bytes:
    """A kernel image with its header in a fat binary."""
    text, out = directory / "x.ptx", directory / "x.cubin"
    text.write_text(PTX.format(source=source, target=target))
    subprocess.run([knobs.nvidia.ptxas.path, f"-arch={target}", str(text), "-o", str(out)], check=True)
    cubin = out.read_bytes()
    cubin += bytes(-len(cubin) % 8)
    arch = int(re.search(r"\d+", target)[0])
    return fatbins.IMAGE_HEADER.pack(2, 0x101, 64, len(cubin), 0, 0, 8, arch, 0, 0x11, 0, 0) + cubin


@pytest.fixture
def library(tmp_path):
    """A library of three sources, each with images for sm_90a and sm_80, in the section where nvcc puts them."""
    if shutil.which("gcc") is None:
        pytest.skip("gcc makes the library and is not here")
    section = b""
    for source in SOURCES:
        images = b"".join(image(tmp_path, source, target) for target in ("sm_90a", "sm_80"))
        section += fatbins.FAT_HEADER.pack(fatbins.MAGIC, 1, 16, len(images)) + images
    (tmp_path / "section").write_bytes(section)
    code = f'.section .nv_fatbin,"a"\n.balign 8\n.incbin "{tmp_path}/section"\n.text\n.globl answer\n'
    (tmp_path / "x.s").write_text(code + "answer: mov $42, %eax\nret\n")
    path = tmp_path / "library.so"
    subprocess.run(["gcc", "-shared", "-o", str(path), str(tmp_path / "x.s")], check=True)
    return path


def listed(library, *flags) -> list[str]:
    command = [knobs.nvidia.cuobjdump.path, *flags, str(library)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


def kernels(library) -> list[str]:
    return [name for line in listed(library, "-res-usage") for name in re.findall(r"Function (\w+):", line)]


def test_wanted_kernels_stay_and_every_fat_binary_is_well_formed(library):
    assert sorted(kernels(library)) == sorted(f"kernel_of_{source}" for source in SOURCES for _ in range(2))
    size = library.stat().st_size
    assert fatbins.trim(library, WANTED) == ([SOURCES[0], SOURCES[2]], 1)
    assert [line.rpartition(".sm_")[2] for line in listed(library, "-lelf")] == ["90a.cubin"] * 3
    assert kernels(library) == [f"kernel_of_{SOURCES[0]}", f"kernel_of_{SOURCES[2]}"]
    assert library.stat().st_size == size and ctypes.CDLL(str(library)).answer() == 42


def test_trimming_again_changes_nothing(library):
    fatbins.trim(library, WANTED)
    once = library.read_bytes()
    assert fatbins.trim(library, WANTED) == ([SOURCES[0], SOURCES[2]], 1) and library.read_bytes() == once


def test_a_library_without_what_is_wanted_is_left_as_it_is(library):
    before = library.read_bytes()
    with pytest.raises(ValueError, match="none of 3 fat binaries in .*library.so is of a source flash_bwd"):
        fatbins.trim(library, re.compile("flash_bwd"))
    assert library.read_bytes() == before


def test_a_library_of_another_compiler_is_refused(library):
    subprocess.run(["objcopy", "--remove-section", ".nv_fatbin", str(library)], check=True)
    with pytest.raises(ValueError, match="has no section .nv_fatbin"):
        fatbins.trim(library, WANTED)
