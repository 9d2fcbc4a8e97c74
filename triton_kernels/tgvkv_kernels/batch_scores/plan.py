"""How a batch's scoring is cut into pieces of work, from lengths that the host knows."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tgvkv_kernels.common.checks import check_heads
from tgvkv_kernels.common.errors import KernelInputError
from tgvkv_kernels.common.upload import upload

ROW_TILE_BYTES = 32 * 1024  # query rows that a program keeps: 128 of 256 bytes
MAX_ROW_TILE = 128
KEY_CHUNK = 1024  # keys that a program walks over
REDUCE_BLOCK = 128  # keys whose partial sums one program adds up


@dataclass(frozen=True)
class Pieces:
    """Work of the two launches over one kind of keys.

    Attributes:
        work: ``[n, 8]`` int32 on the device, a (request, key chunk, row tile): the request's first token in the stash,
            its tokens, the row tile, the request's first key, the chunk's first key in it, the request's keys, where
            its partial sums start, unused.
        sums: ``[m, 8]`` int32, a (request, block of keys): first key of the request, of the block in it, the request's
            keys, where its partial sums start, its row tiles, its first piece of `work`, how many, the request.
        keys: keys of all requests. partials: partial sums of one layer per KV head.
    """

    work: torch.Tensor
    sums: torch.Tensor
    keys: int
    partials: int


class ScorePlan:
    """Tables of one prefill's scoring; one upload, used for every layer block.

    A request's pieces depend on its own lengths alone, so its values have the same bits in every batch, every layer
    block and every chunking of its prompt.

    Attributes:
        text_lens, vision_lens: ``[S]`` tokens of each request. first_text: ``[V]`` int32 on the device, of each vision
            token the index of the first text token of its request after it. layer_bytes: of device memory that
            one layer takes at most (stash, partial sums, results), to choose how many layers make a block.

    Args:
        text_positions, vision_positions: of each of S scoring requests, on the host: ``[T_r]`` logical positions of its
            text tokens, ascending, and ``[V_r]`` of its vision tokens, in any order; at least one of each.
        q_heads, kv_heads, head_dim, dtype: of the stash (one tensor-parallel rank).
        device: of the stash.

    Raises:
        KernelInputError: lengths below 1, or not one pair for each request.
    """

    def __init__(
        self,
        text_positions: Sequence[torch.Tensor],
        vision_positions: Sequence[torch.Tensor],
        q_heads: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        check_heads(q_heads, kv_heads)
        text_lens, vision_lens = (tuple(map(len, given)) for given in (text_positions, vision_positions))
        if len(text_lens) != len(vision_lens) or not text_lens or 0 in text_lens + vision_lens:
            raise KernelInputError(
                f"{list(text_lens)} text and {list(vision_lens)} vision tokens: each request needs some of both"
            )
        self.text_lens, self.vision_lens = text_lens, vision_lens
        self.row_tile = row_tile(head_dim, dtype.itemsize)
        tiles = [-(-length * (q_heads // kv_heads) // self.row_tile) for length in text_lens]
        kinds = [_pieces(text_lens, keys, tiles) for keys in (text_lens, vision_lens)]
        tables = [torch.tensor(rows, dtype=torch.int32) for work, sums, _ in kinds for rows in (work, sums)]
        first = [
            torch.searchsorted(text.contiguous(), vision.contiguous(), right=True)
            for text, vision in zip(text_positions, vision_positions, strict=True)
        ]
        flat = torch.cat([*(table.flatten() for table in tables), *(part.to(torch.int32) for part in first)])
        tokens, vision = sum(text_lens), sum(vision_lens)
        row_bytes = q_heads * (head_dim * dtype.itemsize + 4)
        self.layer_bytes = tokens * (row_bytes + 4) + 4 * (vision + kv_heads * max(kinds[0][2], kinds[1][2]))
        counts = [*map(torch.numel, tables), vision]
        *flat, self.first_text = upload(flat, device).split(counts)
        text_work, text_sums, vision_work, vision_sums = (table.view(-1, 8) for table in flat)
        self.text = Pieces(text_work, text_sums, tokens, kinds[0][2])
        self.vision = Pieces(vision_work, vision_sums, vision, kinds[1][2])


def row_tile(head_dim: int, itemsize: int) -> int:
    """Query rows (tokens x group) of a program: 128 of head_dim 128 in 16 bits, fewer where they are longer."""
    width = max(16, 1 << (head_dim - 1).bit_length())
    return min(MAX_ROW_TILE, ROW_TILE_BYTES // (width * itemsize))


def _pieces(text_lens: Sequence[int], key_lens: Sequence[int], tiles: Sequence[int]) -> tuple[list, list, int]:
    """Rows of `Pieces.work` and `Pieces.sums`, and the partial sums per KV head."""
    work, sums = [], []
    row, key, partial = 0, 0, 0
    for request, (tokens, keys, row_tiles) in enumerate(zip(text_lens, key_lens, tiles, strict=True)):
        first = len(work)
        for start in range(0, keys, KEY_CHUNK):  # row tiles of a chunk next to each other: they share it in L2
            work += [[row, tokens, tile, key, start, keys, partial, 0] for tile in range(row_tiles)]
        for start in range(0, keys, REDUCE_BLOCK):
            sums.append([key, start, keys, partial, row_tiles, first, len(work) - first, request])
        row, key, partial = row + tokens, key + keys, partial + row_tiles * keys
    return work, sums, partial
