"""The fake FlashInfer: values of brute force, CUDA-graph buffers, and the errors that a GPU would not show."""

from functools import partial

import numpy as np
import pytest
import torch

from tests.fakes import flashinfer_fake as fake
from tests.fakes.brute_force import DIM, HEADS, KV_HEADS, POISON, Batch, brute
from tests.fakes.graphs import RecordedGraph, opaque_method


def expect(result, wanted):
    """Float32 results of float64 arithmetic: half a unit in the last place, nothing more."""
    for got, want in zip(result, map(np.concatenate, zip(*wanted, strict=True)), strict=True):
        assert got.dtype == torch.float32
        np.testing.assert_allclose(got.numpy(), want, rtol=1e-6, atol=1e-6)


def workspace():
    return torch.empty(64, dtype=torch.uint8)


def decode_wrapper(batch, graph=False, spare=5, layout="NHD", **options):
    if not graph:
        return fake.BatchDecodeWithPagedKVCacheWrapper(workspace(), layout, **options)
    size = len(batch.last)
    buffers = {
        "paged_kv_indptr_buffer": torch.zeros(size + 1, dtype=torch.int32),
        "paged_kv_indices_buffer": torch.zeros(len(batch.indices) + spare, dtype=torch.int32),
        "paged_kv_last_page_len_buffer": torch.ones(size, dtype=torch.int32),
    }
    return fake.BatchDecodeWithPagedKVCacheWrapper(workspace(), layout, use_cuda_graph=True, **buffers, **options)


TYPES = {"q_data_type": torch.float32, "data_type": torch.float32}


def plan_decode(wrapper, batch, **options):
    plan = wrapper.begin_forward
    plan(*batch.pages, HEADS, KV_HEADS, DIM, batch.page_size, **TYPES, **options)


LENGTHS = [5, 1, 0, 17, 8]


@pytest.mark.parametrize("tensor_cores", [False, True])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("page_size", [1, 4])
def test_decode_is_brute_force(page_size, graph, layout, tensor_cores):
    batch = Batch(LENGTHS, page_size, layout=layout)
    wrapper = decode_wrapper(batch, graph, layout=layout, use_tensor_cores=tensor_cores)
    plan_decode(wrapper, batch)
    q, _ = batch.queries([1] * len(LENGTHS))
    wanted = [brute(q[i : i + 1].numpy(), batch.keys[i], batch.values[i], 0.3) for i in range(len(LENGTHS))]
    expect(wrapper.forward_return_lse(q, batch.cache, sm_scale=0.3), wanted)
    assert torch.equal(wrapper.forward(q, batch.cache, sm_scale=0.3), wrapper.run(q, batch.cache))
    scaled = wrapper.forward_return_lse(q, batch.cache, sm_scale=0.1, q_scale=1.5, k_scale=2.0, v_scale=2.0)
    expect(scaled, [(2 * out, lse) for out, lse in wanted])


def test_decode_scale_and_soft_cap_and_window():
    batch = Batch(LENGTHS, 1, seed=3)
    q, _ = batch.queries([1] * len(LENGTHS))
    wrapper = decode_wrapper(batch)
    plan_decode(wrapper, batch, logits_soft_cap=0.7, window_left=3)
    default = 1 / np.sqrt(DIM)
    wanted = [
        brute(q[i : i + 1].numpy(), batch.keys[i], batch.values[i], default, cap=0.7, window=3)
        for i in range(len(LENGTHS))
    ]
    expect(wrapper.run_return_lse(q, batch.cache), wanted)
    expect(wrapper.forward_return_lse(q, batch.cache, logits_soft_cap=0.7, window_left=3), wanted)


def test_a_3d_cache_and_a_single_tensor_are_the_same_cache():
    batch = Batch(LENGTHS, 1)
    q, _ = batch.queries([1] * len(LENGTHS))
    wrapper = decode_wrapper(batch)
    plan_decode(wrapper, batch)
    wanted = wrapper.run(q, batch.cache)
    assert torch.equal(wrapper.run(q, tuple(x.squeeze(1) for x in batch.cache)), wanted)
    assert torch.equal(wrapper.run(q, torch.stack(batch.cache, dim=1)), wanted)


def prefill_wrapper(batch, graph=False):
    if not graph:
        return fake.BatchPrefillWithPagedKVCacheWrapper(workspace(), "NHD", backend="fa2")
    size = len(batch.last)
    return fake.BatchPrefillWithPagedKVCacheWrapper(
        workspace(),
        "NHD",
        use_cuda_graph=True,
        qo_indptr_buf=torch.zeros(size + 1, dtype=torch.int32),
        paged_kv_indptr_buf=torch.zeros(size + 1, dtype=torch.int32),
        paged_kv_indices_buf=torch.zeros(len(batch.indices) + 5, dtype=torch.int32),
        paged_kv_last_page_len_buf=torch.ones(size, dtype=torch.int32),
    )


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("page_size", [1, 4])
@pytest.mark.parametrize("causal", [False, True])
def test_paged_prefill_is_brute_force(causal, page_size, graph):
    batch = Batch(LENGTHS, page_size, seed=1)
    counts = [3, 1, 0, 6, 8]
    q, qo_indptr = batch.queries(counts)
    wrapper = prefill_wrapper(batch, graph)
    wrapper.begin_forward(
        qo_indptr, *batch.pages, HEADS, KV_HEADS, DIM, page_size, q_data_type=torch.float32, non_blocking=True
    )
    wanted = [
        brute(q[a:b].numpy(), batch.keys[i], batch.values[i], 0.4, causal)
        for i, (a, b) in enumerate(zip(qo_indptr[:-1], qo_indptr[1:], strict=True))
    ]
    result = wrapper.forward_return_lse(q, batch.cache, causal=causal, sm_scale=0.4)
    expect(result, wanted)
    assert torch.equal(wrapper.forward(q, batch.cache, causal=causal, sm_scale=0.4), result[0])


def test_paged_prefill_rows_without_a_key():
    """No key at all, and causal queries that come before the first key: output 0, the kernel's -5e4."""
    batch = Batch([0, 2], 1)
    q, qo_indptr = batch.queries([2, 3])
    wrapper = prefill_wrapper(batch)
    wrapper.plan(qo_indptr, *batch.pages, HEADS, KV_HEADS, DIM, 1, causal=True, q_data_type=torch.float32)
    out, lse = wrapper.run_return_lse(q, batch.cache)
    assert (out[:3] == 0).all() and (lse[:3] == -5e4).all()
    assert (out[3:] != 0).any() and (lse[3:] > -100).all()


def test_paged_prefill_window_cap_and_custom_mask():
    batch = Batch([7, 4], 2, seed=5)
    q, qo_indptr = batch.queries([3, 4])
    types = {"q_data_type": torch.float32}
    wrapper = prefill_wrapper(batch)
    options = {"causal": True, "window_left": 2, "logits_soft_cap": 1.1}
    wrapper.plan(qo_indptr, *batch.pages, HEADS, KV_HEADS, DIM, 2, **types, **options)
    wanted = [
        brute(q[a:b].numpy(), batch.keys[i], batch.values[i], DIM**-0.5, True, 1.1, 2)
        for i, (a, b) in enumerate([(0, 3), (3, 7)])
    ]
    expect(wrapper.run_return_lse(q, batch.cache), wanted)
    masks = [batch.rng.random((3, 7)) < 0.5, batch.rng.random((4, 4)) < 0.5]
    flat = torch.tensor(np.concatenate([mask.ravel() for mask in masks]))
    wrapper.plan(qo_indptr, *batch.pages, HEADS, KV_HEADS, DIM, 2, custom_mask=flat, causal=True, **types)
    wanted = [
        brute(q[a:b].numpy(), batch.keys[i], batch.values[i], DIM**-0.5, mask=masks[i])
        for i, (a, b) in enumerate([(0, 3), (3, 7)])
    ]
    expect(wrapper.run_return_lse(q, batch.cache), wanted)


@pytest.mark.parametrize("causal", [False, True])
def test_ragged_prefill_and_merge_are_brute_force(causal):
    """A new chunk over itself, merged with its cached prefix, is attention over both."""
    batch = Batch([4, 0, 3], 1, seed=2)
    q, qo_indptr = batch.queries([2, 3, 1])
    k, v = (torch.tensor(batch.rng.normal(size=(6, KV_HEADS, DIM)).astype(np.float32)) for _ in range(2))
    ragged = fake.BatchPrefillWithRaggedKVCacheWrapper(workspace(), "NHD", backend="auto")
    ragged.begin_forward(qo_indptr, qo_indptr, HEADS, KV_HEADS, DIM, q_data_type=torch.float32)
    cuts = list(zip(qo_indptr[:-1].tolist(), qo_indptr[1:].tolist(), strict=True))
    new = ragged.forward_return_lse(q, k, v, causal=causal, sm_scale=0.5)
    expect(new, [brute(q[a:b].numpy(), k[a:b].numpy(), v[a:b].numpy(), 0.5, causal) for a, b in cuts])
    assert torch.equal(ragged.forward(q, k, v, causal=causal, sm_scale=0.5), new[0])

    paged = prefill_wrapper(batch)
    paged.plan(qo_indptr, *batch.pages, HEADS, KV_HEADS, DIM, 1, sm_scale=0.5, q_data_type=torch.float32)
    both = fake.merge_state(*new, *paged.run_return_lse(q, batch.cache))
    wanted = [
        brute(
            q[a:b].numpy(),
            np.concatenate([batch.keys[i], k[a:b].numpy()]),
            np.concatenate([batch.values[i], v[a:b].numpy()]),
            0.5,
            causal,
        )
        for i, (a, b) in enumerate(cuts)
    ]
    for got, want in zip(both, map(np.concatenate, zip(*wanted, strict=True)), strict=True):
        np.testing.assert_allclose(got.numpy(), want, rtol=1e-5, atol=1e-5)  # merged in float32, as on the GPU


def test_merging_two_empty_states_stays_empty_and_finite():
    zero, low = torch.zeros(1, HEADS, DIM), torch.full((1, HEADS), fake.EMPTY_LSE)
    out, lse = fake.merge_state(zero, low, zero, low)
    assert (out == 0).all() and (lse == fake.EMPTY_LSE + 1).all()


def test_run_writes_into_given_tensors():
    batch = Batch([3, 2], 1)
    q, _ = batch.queries([1, 1])
    wrapper = decode_wrapper(batch)
    plan_decode(wrapper, batch)
    out, lse = torch.full_like(q, POISON), torch.full((2, HEADS), POISON)
    given = wrapper.run(q, batch.cache, out=out, lse=lse, return_lse=True)
    assert given[0] is out and given[1] is lse
    wanted = wrapper.run_return_lse(q, batch.cache)
    assert torch.equal(out, wanted[0]) and torch.equal(lse, wanted[1])
    with pytest.raises(ValueError, match="out is"):
        wrapper.run(q, batch.cache, out=out.half())


# ---- CUDA-graph mode


def test_graph_mode_plan_copies_into_the_fixed_buffers():
    batch = Batch([3, 2], 1)
    wrapper = decode_wrapper(batch, graph=True)
    buffers = (wrapper._paged_kv_indptr_buf, wrapper._paged_kv_indices_buf, wrapper._paged_kv_last_page_len_buf)
    addresses = [b.data_ptr() for b in buffers]
    plan_decode(wrapper, batch)
    assert wrapper.is_cuda_graph_enabled and wrapper._fixed_batch_size == 2
    now = (wrapper._paged_kv_indptr_buf, wrapper._paged_kv_indices_buf, wrapper._paged_kv_last_page_len_buf)
    assert [b.data_ptr() for b in now] == addresses
    assert torch.equal(now[0], batch.indptr) and torch.equal(now[1][: len(batch.indices)], batch.indices)


@pytest.mark.parametrize(
    "sizes, message",
    [((2, 9, 2), "batch_size \\+ 1"), ((None, 9, 2), "indptr"), ((3, None, 2), "indices"), ((3, 9, None), "last_page")],
)
def test_graph_mode_needs_its_buffers(sizes, message):
    indptr, indices, last = (None if n is None else torch.ones(n, dtype=torch.int32) for n in sizes)
    with pytest.raises(ValueError, match=message):
        fake.BatchDecodeWithPagedKVCacheWrapper(workspace(), "NHD", True, False, indptr, indices, last)


def test_graph_mode_sizes_are_fixed():
    batch, other = Batch([3, 2], 1), Batch([3, 2, 1], 1)
    with pytest.raises(ValueError, match="batch size should be fixed"):
        plan_decode(decode_wrapper(batch, graph=True), other)
    with pytest.raises(ValueError, match="size of indices"):
        plan_decode(decode_wrapper(batch, graph=True, spare=-1), batch)
    prefill = prefill_wrapper(batch, graph=True)
    shape = (HEADS, KV_HEADS, DIM, 1)
    prefill.plan(batch.queries([2, 2])[1], *batch.pages, *shape, q_data_type=torch.float32)
    with pytest.raises(ValueError, match="cannot exceed the number of rows"):
        prefill.plan(batch.queries([3, 2])[1], *batch.pages, *shape, q_data_type=torch.float32)


def captured(batch):
    """A decode wrapper as SGLang leaves it after capture: planned once, ``fast_decode_plan`` installed."""
    wrapper = decode_wrapper(batch, graph=True)
    plan_decode(wrapper, batch)
    wrapper.begin_forward = partial(fake.fast_decode_plan, wrapper)
    return wrapper


def fast_plan(wrapper, batch, indptr=None, indices=None, host=None):
    wrapper.begin_forward(
        wrapper._paged_kv_indptr_buf if indptr is None else indptr,
        wrapper._paged_kv_indices_buf if indices is None else indices,
        wrapper._paged_kv_last_page_len_buf,
        HEADS,
        KV_HEADS,
        DIM,
        batch.page_size,
        global_override_indptr_cpu=batch.indptr if host is None else host,
        **TYPES,
    )


@pytest.mark.parametrize("call", ["forward", "forward_return_lse", "run"])
def test_a_decode_is_one_operation_of_a_recorded_graph(call, monkeypatch):
    """It reads its buffers on the host, which a capture refuses unless ``run`` is recorded as a whole."""
    decode = fake.BatchDecodeWithPagedKVCacheWrapper
    batch = Batch([3, 2], 1)
    q, _ = batch.queries([1, 1])
    wrapper, graph = captured(batch), RecordedGraph()
    with pytest.raises(RuntimeError, match="a CUDA graph cannot be captured"):
        graph.record(lambda: getattr(wrapper, call)(q, batch.cache))
    monkeypatch.setattr(decode, "run", opaque_method(decode.run))
    graph.record(lambda: getattr(wrapper, call)(q, batch.cache))


def fill(wrapper, batch):
    wrapper._paged_kv_indptr_buf.copy_(batch.indptr)
    wrapper._paged_kv_indices_buf[: len(batch.indices)].copy_(batch.indices)


def test_replay_reads_the_buffers_as_they_are_at_run_time():
    before, after = Batch([3, 2], 1, seed=1), Batch([2, 3], 1, seed=2)
    wrapper = captured(before)
    q, _ = after.queries([1, 1])
    fill(wrapper, after)
    fast_plan(wrapper, after)
    wanted = [brute(q[i : i + 1].numpy(), after.keys[i], after.values[i], DIM**-0.5) for i in range(2)]
    expect(wrapper.forward_return_lse(q, after.cache), wanted)
    # New page indices without a new plan are a legal replay: same lengths, other pages.
    wrapper._paged_kv_indices_buf[:2] = after.indices[:2].flip(0)
    expect(wrapper.run_return_lse(q, after.cache), wanted)
    wrapper._paged_kv_indices_buf[0] = wrapper._paged_kv_indices_buf[2]
    assert not torch.allclose(wrapper.run(q, after.cache)[0], torch.tensor(wanted[0][0][0], dtype=torch.float32))


def test_fast_decode_plan_writes_nothing():
    batch = Batch([3, 2], 1)
    wrapper = captured(batch)
    buffers = (wrapper._paged_kv_indptr_buf, wrapper._paged_kv_indices_buf, wrapper._paged_kv_last_page_len_buf)
    kept = [b.clone() for b in buffers]
    fast_plan(wrapper, batch, host=torch.tensor([0, 1, 2], dtype=torch.int32))
    assert all(torch.equal(a, b) for a, b in zip(buffers, kept, strict=True))


@pytest.mark.parametrize("graph", [False, True])
def test_tensor_core_decode_has_rows_of_its_own(graph):
    """It runs the prefill kernel, which reads where each request's queries lie; the wrapper made that once."""
    batch = Batch([3, 2], 1)
    q, _ = batch.queries([1, 1])
    plain, wrapper = (decode_wrapper(batch, graph, use_tensor_cores=on) for on in (False, True))
    for one in (plain, wrapper):
        plan_decode(one, batch)
    assert torch.equal(wrapper.run(q, batch.cache), plain.run(q, batch.cache))
    assert (wrapper._backend, plain._backend) == ("fa2", "auto") and wrapper.use_tensor_cores
    wrapper.plan(*batch.pages, HEADS, KV_HEADS, DIM, 1, **TYPES, fixed_split_size=4)
    with pytest.raises(ValueError, match="only supported by tensor core decode"):
        plain.plan(*batch.pages, HEADS, KV_HEADS, DIM, 1, **TYPES, fixed_split_size=4)
    fake.fast_decode_plan(wrapper, wrapper._paged_kv_indptr_buf, wrapper._paged_kv_indices_buf,
                          wrapper._paged_kv_last_page_len_buf, HEADS, KV_HEADS, DIM, 1, **TYPES)  # fmt: skip
    assert torch.equal(wrapper.run(q, batch.cache), plain.run(q, batch.cache))
    wrapper._qo_indptr_buf[1] = 2
    with pytest.raises(fake.StalePlanError, match="qo_indptr"):
        wrapper.run(q, batch.cache)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_in_and_out(dtype):
    """Values are rounded once, the log-sum-exp stays float32."""
    batch = Batch([3, 2], 1)
    cache = tuple(x.to(dtype) for x in batch.cache)
    q, _ = batch.queries([1, 1])
    wrapper = decode_wrapper(batch, use_tensor_cores=True)
    wrapper.plan(*batch.pages, HEADS, KV_HEADS, DIM, 1, q_data_type=dtype, data_type=dtype)
    out, lse = wrapper.run_return_lse(q.to(dtype), cache)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    exact = decode_wrapper(batch)
    plan_decode(exact, batch)
    wanted = exact.run_return_lse(q.to(dtype).float(), tuple(x.float() for x in cache))
    assert torch.equal(out, wanted[0].to(dtype)) and torch.equal(lse, wanted[1])
    with pytest.raises(ValueError, match="dtype of q torch.float32"):
        wrapper.run(q, cache)


@pytest.mark.parametrize("name", ["indptr", "indices"])
def test_fast_decode_plan_refuses_other_tensors_than_its_buffers(name):
    batch = Batch([3, 2], 1)
    wrapper = captured(batch)
    with pytest.raises(fake.StalePlanError, match=f"ignores {name} "):
        fast_plan(wrapper, batch, **{name: getattr(batch, name)})


def test_fast_decode_plan_needs_an_earlier_plan():
    batch = Batch([3], 1)
    wrapper = decode_wrapper(batch, graph=True)
    with pytest.raises(RuntimeError, match="earlier plan"):
        fake.fast_decode_plan(
            wrapper,
            wrapper._paged_kv_indptr_buf,
            wrapper._paged_kv_indices_buf,
            wrapper._paged_kv_last_page_len_buf,
            HEADS,
            KV_HEADS,
            DIM,
            1,
            **TYPES,
        )


def test_a_device_indptr_that_the_host_did_not_plan_raises():
    batch = Batch([3, 2], 1)
    q, _ = batch.queries([1, 1])
    wrapper = captured(batch)
    wrapper.run(q, batch.cache)
    fast_plan(wrapper, batch, host=torch.tensor([0, 3, 6], dtype=torch.int32))
    with pytest.raises(fake.StalePlanError, match=r"\[0, 3, 5\].*\[0, 3, 6\]"):
        wrapper.run(q, batch.cache)
    fast_plan(wrapper, batch)
    wrapper.run(q, batch.cache)
    wrapper._paged_kv_indptr_buf[1] = 2
    with pytest.raises(fake.StalePlanError, match="plan\\(\\) again"):
        wrapper.run(q, batch.cache)


def test_an_indptr_overwritten_after_an_eager_plan_raises():
    """SGLang's wrappers share one indptr buffer: planning a second one spoils the first."""
    batch = Batch([3, 2], 1)
    q, qo_indptr = batch.queries([1, 1])
    decode, prefill = decode_wrapper(batch), prefill_wrapper(batch)
    plan_decode(decode, batch)
    prefill.plan(qo_indptr, *batch.pages, HEADS, KV_HEADS, DIM, 1, q_data_type=torch.float32)
    batch.indptr[1:] -= 1
    for wrapper in (decode, prefill):
        with pytest.raises(fake.StalePlanError):
            wrapper.run(q, batch.cache)


# ---- refusals


def test_pages_outside_the_cache_raise():
    batch = Batch([3, 2], 1)
    q, _ = batch.queries([1, 1])
    wrapper = decode_wrapper(batch)
    plan_decode(wrapper, batch)
    for bad in (len(batch.k), -1):
        batch.indices[1] = bad
        with pytest.raises(IndexError, match=f"page index {bad} "):
            wrapper.run(q, batch.cache)
    batch.indices = batch.indices[:4]
    plan_decode(wrapper, batch)
    with pytest.raises(IndexError, match="ends at 5, beyond 4"):
        wrapper.run(q, batch.cache)


@pytest.mark.parametrize("name", ["indptr", "indices", "last"])
def test_int64_page_tables_raise(name):
    batch = Batch([3, 2], 1)
    q, _ = batch.queries([1, 1])
    setattr(batch, name, getattr(batch, name).long())
    wrapper = decode_wrapper(batch)
    with pytest.raises(TypeError, match="must be int32, got torch.int64"):
        plan_decode(wrapper, batch)
        wrapper.run(q, batch.cache)


def test_what_the_compiled_kernel_would_ignore_raises():
    batch = Batch([3, 2], 1)
    q, _ = batch.queries([1, 1])
    wrapper = decode_wrapper(batch)
    with pytest.raises(RuntimeError, match="plan\\(\\) must be called"):
        wrapper.forward(q, batch.cache)
    plan_decode(wrapper, batch)
    with pytest.raises(ValueError, match="logits_soft_cap must be given to plan"):
        wrapper.forward(q, batch.cache, logits_soft_cap=5.0)
    with pytest.raises(ValueError, match="window_left must be given to plan"):
        wrapper.forward(q, batch.cache, window_left=4)
    with pytest.raises(ValueError, match="dtype of q torch.float64"):
        wrapper.forward(q.double(), batch.cache)
    with pytest.raises(ValueError, match="not the batch size"):
        wrapper.forward(q[:1], batch.cache)
    with pytest.raises(ValueError, match="12 query and 2 kv heads, planned for 6 and 2"):
        wrapper.forward(q.repeat(1, 2, 1), batch.cache)
    with pytest.raises(NotImplementedError, match="pos_encoding_mode"):
        wrapper.forward(q, batch.cache, pos_encoding_mode="ALIBI")
