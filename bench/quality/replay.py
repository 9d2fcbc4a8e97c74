"""The same chats in plain transformers: no server, no tree, no pages, no packing; eviction is a mask per layer.

One chat at a time, all cells at once: a row of a batch each. Policies and budgets are the package's own
(:class:`~tgvkv_sglang.selection.scoring.PrefillScoring`), so that a difference to a live server is the server's.
"""

from __future__ import annotations

import math
import sys
from typing import Callable, Sequence

import torch
from transformers import AttentionInterface, AutoProcessor, DynamicCache, Qwen3VLForConditionalGeneration

from bench.quality.boards import Chat
from bench.quality.cells import FULL, Cell
from bench.quality.live import EVIDENCE_POLICY, SLACK, Answers
from tgvkv_sglang.config import RequestOptions, TgvConfig
from tgvkv_sglang.demo.bundle import DEMO_MODEL
from tgvkv_sglang.demo.scenes import render
from tgvkv_sglang.kv.store import UnitStore
from tgvkv_sglang.registry import POLICIES, load_budget_rule, load_policy, load_scope, refresh
from tgvkv_sglang.selection.choose import Quota
from tgvkv_sglang.selection.grounding import Grounding
from tgvkv_sglang.selection.policy import Merging, Model
from tgvkv_sglang.selection.scoring import Ask, PrefillScoring
from tgvkv_sglang.types import Span
from training.demo_model.probes import Probe, chat_messages

NAME = "tgvkv_quality"


class _Attention:
    """What transformers calls. ``seen``: ``[B or 1, q, n]`` bool a layer; ``record``: q and LSE by layer, if any."""

    seen: list[torch.Tensor]
    record: list[tuple[torch.Tensor, torch.Tensor]] | None = None

    def __call__(self, module, query, key, value, attention_mask, scaling, **_):
        key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
        logits = query @ key.transpose(-1, -2) * scaling
        layer = getattr(module, "layer_idx", None)  # the vision tower's modules have none: it sees everything
        if layer is not None:
            logits = logits.masked_fill(~self.seen[layer][:, None], -torch.inf)
            if self.record is not None:
                self.record.append((query, logits.logsumexp(-1)))
                self.scale = scaling
        return (logits.softmax(-1) @ value).transpose(1, 2).contiguous(), None


class Replay:
    """The bundled model, and one chat in as many ways as there are cells.

    Args:
        drops: each decode step drops one more vision token a layer, the lowest in score, as the published code does.
    """

    def __init__(self, cells: Sequence[Cell], drops: bool = False):
        sys.path.insert(0, str(EVIDENCE_POLICY))
        refresh()
        self.attention = _Attention()
        AttentionInterface.register(NAME, self.attention)
        self.processor = AutoProcessor.from_pretrained(DEMO_MODEL)
        self.model = Qwen3VLForConditionalGeneration.from_pretrained(
            DEMO_MODEL, dtype=torch.float32, attn_implementation=NAME
        ).eval()
        self.layers = self.model.config.text_config.num_hidden_layers
        self.cells, self.drops = cells, drops
        self.configs = [RequestOptions.from_custom_params(cell.options()).apply(TgvConfig()) for cell in cells]

    @torch.inference_mode()
    def hold(self, chat: Chat) -> list[list[str]]:
        """Answers by cell and turn."""
        rows = len(self.cells)
        self._look(chat)
        self.kept = torch.ones(self.layers, rows, len(self.vision), dtype=torch.bool)
        self.scores = torch.zeros(self.kept.shape)
        computed, generated, answers = 0, [[] for _ in self.cells], []
        for turn, question in enumerate(chat.turns):
            ids = self._ids(chat, turn)
            cached = [computed + _agreeing(said[:-1], ids[computed:-1]) for said in generated]
            logits = self._prefill(ids, computed, cached)
            self._select(chat.name(turn), ids, computed, cached)
            generated = self._decode(logits, len(ids), len(question.answer_words) + SLACK)
            self.cache.crop(len(ids))
            computed = len(ids)
            answers.append([self._text(said) for said in generated])
        return [list(said) for said in zip(*answers, strict=True)]

    # -- a prompt --------------------------------------------------------------------------------------------------

    def _look(self, chat: Chat) -> None:
        features = self.processor.image_processor(images=[render(chat.scene)], return_tensors="pt")
        self.grid = features["image_grid_thw"]
        seen = self.model.model.get_image_features(features["pixel_values"], self.grid, return_dict=True)
        self.picture, self.deepstack = torch.cat(list(seen.pooler_output)), list(seen.deepstack_features)
        self.cache = DynamicCache(config=self.model.config.text_config)
        pad = torch.tensor(self._ids(chat, 0)) == self.model.config.image_token_id
        self.vision = pad.nonzero()[:, 0]
        self.span = Span(int(self.vision[0]), int(self.vision[-1]) + 1)

    def _ids(self, chat: Chat, turn: int) -> list[int]:
        probe = Probe(chat.board, (chat.scene,), chat.turns[: turn + 1])
        messages = chat_messages(probe, image_parts=[{"type": "image"}])
        text = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        text = text.replace("<|image_pad|>", "<|image_pad|>" * len(self.picture))
        return self.processor.tokenizer.encode(text, add_special_tokens=False)

    def _text(self, said: list[int]) -> str:
        end = self.model.generation_config.eos_token_id
        return self.processor.tokenizer.decode([token for token in said if token != end]).strip()

    # -- forwards --------------------------------------------------------------------------------------------------

    def _forward(self, ids: torch.Tensor, positions: torch.Tensor, seen: list[torch.Tensor]) -> torch.Tensor:
        """Logits ``[B, words]`` of the last of some tokens ``[B, t]``."""
        self.attention.seen = seen
        embeds, vision = self.model.get_input_embeddings()(ids), {}
        is_vision = ids == self.model.config.image_token_id
        if is_vision.any():
            embeds[is_vision] = self.picture
            vision = {"visual_pos_masks": is_vision, "deepstack_visual_embeds": self.deepstack}
        output = self.model.model.language_model(
            inputs_embeds=embeds, position_ids=positions, past_key_values=self.cache, use_cache=True, **vision
        )
        return self.model.lm_head(output.last_hidden_state[:, -1])

    def _prefill(self, ids: list[int], start: int, cached: list[int]) -> torch.Tensor:
        """Tokens from ``start`` on, of which those before ``cached`` were decoded in the turn before: they see what it
        saw. The rest sees the picture in full, or under eager reclaim what was kept of it."""
        rows = len(self.cells) if start else 1  # in the first turn all cells see the same
        whole = torch.tensor([ids])
        is_image = (whole == self.model.config.image_token_id).int()
        positions, delta = self.model.model.get_rope_index(whole, is_image, image_grid_thw=self.grid)
        self.delta = int(delta)
        causal = torch.arange(len(ids)) <= torch.arange(start, len(ids))[:, None]
        seen = []
        for kept in self.kept:
            mask = causal.repeat(rows, 1, 1)
            for row in range(rows if start else 0):
                through = len(ids) if self.cells[row].reclaim == "eager" else cached[row]
                mask[row, : through - start, self.vision] &= kept[row]
            seen.append(mask)
        self.attention.record = []
        logits = self._forward(whole[:, start:].expand(rows, -1), positions[:, :, start:].expand(3, rows, -1), seen)
        self.recorded, self.attention.record = self.attention.record, None
        if not start:
            self.cache.batch_repeat_interleave(len(self.cells))
        return logits.expand(len(self.cells), -1)

    def _decode(self, logits: torch.Tensor, length: int, most: int) -> list[list[int]]:
        end = self.model.generation_config.eos_token_id
        rows = len(self.cells)
        token, said, done = logits.argmax(-1), [[] for _ in range(rows)], torch.zeros(rows, dtype=torch.bool)
        for step in range(most):
            for row in (~done).nonzero()[:, 0].tolist():
                said[row].append(int(token[row]))
            done |= token == end
            if done.all():
                break
            if self.drops:
                self._drop()
            seen = torch.ones(self.layers, rows, 1, length + step + 1, dtype=torch.bool)
            seen[:, :, 0, self.vision] = self.kept
            positions = torch.full((3, rows, 1), length + step + self.delta)
            token = self._forward(token[:, None], positions, list(seen)).argmax(-1)
        return said

    # -- selection -------------------------------------------------------------------------------------------------

    def _select(self, name: str, ids: list[int], start: int, cached: list[int]) -> None:
        """Choose for the rows that see the picture in full, from the queries of their own new tokens."""
        count, tokens = len(ids) - start, len(ids)
        slots = torch.arange(len(self.cells) * tokens, dtype=torch.int32).view(-1, tokens)
        store = UnitStore(*(self._pool(kind) for kind in ("keys", "values")))
        asks = []
        for row, (cell, config) in enumerate(zip(self.cells, self.configs, strict=True)):
            if cell.policy == FULL or (start and cell.reclaim == "eager"):
                continue
            policy, rule = load_policy(config.policy), load_budget_rule(config.rule)
            text = policy.query_positions([self.span], cached[row], tokens, config.grounding_cap)
            quota = Quota(load_scope(config.scope), config.exact_retention, tokens)
            grounding = Grounding(name, [self.span], text, policy, rule, quota)
            asks.append(Ask(grounding, text - start + (row * count if start else 0), row, last=True))
        model = Model(self.layers, self.model.config.text_config.num_attention_heads)
        scoring = PrefillScoring(asks, slots, store, model, stash_bytes=2**40)
        for layer, (q, lse) in enumerate(self.recorded):
            lse_b2 = lse.transpose(1, 2).flatten(0, 1) / math.log(2)
            scoring.add(layer, q.transpose(1, 2).flatten(0, 1).contiguous(), lse_b2.contiguous(), self.attention.scale)
        for ask in asks:
            self.kept[:, ask.page_row] = torch.from_numpy(ask.grounding.choice().mask())
            self.scores[:, ask.page_row] = ask.grounding.chosen.scores

    def _drop(self) -> None:
        """One more token of each layer, of the rows that evict at all."""
        lowest = self.scores.masked_fill(~self.kept, torch.inf).argmin(-1)
        self.kept.scatter_(-1, lowest[..., None], False)
        self.kept[:, [row for row, cell in enumerate(self.cells) if cell.policy == FULL]] = True

    def _pool(self, kind: str) -> torch.Tensor:
        """``[L, B*n, heads, dim]``: row after row."""
        layers = [getattr(layer, kind).transpose(1, 2).flatten(0, 1) for layer in self.cache.layers]
        return torch.stack(layers)


def can_replay(cell: Cell) -> bool:
    """Whether a mask can show it: not where a policy changes what it keeps."""
    return not isinstance(POLICIES.get(cell.policy) and load_policy(cell.policy), Merging)


def _agreeing(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of what both begin with."""
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def replay(
    cells: Sequence[Cell], chats: Sequence[Chat], progress: Callable[[], None], drops: bool = False
) -> list[Answers]:
    """Answers by cell, chat and turn."""
    engine, held = Replay(cells, drops), []
    for chat in chats:
        held.append(engine.hold(chat))
        progress()
    return [[one[i] for one in held] for i in range(len(cells))]
