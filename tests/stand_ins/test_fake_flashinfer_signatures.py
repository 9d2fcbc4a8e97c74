"""The fake FlashInfer takes the installed one's arguments, and has its names and infinity."""

import inspect
import re
from pathlib import Path

import flashinfer
import flashinfer.cascade
import pytest
import torch

from tests.fakes import flashinfer_fake as fake
from tests.fakes.binding import bound

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
    """Each method is bound to its own counterpart; decode's ``plan(..., **kwargs)`` to the keywords it hands on."""
    real, ours = (inspect.getattr_static(getattr(m, wrapper), method) for m in (flashinfer, fake))
    if method == "run_return_lse":  # a partialmethod: the same binding of run in both
        assert real.keywords == ours.keywords == {"return_lse": True}
        real, ours = real.func, ours.func
    if real is flashinfer.BatchDecodeWithPagedKVCacheWrapper.plan:
        real = flashinfer.BatchDecodeWithPagedKVCacheWrapper._plan_impl
    assert shape_of(ours) == shape_of(real)


@pytest.mark.parametrize("function", ["fast_decode_plan", "merge_state"])
def test_function_signatures_are_the_installed_ones(function):
    assert shape_of(getattr(fake, function)) == shape_of(getattr(flashinfer, function))
    assert flashinfer.merge_state is flashinfer.cascade.merge_state


def real_function(self, x, *args, scale=1.0, mask=None, causal=True, fast=False):
    """Stands for a function of FlashInfer."""


@bound(real_function, "fast")
def scaled(self, a):
    return self, a.x * a.scale


def test_arguments_arrive_by_name_with_the_real_defaults():
    assert scaled("me", 3) == ("me", 3.0)
    assert scaled("me", x=3, scale=2.0, fast=True) == ("me", 6.0)
    with pytest.raises(TypeError, match="missing a required argument: 'x'"):
        scaled("me")
    with pytest.raises(TypeError, match="unexpected keyword argument 'wrong'"):
        scaled("me", 3, wrong=1)


@pytest.mark.parametrize(
    "args, options, named",
    [((), {"mask": torch.ones(2)}, "mask"), ((7,), {}, "args"), ((), {"causal": False}, "causal")],
)
def test_an_argument_that_would_be_passed_over_is_refused(args, options, named):
    with pytest.raises(NotImplementedError, match=f"has no {named} "):
        scaled("me", 3, *args, **options)
    scaled("me", 3, mask=None)


def test_only_arguments_of_the_real_function_can_be_ignored():
    with pytest.raises(TypeError, match="real_function takes no faster"):
        bound(real_function, "faster")


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
        "_use_tensor_cores",
    ):
        assert f"self.{name}" in source
        assert hasattr(wrapper, name)


def test_tensor_core_decode_is_planned_as_the_real_one_plans_it():
    """Its own rows, made once in graph mode and with each plan else; the names are those of the real source."""
    real = flashinfer.BatchDecodeWithPagedKVCacheWrapper
    for function in (real.__init__, real._plan_impl, flashinfer.fast_decode_plan):
        assert "self._qo_indptr_buf = " in inspect.getsource(inspect.unwrap(function))
    run = inspect.getsource(inspect.unwrap(real.run))
    assert "if self.use_tensor_cores:" in run and "self._qo_indptr_buf," in run


def test_lse_of_an_empty_row_is_flashinfers_infinity():
    header = Path(flashinfer.__file__).parent / "data/include/flashinfer/math.cuh"
    (value,) = re.findall(r"constexpr float inf = ([^;]+);", header.read_text())
    assert float(value) == -fake.EMPTY_LSE
