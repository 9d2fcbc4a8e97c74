"""Launch every kernel once, in every variant that a server with such a model uses.

On the server's GPU, so that nothing is compiled or loaded when the first picture comes; `aot` does the same without a
GPU. No kernel's variant depends on batch sizes, picture sizes or where an index tensor starts, so this is all of them.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ModelShape:
    """What of a model selects kernel variants. Heads are those of one tensor-parallel rank.

    Attributes:
        kv_dtype: of the storage; None: that of the model. scaled: layers have factors that K was divided by.
    """

    q_heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    layers: int
    kv_dtype: torch.dtype | None = None
    scaled: bool = False

    @property
    def storage_dtype(self) -> torch.dtype:
        return self.kv_dtype or self.dtype


def warm_up(shape: ModelShape, device: torch.device | str) -> None:
    """Launch every operation on small tensors of zeros. Raises what Triton raises where a kernel cannot be compiled."""
    warm_up_attention(shape, device)
    warm_up_moves(shape, device)


def warm_up_attention(shape: ModelShape, device: torch.device | str) -> None:
    """Scores and `view_attention`."""
    from tgvkv_kernels.view_attention.launch import launch_view_attention

    tokens, heads = 64, shape.q_heads
    q = torch.zeros(tokens, heads, shape.head_dim, dtype=shape.dtype, device=device)
    flat = torch.zeros(tokens, shape.kv_heads, shape.head_dim, dtype=shape.storage_dtype, device=device)
    lse = torch.zeros(tokens, heads, device=device)
    indptr = torch.zeros(tokens + 1, dtype=torch.int32, device=device)
    units = torch.zeros(4096, dtype=torch.int32, device=device)  # several chunks: decode then merges them
    positions = torch.zeros(tokens, dtype=torch.int64, device=device)
    _warm_up_scores(shape, q, lse, flat, positions)
    for row_map in (None, units[:tokens]):
        launch_view_attention(q, flat, flat, units, indptr, row_map, 1.0, 1.0, q.clone(), lse.clone())


def _warm_up_scores(shape: ModelShape, q, lse, flat, positions) -> None:
    """`stash_rows` and `batch_scores`."""
    from tgvkv_kernels.batch_scores.launch import KINDS, launch_column_sums
    from tgvkv_kernels.batch_scores.plan import ScorePlan
    from tgvkv_kernels.stash_rows.launch import launch_stash_rows

    host, heads = torch.arange(q.shape[0]), (shape.q_heads, shape.kv_heads, shape.head_dim)
    plan = ScorePlan([host], [host], *heads, shape.dtype, q.device)
    stash, lse_stash, weights = q[None].clone(), lse[None].clone(), lse[None, :, 0].contiguous()
    launch_stash_rows(q, lse, positions, positions, stash[0], lse_stash[0])
    k_scales = torch.ones(shape.layers, device=q.device) if shape.scaled else None
    for slots in (positions, positions.int()):
        where = (flat, k_scales, slots, 0, flat.shape[0], 1.0, shape.q_heads)
        for kind in KINDS:
            launch_column_sums(kind, plan, stash, lse_stash, weights if kind == "weighted" else None, *where)


def warm_up_moves(shape: ModelShape, device: torch.device | str) -> None:
    """`pack_units`, `select`, `view_units` and `dense_rows`."""
    from tgvkv_kernels.dense_rows.launch import launch_dense_rows
    from tgvkv_kernels.pack_units.launch import launch_pack_units
    from tgvkv_kernels.select import launch as select

    flat = torch.zeros(16, shape.kv_heads, shape.head_dim, dtype=shape.storage_dtype, device=device)
    units = torch.zeros(16, dtype=torch.int32, device=device)
    for ids in (units, units.long()):
        launch_pack_units(flat, flat, ids, ids)  # every unit onto itself: all are 0
    scores = torch.zeros(shape.layers, 16, device=device)
    layer_ptr = torch.zeros(shape.layers + 1, dtype=torch.int32, device=device)
    for slots in (units, units.long()):
        select.launch_view_units(units, layer_ptr, slots, 16)
        whole = torch.tensor([[0, 16, 16, 0]], dtype=torch.int32).to(device)
        for given in (None, torch.zeros(shape.layers, 1, dtype=torch.int32, device=device)):
            mass = torch.zeros(shape.layers, 1, device=device)
            select.launch_select_batch(scores, mass, given, whole, 16, slots, 16, torch.int32)
    rows = torch.zeros(2, 16, dtype=torch.int32, device=device)
    zeros = torch.zeros(2, dtype=torch.int64, device=device)
    bounds = torch.zeros(3, dtype=torch.int32, device=device)
    launch_dense_rows(rows, zeros, zeros, units, units, bounds, units.clone(), bounds.clone())
