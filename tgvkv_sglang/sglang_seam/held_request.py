"""A running request as its lifecycle sees it (``request.lifecycle.Holder``), kept in SGLang's ``Req``."""

from __future__ import annotations

import torch
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool

from ..kv.nodes import Node
from ..namespace import Namespace
from ..request.state import RequestState
from .requests import Facts


class HeldRequest:
    """Reads and writes the fields that SGLang's scheduler reads: nothing is kept here."""

    def __init__(self, req: Req, facts: Facts, pool: ReqToTokenPool):
        self.req, self.facts, self._pool = req, facts, pool

    @property
    def namespace(self) -> Namespace:
        return self.facts.namespace

    @property
    def state(self) -> RequestState | None:
        return self.facts.state

    @property
    def node(self) -> Node | None:
        return self.req.last_node

    @node.setter
    def node(self, node: Node) -> None:
        self.req.last_node = node

    @property
    def protected_len(self) -> int:
        return self.req.cache_protected_len

    @protected_len.setter
    def protected_len(self, length: int) -> None:
        self.req.cache_protected_len = length

    @property
    def page_row(self) -> torch.Tensor:
        """``[context length]`` int32, a view of SGLang's page table."""
        return self._pool.req_to_token[self.req.req_pool_idx]
