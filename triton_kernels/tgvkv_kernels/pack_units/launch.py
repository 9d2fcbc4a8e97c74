"""Launches of `pack_units`."""

import torch

from tgvkv_kernels.common.tiles import ceil_div, next_power_of_2
from tgvkv_kernels.pack_units.kernel import move_rows_kernel

TILE_WORDS = 2048  # per program: 4 independent 16-byte accesses a thread with 128 threads of 4-byte words


def move_config(words: int) -> dict[str, int]:
    """Tile of `move_rows_kernel` for rows of that many words."""
    wide = min(TILE_WORDS, next_power_of_2(words))
    return {"WORDS": words, "BN": TILE_WORDS // wide, "BW": wide, "num_warps": 4}


def launch_pack_units(
    k_flat: torch.Tensor, v_flat: torch.Tensor, src_units: torch.Tensor, dst_units: torch.Tensor
) -> None:
    """Checked arguments of `tgvkv_kernels.pack_units.api.pack_units`; one gather and one scatter launch.

    The scatter starts after the whole gather (same stream), so overlapping lists are harmless.
    """
    dtype = _word_dtype(k_flat, v_flat)
    k_words, v_words = (flat.view(dtype).flatten(1) for flat in (k_flat, v_flat))
    count, words = src_units.shape[0], k_words.shape[1]
    buffer = torch.empty(2 * count * words, dtype=dtype, device=k_flat.device)
    config = move_config(words)
    grid = (ceil_div(count, config["BN"]), 2, ceil_div(words, config["BW"]))
    for units, gather in ((src_units.contiguous(), True), (dst_units.contiguous(), False)):
        move_rows_kernel[grid](
            k_words,
            v_words,
            buffer,
            units,
            count,
            k_words.stride(0),
            v_words.stride(0),
            GATHER=gather,
            **config,
        )


def _word_dtype(*flats: torch.Tensor) -> torch.dtype:
    """The widest integer that divides every row, stride and start: moves must not interpret the values."""
    for dtype in (torch.int32, torch.int16):
        if all(
            size * flat.element_size() % dtype.itemsize == 0
            for flat in flats
            for size in (flat.shape[2], flat.stride(0), flat.storage_offset())
        ):
            return dtype
    return torch.uint8
