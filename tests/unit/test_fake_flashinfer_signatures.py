"""The fake FlashInfer has the installed one's signatures, names and infinity. Without FlashInfer this must fail."""

import inspect
import re
from pathlib import Path

import flashinfer
import flashinfer.cascade
import pytest
import torch

from tests.fakes import flashinfer_fake as fake

WRAPPERS = (
    "BatchDecodeWithPagedKVCacheWrapper",
    "BatchPrefillWithPagedKVCacheWrapper",
    "BatchPrefillWithRaggedKVCacheWrapper",
)
METHODS = (
    "__init__",
    "plan",
    "begin_forward",
    "run",
    "run_return_lse",
    "forward",
    "forward_return_lse",
    "end_forward",
    "reset_workspace_buffer",
)


def shape_of(function) -> list[tuple]:
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


def public(cls) -> set[str]:
    return {name for name in vars(cls) if not name.startswith("_")}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_signatures_are_the_installed_ones(wrapper, method):
    real, ours = (inspect.getattr_static(getattr(m, wrapper), method) for m in (flashinfer, fake))
    if method == "run_return_lse":  # a partialmethod: the same binding of run in both
        assert real.keywords == ours.keywords == {"return_lse": True}
        real, ours = real.func, ours.func
    assert shape_of(ours) == shape_of(real)


def test_decode_plan_keywords_are_the_installed_ones():
    """The real plan() takes ``**kwargs``; the keywords are those of ``_plan_impl``."""
    name = "BatchDecodeWithPagedKVCacheWrapper"
    assert shape_of(getattr(fake, name)._plan_impl) == shape_of(getattr(flashinfer, name)._plan_impl)


@pytest.mark.parametrize("function", ["fast_decode_plan", "merge_state"])
def test_function_signatures_are_the_installed_ones(function):
    assert shape_of(getattr(fake, function)) == shape_of(getattr(flashinfer, function))
    assert flashinfer.merge_state is flashinfer.cascade.merge_state


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_no_public_name_of_our_own(wrapper):
    real, ours = getattr(flashinfer, wrapper), getattr(fake, wrapper)
    inherited = set().union(*(public(cls) for cls in ours.__mro__[:-1]))
    assert inherited <= set(dir(real))


def test_attributes_that_sglang_reads_are_the_real_ones():
    """SGLang reaches into these; they must be set by the real source too."""
    source = inspect.getsource(inspect.unwrap(flashinfer.BatchDecodeWithPagedKVCacheWrapper))
    wrapper = fake.BatchDecodeWithPagedKVCacheWrapper(torch.empty(64, dtype=torch.uint8))
    for name in (
        "_paged_kv_indptr_buf",
        "_paged_kv_indices_buf",
        "_paged_kv_last_page_len_buf",
        "_fixed_batch_size",
        "_use_cuda_graph",
        "_float_workspace_buffer",
        "_int_workspace_buffer",
        "_cached_module",
        "_backend",
    ):
        assert f"self.{name}" in source
        assert hasattr(wrapper, name)


def test_lse_of_an_empty_row_is_flashinfers_infinity():
    header = Path(flashinfer.__file__).parent / "data/include/flashinfer/math.cuh"
    (value,) = re.findall(r"constexpr float inf = ([^;]+);", header.read_text())
    assert float(value) == -fake.EMPTY_LSE
