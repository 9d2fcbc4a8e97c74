"""Drop the CUDA kernels of a library that nobody will launch, in place, so that what is left compresses to a few MiB.

A library that nvcc made holds, in its section ``.nv_fatbin``, one fat binary for each source file: a header, then a
kernel image (cubin) for each architecture, behind a header of its own. Fat binaries that are wanted keep their sm_90
image. The others get an image without kernels, so that the CUDA runtime finds every fat binary well formed and says
"invalid device function" should one of their kernels be launched after all. Nothing moves: the bytes that are no
longer needed are zeros, and host code stays as it is.
"""

from __future__ import annotations

import mmap
import re
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SECTION, ARCH = ".nv_fatbin", 90
MAGIC, CUBIN = 0xBA55ED50, 2
FAT_HEADER = struct.Struct("<IHHQ")  # magic, version, bytes of this header, bytes behind it
# Kind, -, bytes of this header, of the image, of it compressed; [7] architecture, [9] flags, [11] bytes uncompressed.
IMAGE_HEADER = struct.Struct("<HHIQIIIIQQQQ")
COMPRESSED = 0x8000 | 0x2000  # zstd or LZ4
# nvcc puts the source file's name into the names of its internal symbols.
SOURCE = re.compile(rb"_INTERNAL_[0-9a-f]{8}_\d+_(\w+?)_cu_[0-9a-f]{8}")


@dataclass(frozen=True)
class FatBinary:
    """``start`` and ``end`` in the file; ``image`` and ``image_end`` of its sm_90 cubin, header included."""

    start: int
    end: int
    image: int
    image_end: int


def section(library: Path) -> tuple[int, int]:
    """Where the fat binaries are in the file: offset and end.

    Raises:
        ValueError: there are none.
    """
    from elftools.elf.elffile import ELFFile

    with library.open("rb") as file:
        found = ELFFile(file).get_section_by_name(SECTION)
        if found is None:
            raise ValueError(f"{library} has no section {SECTION}: it is no library that nvcc made")
        return found["sh_offset"], found["sh_offset"] + found["sh_size"]


def fat_binaries(data: mmap.mmap, offset: int, end: int) -> Iterator[FatBinary]:
    """Those of a section, in order.

    Raises:
        ValueError: one without an image for sm_90.
    """
    while (offset := data.find(struct.pack("<I", MAGIC), offset, end)) >= 0:
        _, _, header, size = FAT_HEADER.unpack_from(data, offset)
        image, stop = offset + header, offset + header + size
        found = None
        while image < stop:
            fields = IMAGE_HEADER.unpack_from(data, image)
            behind = image + fields[2] + fields[3]
            if (fields[0], fields[7]) == (CUBIN, ARCH):
                found = FatBinary(offset, stop, image, behind)
            image = behind
        if found is None:
            raise ValueError(f"the fat binary at {offset} has no cubin for sm_{ARCH}")
        yield found
        offset = stop


def source(data: mmap.mmap, binary: FatBinary) -> str | None:
    """The source file (without ``.cu``) of a fat binary's kernels; None where it is compressed or has no kernels."""
    found = SOURCE.search(data, binary.image, binary.image_end)
    return found and found[1].decode()


def empty_cubin() -> bytes:
    """An image for sm_90a without kernels, its size a multiple of 8."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as directory:
        text, image = Path(directory, "empty.ptx"), Path(directory, "empty.cubin")
        text.write_text(f".version 8.0\n.target sm_{ARCH}a\n.address_size 64\n")
        subprocess.run([knobs.nvidia.ptxas.path, f"-arch=sm_{ARCH}a", str(text), "-o", str(image)], check=True)
        content = image.read_bytes()
    return content + bytes(-len(content) % 8)


def trim(library: Path, wanted: re.Pattern) -> tuple[list[str], int]:
    """Keep the kernels of the sources whose whole name matches; returns (those sources, fat binaries emptied).

    Raises:
        ValueError: the library has no fat binaries, or none is wanted; it is unchanged then.
    """
    offset, end = section(library)
    empty = empty_cubin()
    with library.open("r+b") as file, mmap.mmap(file.fileno(), 0) as data:
        binaries = list(fat_binaries(data, offset, end))
        names = [source(data, binary) for binary in binaries]
        kept = [name for name in names if name and wanted.fullmatch(name)]
        if not kept:
            raise ValueError(f"none of {len(names)} fat binaries in {library} is of a source {wanted.pattern}")
        for binary, name in zip(binaries, names, strict=True):
            images = data[binary.image : binary.image_end] if name in kept else emptied(data, binary, empty)
            _, version, header, _ = FAT_HEADER.unpack_from(data, binary.start)
            content = FAT_HEADER.pack(MAGIC, version, header, len(images))
            content += data[binary.start + FAT_HEADER.size : binary.start + header] + images
            data[binary.start : binary.end] = content.ljust(binary.end - binary.start, b"\0")
    return kept, len(names) - len(kept)


def emptied(data: mmap.mmap, binary: FatBinary, empty: bytes) -> bytes:
    """A fat binary's sm_90 image, header included, without its kernels."""
    fields = list(IMAGE_HEADER.unpack_from(data, binary.image))
    fields[3], fields[4], fields[9], fields[11] = len(empty), 0, fields[9] & ~COMPRESSED, 0
    return IMAGE_HEADER.pack(*fields) + data[binary.image + IMAGE_HEADER.size : binary.image + fields[2]] + empty
