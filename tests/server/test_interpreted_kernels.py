"""Our Triton kernels in a live server, in Triton's interpreter: selections and answers are those of the torch path."""

from __future__ import annotations

from typing import Iterator

import numpy as np
import pytest

from tests.fakes import interpreted_env, interpreted_kernels
from tests.server.conftest import EAGER
from tgvkv_sglang.testing.images import make_image
from tgvkv_sglang.testing.prompts import about_images, chat
from tgvkv_sglang.testing.server import Server, launch

KERNELS = {
    "stash_rows_kernel", "column_sums_kernel", "column_reduce_kernel", "select_batch_kernel", "move_rows_kernel",
    "row_bounds_kernel", "fill_rows_kernel", "view_units_kernel", "view_decode_kernel", "view_prefill_kernel",
}  # fmt: skip
"""All that a server launches; `view_merge_kernel` needs more than 256 units in a layer."""


@pytest.fixture
def interpreted(model_dir, tmp_path) -> Iterator[Server]:
    with launch(model_dir, tmp_path, *EAGER, tokens=500, env=interpreted_env()) as server:
        yield server


def test_kernels_of_a_served_conversation(interpreted, eager):
    """A turn that selects and is reclaimed, and one that goes on through the packed view and a picture of its own."""
    first, more = chat(about_images("What is it?")), about_images("And?")
    second = f"{first}Well.<|im_end|>\n<|im_start|>user\n{more}<|im_end|>\n<|im_start|>assistant\n"
    pictures = [make_image(900, 128, 96), make_image(901, 96, 96)]
    for turn, (text, images) in enumerate(((first, pictures[:1]), (second, pictures))):
        asked = {"rid": f"interpreted-{turn}", "trace": True, "retention": 0.25, "max_new_tokens": 4}
        ours, torchs = (server.generate(text, images, **asked) for server in (interpreted, eager))
        assert ours.ids == torchs.ids and ours.cached == torchs.cached
        (kept, _), (wanted, _) = (server.trace(asked["rid"]) for server in (interpreted, eager))
        assert np.array_equal(kept["kept"], wanted["kept"]) and 0 < kept["kept"].sum() < kept["kept"].size
    assert ours.cached > 0
    assert interpreted_kernels(interpreted.log_text()) == KERNELS
