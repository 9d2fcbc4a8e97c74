"""An engine to compare with: prefill, selection, decode and further turns of one conversation at a time.

The weights run through transformers' Qwen3-VL code in float64 (RoPE tables and the vision tower's rotation stay
float32, as transformers computes them). KV of every token is kept for ever; eviction is a mask per layer, so no
packing, no slots and no tree can be wrong here. Shapes: L layers, n tokens, V vision tokens, T grounding tokens.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    BaseImageProcessor,
    DynamicCache,
    PreTrainedTokenizerBase,
    Qwen3VLForConditionalGeneration,
)

from tests.oracle import attention
from tests.oracle.selection import TEXT, VIEWED, VISION, Selection, select

VIEWS = ("kept", "full")


@dataclass(frozen=True)
class Prompt:
    """A prompt as the text layers see it.

    Attributes:
        token_ids: the n token ids, image placeholders expanded.
        is_vision: bool [n].
        image_grid_thw: int64 [images, 3], patches before merging; None without images.
        positions: int64 [3, n], temporal, height and width positions.
        position_delta: what to add to a later token's index to get its position.
        embeds: [n, hidden], vision included.
        deepstack: per deepstack layer [V, hidden].
    """

    token_ids: list[int]
    is_vision: np.ndarray
    image_grid_thw: torch.Tensor | None
    positions: torch.Tensor
    position_delta: int
    embeds: torch.Tensor
    deepstack: list[torch.Tensor]

    @property
    def vision_positions(self) -> np.ndarray:
        return np.flatnonzero(self.is_vision)


@dataclass
class State:
    """A conversation between two turns.

    Attributes:
        token_ids: all tokens so far; KV exists for the first ``num_computed`` of them, as in an engine.
        num_computed: tokens with KV. The last generated token has none.
        is_vision: bool [num_computed].
        evicted: bool [L, num_computed].
        cache: KV of the computed tokens, evicted ones too.
    """

    token_ids: list[int]
    num_computed: int
    is_vision: np.ndarray
    evicted: np.ndarray
    cache: DynamicCache


@dataclass
class Prefill:
    """A finished prefill, before any selection is applied.

    Attributes:
        state: the conversation, ``token_ids`` being the prompt.
        attention: [L, n, n] head-mean attention; rows of tokens that were not computed here are NaN.
        kinds: [n] of TEXT, VISION (in full), VIEWED.
        new_start: first token computed here.
        logits: [vocabulary] of the last token.
        position_delta: see ``Prompt``.
    """

    state: State
    attention: np.ndarray
    kinds: list[int]
    new_start: int
    logits: torch.Tensor
    position_delta: int


@dataclass(frozen=True)
class Turn:
    """One answered turn.

    Attributes:
        token_ids: generated tokens, the first from the prefill.
        gaps: per generated token, how far the best logit is above the second; a small one is a toss-up.
        logprobs: per generated token, its log probability.
        selection: what the turn's prefill selected; None if nothing was evicted.
        state: where the conversation stands, for ``Oracle.continue_``.
    """

    token_ids: list[int]
    gaps: list[float]
    logprobs: list[float]
    selection: Selection | None
    state: State


def load(
    model_dir: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float64,
    precise_embedding_interpolation: bool = True,
    image_backend: str = "torchvision",
) -> Oracle:
    """Load a Qwen3-VL checkpoint into an oracle.

    Args:
        model_dir: directory in Hugging Face layout.
        dtype: float64, or float32 to see what rounding does.
        precise_embedding_interpolation: how the vision tower's position table is interpolated: True is transformers'
            way and SGLang's with ``--enable-precise-embedding-interpolation``, False is SGLang's default.
        image_backend: ``torchvision`` or ``pil`` (what SGLang uses with ``--disable-fast-image-processor``); they
            differ in how they resize.
    """
    model = Qwen3VLForConditionalGeneration.from_pretrained(
        model_dir, dtype=dtype, attn_implementation=attention.NAME, local_files_only=True
    )
    tokenizer = AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
    image_processor = AutoImageProcessor.from_pretrained(model_dir, backend=image_backend, local_files_only=True)
    return Oracle(model.eval(), tokenizer, image_processor, precise_embedding_interpolation)


class Oracle:
    """Reference engine for one Qwen3-VL checkpoint; make it with ``load``."""

    def __init__(
        self,
        model: Qwen3VLForConditionalGeneration,
        tokenizer: PreTrainedTokenizerBase,
        image_processor: BaseImageProcessor,
        precise_embedding_interpolation: bool,
    ):
        self.model = model
        self.config = model.config
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.eos_token_id = model.generation_config.eos_token_id
        self._precise_interpolation = precise_embedding_interpolation
        self._probes = attention.install(model)

    @contextlib.contextmanager
    def quantised(self, dtype: torch.dtype) -> Iterator[None]:
        """Within the block, K and V are kept in a dtype of 8 bits, divided by nothing."""
        try:
            for probe in self._probes:
                probe.kv_dtype = dtype
            yield
        finally:
            for probe in self._probes:
                probe.kv_dtype = None

    # -- prompts -------------------------------------------------------------------------------------------------------

    def prepare(self, messages: Sequence[Mapping], images: Sequence[Image.Image] = ()) -> Prompt:
        """Chat messages to a prompt; images in the order of their parts, whatever those parts carry themselves."""
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return self.prepare_ids(self.tokenizer.encode(text, add_special_tokens=False), images)

    @torch.no_grad()
    @attention.single_threaded()
    def prepare_ids(self, token_ids: Sequence[int], images: Sequence[Image.Image] = ()) -> Prompt:
        """Token ids to a prompt; each image is one placeholder token or already its full run of them.

        Raises:
            ValueError: the placeholders do not fit the images.
        """
        features = self.image_processor(images=list(images), return_tensors="pt") if images else {}
        grid = features.get("image_grid_thw")
        merge = self.config.vision_config.spatial_merge_size**2
        sizes = [] if grid is None else (grid.prod(-1) // merge).tolist()
        token_ids = self._expand(list(token_ids), sizes)
        ids = torch.tensor([token_ids])
        is_image = ids == self.config.image_token_id
        embeds = self.model.get_input_embeddings()(ids)[0]
        deepstack = []
        if images:
            vision = self.model.model.get_image_features(
                features["pixel_values"], grid, return_dict=True, **self._interpolation(grid)
            )
            embeds[is_image[0]] = torch.cat(vision.pooler_output)
            deepstack = list(vision.deepstack_features)
        positions, delta = self.model.model.get_rope_index(ids, is_image.int(), image_grid_thw=grid)
        return Prompt(token_ids, is_image[0].numpy(), grid, positions[:, 0], int(delta), embeds, deepstack)

    def _expand(self, token_ids: list[int], sizes: list[int]) -> list[int]:
        """Each run of placeholders is one image; a run of one token grows to the image's size."""
        pad = self.config.image_token_id
        runs = [(token, len(list(run))) for token, run in itertools.groupby(token_ids)]
        found = [length for token, length in runs if token == pad]
        if len(found) != len(sizes) or any(f not in (1, s) for f, s in zip(found, sizes, strict=True)):
            raise ValueError(f"runs of {found} image placeholders do not fit images of {sizes} vision tokens")
        queue = iter(sizes)
        return [out for token, length in runs for out in [token] * (next(queue) if token == pad else length)]

    def _interpolation(self, grid: torch.Tensor) -> dict[str, torch.Tensor]:
        """Bilinear corners into the position table with half-pixel centres, [4, patches] each, unless precise."""
        if self._precise_interpolation:
            return {}
        side = self.model.model.visual.num_grid_per_side
        merge = self.config.vision_config.spatial_merge_size
        indices, weights = [], []
        for t, h, w in grid.tolist():
            rows, cols = (
                (((torch.arange(size) + 0.5) * (side / size)) - 0.5).clamp(0, side - 1).double() for size in (h, w)
            )
            for frame_row in [(r, c) for _ in range(t) for r in range(0, h, merge) for c in range(0, w, merge)]:
                for dr in range(merge):
                    for dc in range(merge):
                        row, col = rows[frame_row[0] + dr].item(), cols[frame_row[1] + dc].item()
                        r0, c0 = int(row), int(col)
                        r1, c1 = min(r0 + 1, side - 1), min(c0 + 1, side - 1)
                        indices.append([r0 * side + c0, r0 * side + c1, r1 * side + c0, r1 * side + c1])
                        fr, fc = row - r0, col - c0
                        weights.append([(1 - fr) * (1 - fc), (1 - fr) * fc, fr * (1 - fc), fr * fc])
        return {
            "image_bilinear_indices": torch.tensor(indices).T,
            "image_bilinear_weights": torch.tensor(weights, dtype=self.model.dtype).T,
        }

    # -- forward -------------------------------------------------------------------------------------------------------

    def _forward(self, embeds, positions, cache, evicted, is_vision=None, deepstack=()) -> torch.Tensor:
        """Run the text layers on the next tokens of a sequence; returns the last one's logits [vocabulary]."""
        for layer, probe in enumerate(self._probes):
            probe.evicted = torch.from_numpy(evicted[layer])
        vision = {}
        if is_vision is not None and is_vision.any():
            vision = {"visual_pos_masks": torch.from_numpy(is_vision)[None], "deepstack_visual_embeds": list(deepstack)}
        output = self.model.model.language_model(
            inputs_embeds=embeds[None], position_ids=positions[:, None], past_key_values=cache, use_cache=True, **vision
        )
        return self.model.lm_head(output.last_hidden_state[0, -1])

    @torch.no_grad()
    @attention.single_threaded()
    def prefill(
        self,
        prompt: Prompt,
        state: State | None = None,
        *,
        view: str = "kept",
        cached_len: int | None = None,
        chunk_size: int | None = None,
    ) -> Prefill:
        """Compute a prompt, or what a conversation's next prompt adds to it.

        Args:
            prompt: the whole prompt.
            state: the conversation it continues (left untouched); None for a new one.
            view: what the new tokens see of vision tokens evicted earlier: ``kept`` only what was kept (their full KV
                is gone), ``full`` everything (docs/design.md, rule 3), which then also may be selected from afresh.
            cached_len: tokens taken from ``state``; what lies behind is computed anew and is in full again. Default:
                all that have KV, but at least one token is computed.
            chunk_size: compute this many tokens at a time.

        Raises:
            ValueError: the prompt does not continue the conversation, or an argument is out of range.
        """
        if view not in VIEWS:
            raise ValueError(f"view must be one of {VIEWS}, got {view!r}")
        n, layers = len(prompt.token_ids), len(self._probes)
        start = self._cached_len(prompt, state, cached_len)
        cache, evicted = DynamicCache(config=self.config.text_config), np.zeros((layers, n), dtype=bool)
        if start:
            cache = copy.deepcopy(state.cache)
            cache.crop(start)
            evicted[:, :start] = state.evicted[:, :start] & (view == "kept")
        for probe in self._probes:
            probe.recording, probe.weights = True, []
        step = chunk_size or n
        for left in range(start, n, step):
            right = min(left + step, n)
            seen, until = int(prompt.is_vision[:left].sum()), int(prompt.is_vision[:right].sum())
            logits = self._forward(
                prompt.embeds[left:right],
                prompt.positions[:, left:right],
                cache,
                evicted[:, :right],
                prompt.is_vision[left:right],
                [level[seen:until] for level in prompt.deepstack],
            )
        weights = np.full((layers, n, n), np.nan)
        for layer, probe in enumerate(self._probes):
            row = start
            for block in probe.weights:
                weights[layer, row : row + len(block)] = 0
                weights[layer, row : row + len(block), : block.shape[1]] = block.numpy()
                row += len(block)
            probe.recording, probe.weights = False, []
        new_state = State(list(prompt.token_ids), n, prompt.is_vision.copy(), evicted, cache)
        kinds = self._kinds(prompt, evicted)
        return Prefill(new_state, weights, kinds, start, logits, prompt.position_delta)

    def _cached_len(self, prompt: Prompt, state: State | None, cached_len: int | None) -> int:
        if state is None:
            if cached_len:
                raise ValueError(f"cached_len is {cached_len}, but there is no state to take tokens from")
            return 0
        limit = min(state.num_computed, len(prompt.token_ids) - 1)
        length = limit if cached_len is None else cached_len
        if not 0 <= length <= limit:
            raise ValueError(f"cached_len must lie in [0, {limit}], got {length}")
        if prompt.token_ids[:length] != state.token_ids[:length]:
            raise ValueError(f"the prompt's first {length} tokens are not the conversation's")
        return length

    def _kinds(self, prompt: Prompt, evicted: np.ndarray) -> list[int]:
        """An image of which any layer misses a token is VIEWED as a whole."""
        kinds = [VISION if vision else TEXT for vision in prompt.is_vision]
        merge = self.config.vision_config.spatial_merge_size**2
        positions = iter(prompt.vision_positions.tolist())
        for grid in [] if prompt.image_grid_thw is None else prompt.image_grid_thw:
            span = [next(positions) for _ in range(int(grid.prod()) // merge)]
            if evicted[:, span].any():
                for p in span:
                    kinds[p] = VIEWED
        return kinds

    @torch.no_grad()
    @attention.single_threaded()
    def decode(
        self, prefill: Prefill, max_new_tokens: int, selection: Selection | None = None, stop_at_eos: bool = False
    ) -> Turn:
        """Greedy decoding after a prefill, every step seeing text and what ``selection`` keeps of the vision tokens.

        The first token comes from the prefill itself, hence from what the prefill saw.
        """
        state = copy.deepcopy(prefill.state)
        if selection is not None:
            state.evicted[:, selection.vision_positions] = ~selection.kept
        logits, tokens, gaps, logprobs = prefill.logits, [], [], []
        while True:
            top = logits.topk(2)
            tokens.append(int(top.indices[0]))
            gaps.append(float(top.values[0] - top.values[1]))
            logprobs.append(float(top.values[0] - logits.logsumexp(-1)))
            state.token_ids.append(tokens[-1])
            if len(tokens) == max_new_tokens or (stop_at_eos and tokens[-1] == self.eos_token_id):
                return Turn(tokens, gaps, logprobs, selection, state)
            position = torch.full((3, 1), state.num_computed + prefill.position_delta)
            state.num_computed += 1
            state.is_vision = np.append(state.is_vision, False)
            state.evicted = np.pad(state.evicted, ((0, 0), (0, 1)))
            embeds = self.model.get_input_embeddings()(torch.tensor(tokens[-1:]))
            logits = self._forward(embeds, position, state.cache, state.evicted)

    # -- shortcuts -----------------------------------------------------------------------------------------------------

    def attentions(self, prompt: Prompt) -> np.ndarray:
        """Head-mean attention of a full prefill, [L, n, n]."""
        return self.prefill(prompt).attention

    def select(self, prefill: Prefill, retention: float | str, scope: str = "vision") -> Selection | None:
        """The selection a prefill makes; None where there is no vision in full, or no new text after it."""
        if VISION not in prefill.kinds:
            return None
        first = max(prefill.kinds.index(VISION), prefill.new_start)
        if TEXT not in prefill.kinds[first:]:
            return None
        return select(prefill.attention, prefill.kinds, retention, scope, prefill.new_start)

    def greedy(
        self,
        prompt: Prompt,
        max_new_tokens: int,
        kept: Selection | None = None,
        *,
        retention: float | str | None = None,
        scope: str = "vision",
        stop_at_eos: bool = False,
    ) -> Turn:
        """A first turn: full prefill, then decoding with ``kept``, or with what ``retention`` selects, or in full."""
        if kept is not None and retention is not None:
            raise ValueError("give kept or retention, not both")
        prefill = self.prefill(prompt)
        if retention is not None:
            kept = self.select(prefill, retention, scope)
        return self.decode(prefill, max_new_tokens, kept, stop_at_eos)

    def continue_(
        self,
        state: State,
        prompt: Prompt,
        max_new_tokens: int,
        *,
        view: str,
        retention: float | str | None = None,
        scope: str = "vision",
        cached_len: int | None = None,
        stop_at_eos: bool = False,
    ) -> Turn:
        """A later turn. ``view="kept"``: eager reclaim; ``view="full"``: re-grounding (docs/design.md, rule 3).

        With ``retention`` the new text selects from every image that is in full: under ``full`` all of them, under
        ``kept`` only images that are new in this turn, earlier ones keeping their view.
        """
        prefill = self.prefill(prompt, state, view=view, cached_len=cached_len)
        selection = None if retention is None else self.select(prefill, retention, scope)
        return self.decode(prefill, max_new_tokens, selection, stop_at_eos)
