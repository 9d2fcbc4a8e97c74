"""What `tests.fakes.launches` counts of each operation is what Triton's interpreter is asked to run."""

from collections import Counter
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from tgvkv_kernels.batch_scores.plan import ScorePlan

from tests.fakes.launches import Launches, entries, on_gpu, values
from tests.kernels.kernel_support import generator, normal

LAYERS, SLOTS, HEADS, KV_HEADS, DIM = 2, 40, 4, 2, 16


def arguments(device):
    """Of each operation some calls, their tensors made by ``device``."""
    gen = generator(1)
    random = lambda *shape: device(normal(gen, *shape))  # noqa: E731
    ids = lambda *numbers: device(torch.tensor(numbers, dtype=torch.int32))  # noqa: E731
    flat = random(LAYERS * SLOTS, KV_HEADS, DIM)
    where = "cpu" if device is torch.Tensor.contiguous else "cuda:0"
    plan = ScorePlan([torch.arange(9, 12)], [torch.arange(5)], HEADS, KV_HEADS, DIM, torch.float32, where)
    stash = plan, random(LAYERS, 3, HEADS, DIM), random(LAYERS, 3, HEADS)
    layers, scores = (0, SLOTS, 0.3), random(LAYERS, 5)
    few, many = ids(1, 2, 3), device(torch.arange(300, dtype=torch.int32) % SLOTS)
    q = lambda rows: (random(rows, HEADS, DIM), flat, random(*flat.shape))  # noqa: E731
    out = lambda rows: (random(rows, HEADS, DIM), random(rows, HEADS))  # noqa: E731
    return {
        "stash_rows": [(*(random(4, HEADS, DIM), random(4, HEADS)), ids(3, 0), ids(0, 1), *out(2))],
        "batch_text_weights": [(*stash, flat, ids(4, 9, 2), *layers)],
        "batch_vision_scores": [(*stash, random(LAYERS, 3).abs(), flat, ids(7, 1, 3, 5, 0), *layers)],
        "batch_peak_scores": [(*stash, flat, ids(7, 1, 3, 5, 0), *layers)],
        "select_batch": [(scores, scores[:, :1].abs(), [5], [4], ids(7, 1, 3, 5, 0), SLOTS)],
        "select": [(scores, scores[:, 0].abs(), 3)],
        "layer_budgets": [(scores[0].abs(), 3, 4)],
        "view_units": [(ids(0, 2), ids(0, 1, 2), ids(7, 1, 3), SLOTS)],
        "pack_units": [(flat, random(*flat.shape), few, ids(0, 1, 2))],
        "dense_rows": [(random(2, 9).int(), ids(0, 1), ids(4, 5), ids(1), ids(3), ids(0, 1, 1), ids(*[0] * 9),
                        ids(0, 0, 0))],  # fmt: skip
        "view_attention": [(*q(1), few, ids(0, 3), None, 0.3, *out(1)), (*q(2), many, ids(0, 290, 300), None, 0.3,
                           *out(2)), (*q(2), many, ids(0, 290, 300), ids(0, 1), 0.3, *out(2))],  # fmt: skip
    }  # fmt: skip


@contextmanager
def interpreted_launches():
    from triton.runtime.interpreter import InterpretedFunction

    seen, run = Counter(), InterpretedFunction.run

    def counted(kernel, *args, **options):
        seen[kernel.fn.__name__] += 1
        return run(kernel, *args, **options)

    with mock.patch.object(InterpretedFunction, "run", counted):
        yield seen


def check_counts(name):
    (entry,) = (one for one in entries() if one.__name__ == name)
    host = arguments(torch.Tensor.contiguous)[name]
    for number, args in enumerate(host):
        with interpreted_launches() as real:
            expected = entry(*args, backend="triton")
        with Launches() as seen:
            same = arguments(on_gpu)[name][number]
            before = Counter(seen.launches)
            got = _patched(entry)(*same)
            launched = seen.launches - before
            assert seen.waits == []
        assert real and launched == real, f"{name} {number}: counted {launched}, the interpreter ran {real}"
        for one, other in zip(_tensors((expected, args)), _tensors((got, same)), strict=True):
            torch.testing.assert_close(values(other), one)


def _patched(entry):
    """What stands in for the entry where it is imported from."""
    from importlib import import_module

    return getattr(import_module(entry.__module__), entry.__name__)


def _tensors(tree):
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


@pytest.mark.parametrize("name", sorted(entry.__name__ for entry in entries()))
def test_counted_launches_are_those_that_the_interpreter_runs(interpreted, name):
    interpreted(check_counts, name)
