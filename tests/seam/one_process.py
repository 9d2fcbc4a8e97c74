"""The cache of a server without the server: SGLang's requests, pools and release code around our radix cache.

Only the model is missing: KV and queries are random, and a forward is what scoring sees of one.
"""

from __future__ import annotations

import math
from array import array
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, Iterator, Sequence

import numpy as np
import torch
from sglang.srt.environ import envs
from sglang.srt.managers.schedule_batch import (
    MM_PAD_SHIFT_VALUE,
    Modality,
    MultimodalDataItem,
    MultimodalInputs,
    Req,
    ReqKvInfo,
)
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.common import maybe_cache_unfinished_req, release_kv_cache
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
from sglang.srt.plugins import load_plugins
from sglang.srt.runtime_context import publish, reset_context
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.server_args import ServerArgs, prepare_server_args

from tgvkv_sglang.attention.planner import ViewPlanner
from tgvkv_sglang.attention.rows import Row
from tgvkv_sglang.attention.torch_cpu import KeyRows, row_lse_e, visible
from tgvkv_sglang.cli.serve import CPU_FLAGS
from tgvkv_sglang.config import TgvConfig
from tgvkv_sglang.selection.policy import Model
from tgvkv_sglang.sglang_seam.allocator import CpuSlotAllocator
from tgvkv_sglang.sglang_seam.pool import TgvKVPool
from tgvkv_sglang.sglang_seam.radix_cache import TgvRadixCache
from tgvkv_sglang.sglang_seam.requests import state_of

LAYERS, Q_HEADS, KV_HEADS, DIM, SCALE = 3, 4, 2, 8, 0.3
SLOTS = 300
Spoil = Callable[[torch.Tensor, int], None]
"""Changes the queries ``[t, Hq, D]`` of one layer in place."""


def arguments(model_dir: Path, *flags: str) -> ServerArgs:
    """What a server of ours is started with, our plugin loaded."""
    load_plugins()
    return prepare_server_args(["--model-path", str(model_dir), *CPU_FLAGS, "--attention-backend", "tgvkv", *flags])


@contextmanager
def configured(model_dir: Path, *flags: str) -> Iterator[ServerArgs]:
    """SGLang's process-wide configuration, as a scheduler process has it."""
    args = arguments(model_dir, *flags)
    publish(args, role="test")
    try:
        yield args
    finally:
        reset_context()


def picture(number: int, tokens: int) -> list[int]:
    """Ids of one image as SGLang pads it."""
    return [MM_PAD_SHIFT_VALUE + number] * tokens


class OneProcess:
    """A pool of :data:`SLOTS` slots, the radix cache on it, and requests step by step."""

    def __init__(self, **config):
        self.config = TgvConfig(**{"retention": 0.25, **config})
        self.rows = ReqToTokenPool(8, 256, "cpu", False)
        pool = TgvKVPool(SLOTS, 1, torch.float32, KV_HEADS, DIM, LAYERS, "cpu", False)
        self.random = torch.Generator().manual_seed(0)
        for tensor in (pool.k_all, pool.v_all):
            tensor.copy_(torch.randn(tensor.shape, generator=self.random))
        self.store = pool.store
        self.planner = ViewPlanner(self.store, Model(LAYERS, Q_HEADS), self.rows.req_to_token, self.config.stash_bytes)
        self.allocator = CpuSlotAllocator(SLOTS, 1, torch.float32, "cpu", pool, False)
        self.cache = TgvRadixCache(CacheInitParams(False, self.rows, self.allocator, 1), self.config)

    # -- one request ---------------------------------------------------------------------------------------------

    def request(self, rid: str, ids: list[int]) -> Req:
        req = Req(rid, "", array("q", ids), SamplingParams(max_new_tokens=8), vocab_size=100)
        pads = dict.fromkeys(token for token in ids if token >= MM_PAD_SHIFT_VALUE)
        items = [MultimodalDataItem(Modality.IMAGE, hash=pad - MM_PAD_SHIFT_VALUE, pad_value=pad) for pad in pads]
        req.multimodal_inputs = MultimodalInputs(mm_items=items)
        return req

    def schedule(self, req: Req, until: int | None = None) -> None:
        """Match, lock, and give the rest of the prompt to a chunk: all of it, or up to position ``until``."""
        req.init_next_round_input(self.cache)
        self.cache.inc_lock_ref(req.last_node)
        req.req_pool_idx = self.rows.alloc([req])[0]
        prefix, end = len(req.prefix_indices), until or len(req.full_untruncated_fill_ids)
        slots = self.allocator.alloc(end - prefix)
        self.rows.write((req.req_pool_idx, slice(0, prefix)), req.prefix_indices.to(torch.int32))
        self.rows.write((req.req_pool_idx, slice(prefix, end)), slots.to(torch.int32))
        req.set_extend_range(prefix, end)
        req.kv_committed_len, req.kv = end, ReqKvInfo(kv_allocated_len=end, swa_evicted_seqlen=0)

    def run(self, req: Req, spoil: Spoil | None = None, layers: Sequence[int] = range(LAYERS)) -> Row:
        """What scoring sees of the scheduled chunk's forward."""
        prefix, end = req.extend_range
        (row,) = self.planner.prefill_rows([state_of(req)], [prefix], [end])
        scoring = self.planner.scoring([row], [req.req_pool_idx])
        if not row.scores:
            return row
        slots = self.rows.req_to_token[req.req_pool_idx, :end]
        key_rows = KeyRows(slots, row.table, self.store)
        for layer in layers:
            keys = key_rows.layer(layer)
            q = torch.randn(end - prefix, Q_HEADS, DIM, generator=self.random)
            lse_e = row_lse_e(q, keys, self.store, visible(torch.arange(prefix, end), keys), SCALE)
            if spoil is not None:
                text = q[row.text]
                spoil(text, layer)
                q[row.text] = text
            scoring.add(layer, q, lse_e / math.log(2), SCALE)
        return row

    def take_result(self, req: Req, token: int = 7, last: bool = False) -> None:
        """The scheduler processes the prefill's result; ``last``: the request ends with this token."""
        req.output_ids.append(token)
        if last:
            release_kv_cache(req, self.cache)
        else:
            maybe_cache_unfinished_req(req, self.cache)

    def prefill(self, rid: str, ids: list[int], spoil: Spoil | None = None, last: bool = False) -> Req:
        req = self.request(rid, ids)
        self.schedule(req)
        self.run(req, spoil)
        self.take_result(req, last=last)
        return req

    def decode(self, req: Req, token: int = 8) -> None:
        self.rows.write((req.req_pool_idx, req.kv_committed_len), self.allocator.alloc(1).to(torch.int32))
        req.kv_committed_len += 1
        req.kv.kv_allocated_len += 1
        req.output_ids.append(token)

    def finish(self, req: Req) -> None:
        release_kv_cache(req, self.cache)

    def retract(self, req: Req) -> None:
        release_kv_cache(req, self.cache, is_insert=False)
        req.reset_for_retract()

    # -- what there is -------------------------------------------------------------------------------------------

    def keys(self, req: Req, length: int, decode: bool = True) -> KeyRows:
        """Keys of the request's next step, up to position ``length``."""
        return KeyRows(self.rows.req_to_token[req.req_pool_idx, :length], state_of(req).table(decode), self.store)

    def attended(self, req: Req) -> list[list[int]]:
        """Logical positions that the next decode step attends to, in each layer."""
        keys = self.keys(req, req.kv_committed_len)
        return [np.sort(keys.layer(layer).positions.numpy()).tolist() for layer in range(LAYERS)]

    def free(self) -> int:
        return self.allocator.available_size()

    def check_idle(self) -> None:
        """Nothing runs: every slot is free or can be, and has exactly one owner."""
        assert self.free() + self.cache.evictable_size() == SLOTS and self.cache.protected_size() == 0
        with envs.SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY.override(1):
            self.cache.check_ownership()
