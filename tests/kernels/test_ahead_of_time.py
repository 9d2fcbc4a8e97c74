"""Every kernel compiles for sm_80, sm_90 and sm_100 here, as launched, within bounds of shared memory and registers."""

from dataclasses import replace

import pytest
import torch
from tgvkv_kernels import aot
from tgvkv_kernels.batch_scores.plan import ScorePlan
from tgvkv_kernels.warm_up import ModelShape, warm_up, warm_up_attention

ARCHS = (80, 90, 100)
SHARED_LIMIT = 99 * 1024  # a block of ours twice on an sm_90/sm_100 multiprocessor (228 KB), once on sm_80 (163 KB)
STACK_LIMIT = 16  # ptxas may stop at 128 registers for occupancy and spill two; 0 for the shapes that matter most
KERNELS = {
    "view_decode_kernel",
    "view_prefill_kernel",
    "view_merge_kernel",
    "stash_rows_kernel",
    "column_sums_kernel",
    "column_reduce_kernel",
    "select_batch_kernel",
    "view_units_kernel",
    "move_rows_kernel",
    "row_bounds_kernel",
    "fill_rows_kernel",
}
READERS = {
    "view_decode_kernel",
    "view_prefill_kernel",
    "move_rows_kernel",
    "column_sums_kernel",
    "stash_rows_kernel",
}
QWEN3_VL_8B = ModelShape(q_heads=32, kv_heads=8, head_dim=128, dtype=torch.bfloat16, layers=36)
WIDE = ModelShape(q_heads=16, kv_heads=2, head_dim=256, dtype=torch.bfloat16, layers=36)
NARROW = ModelShape(q_heads=8, kv_heads=8, head_dim=80, dtype=torch.float16, layers=36)
E4M3 = replace(QWEN3_VL_8B, kv_dtype=torch.float8_e4m3fn, scaled=True)
E5M2 = replace(QWEN3_VL_8B, kv_dtype=torch.float8_e5m2)
FLOAT32 = ModelShape(q_heads=8, kv_heads=2, head_dim=128, dtype=torch.float32, layers=36)


def compile_for(arch, shape, attention_only):
    """Facts on each compiled variant, as plain values: (kernel, resources, target line, atomics, 16-byte reads)."""
    with aot.compile_only(arch) as compiled:
        (warm_up_attention if attention_only else warm_up)(shape, "cpu")
    facts = []
    for name, kernels in compiled.items():
        for kernel in kernels:
            ptx = kernel.asm["ptx"]
            target = next(line for line in ptx.splitlines() if line.startswith(".target"))
            atomics = [line for line in ptx.splitlines() if line.strip().startswith(("atom.", "red."))]
            assert kernel.asm["cubin"][:4] == b"\x7fELF"
            wide_reads = ptx.count("cp.async.cg.shared.global") + ptx.count("ld.global.v4.b32")
            facts.append((name, aot.resources(kernel), target, atomics, wide_reads))
    return facts


@pytest.mark.parametrize("arch", ARCHS)
def test_every_kernel_compiles_within_bounds(compiler, arch):
    facts = compiler(compile_for, arch, QWEN3_VL_8B, attention_only=False)
    assert {name for name, *_ in facts} == KERNELS
    for name, _, target, *_ in facts:
        assert f"sm_{arch}" in target, f"{name} was compiled for {target}"
    check_compiled(facts)


def check_compiled(facts):
    for name, resources, _, atomics, wide_reads in facts:
        assert resources.stack == 0 and resources.local == 0, f"{name} spills registers: {resources}"
        assert resources.shared <= SHARED_LIMIT, f"{name} needs too much shared memory: {resources}"
        assert not atomics, f"{name} has atomics, whose order is not fixed: {atomics[:3]}"
        if name in READERS:
            assert wide_reads > 0, f"{name} does not read the storage 16 bytes at a time"


@pytest.mark.parametrize("arch", [90, 100])
@pytest.mark.parametrize("shape", [E4M3, E5M2], ids=["e4m3, with factors", "e5m2"])
def test_kernels_over_quantised_kv(compiler, arch, shape):
    check_compiled(compiler(compile_for, arch, shape, attention_only=False))


def test_of_quantised_kv_an_a100_reads_e5m2_alone(fresh_compiler):
    """Triton takes the first target of a process for all that follow when it converts e5m2, hence a process of its own;
    a server has one target."""
    check_compiled(fresh_compiler(compile_for, 80, E5M2, attention_only=False))
    assert "fp8e4nv not supported" in fresh_compiler(compile_error, 80, E4M3)


def compile_error(arch, shape):
    try:
        compile_for(arch, shape, attention_only=True)
    except Exception as error:
        return f"{error} {error.__cause__}"
    return "it compiles"


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("shape", [WIDE, NARROW], ids=["head_dim 256, group 8", "head_dim 80, group 1"])
def test_attention_kernels_of_other_shapes(compiler, arch, shape):
    for name, resources, _, atomics, _ in compiler(compile_for, arch, shape, attention_only=True):
        assert resources.stack <= STACK_LIMIT and resources.local == 0, f"{name} spills registers: {resources}"
        assert resources.shared <= SHARED_LIMIT, f"{name} needs too much shared memory: {resources}"
        assert not atomics, f"{name} has atomics, whose order is not fixed: {atomics[:3]}"


def test_float32_compiles(compiler):
    """float32 is for comparisons, not for serving: it may spill a little, but must fit any of the three targets."""
    for name, resources, *_ in compiler(compile_for, 90, FLOAT32, attention_only=True):
        assert resources.stack <= 256 and resources.local == 0, f"{name} spills registers: {resources}"
        assert resources.shared <= SHARED_LIMIT, f"{name} needs too much shared memory: {resources}"


def variants_after_warm_up(shape):
    """Compiled variants of each kernel: after the warm-up, and after many sizes and alignments."""
    with aot.compile_only(90) as compiled:
        warm_up(shape, "cpu")
        before = {name: len(kernels) for name, kernels in compiled.items()}
        for start, count in ((1, 1), (2, 2), (3, 9), (4, 16), (1, 257), (2, 2000)):
            launch_at(shape, start, count)
        return before, {name: len(kernels) for name, kernels in compiled.items()}


def launch_at(shape, start, count):
    """Every launch with ``count`` of everything, index tensors starting ``start`` elements into an allocation."""
    from tgvkv_kernels.batch_scores.launch import KINDS, launch_column_sums
    from tgvkv_kernels.dense_rows.launch import launch_dense_rows
    from tgvkv_kernels.pack_units.launch import launch_pack_units
    from tgvkv_kernels.select import launch as select
    from tgvkv_kernels.stash_rows.launch import launch_stash_rows
    from tgvkv_kernels.view_attention.launch import launch_view_attention

    def index(dtype, more=0):
        return torch.zeros(count + start + more, dtype=dtype)[start:]

    i32, i64, weights = index(torch.int32), index(torch.int64), index(torch.float32)
    q = torch.zeros(count, shape.q_heads, shape.head_dim, dtype=shape.dtype)
    lse = torch.zeros(count, shape.q_heads)
    flat = torch.zeros(max(count, 64), shape.kv_heads, shape.head_dim, dtype=shape.storage_dtype)
    k_scales = torch.ones(shape.layers) if shape.scaled else None
    plan = ScorePlan(
        [torch.arange(count)], [torch.arange(count)], shape.q_heads, shape.kv_heads, shape.head_dim, shape.dtype, "cpu"
    )
    for slots in (i32, i64):
        where = (flat, k_scales, slots, 3, 77 + start, 1.0, shape.q_heads)
        for kind in KINDS:
            launch_column_sums(kind, plan, q[None], lse[None], weights[None] if kind == "weighted" else None, *where)
        table = index(torch.int32, 4).expand(count + 4)[:4][None]
        masses = torch.zeros(shape.layers, start)
        for budgets in (None, torch.zeros(1 + start * shape.layers, dtype=torch.int32)[1:].view(shape.layers, start)):
            all_scores = torch.zeros(shape.layers, count)
            select.launch_select_batch(all_scores, masses, budgets, table, count, slots, 77, torch.int32)
    launch_stash_rows(q, lse, i64, i64, q, lse)
    for row_map in (None, i32):
        launch_view_attention(q, flat, flat, i32, index(torch.int32, 1), row_map, 1.0, 1.0, q, lse)
    for ids in (i32, i64):
        launch_pack_units(flat, flat, ids, ids)
        select.launch_view_units(i32, torch.zeros(shape.layers + start, dtype=torch.int32)[start - 1 :], ids, 77)
    rows = torch.zeros(2, 16, dtype=torch.int32)
    launch_dense_rows(rows, i64, i64, i32, i32, index(torch.int32, 1), i32, index(torch.int32, 1))


@pytest.mark.parametrize("shape", [QWEN3_VL_8B, NARROW, E4M3], ids=["8B", "head_dim 80, group 1", "8B, e4m3"])
def test_nothing_is_compiled_after_the_warm_up(compiler, shape):
    """A variant for an alignment or a batch size would be compiled in the middle of serving."""
    before, after = compiler(variants_after_warm_up, shape)
    assert before.keys() == KERNELS and after == before


def launches_of_a_prefill(shape, requests, kind):
    """Launches that score and select ``requests`` requests over all layers of a model."""
    from tgvkv_kernels.batch_scores.launch import launch_column_sums
    from tgvkv_kernels.select.launch import launch_select_batch
    from tgvkv_kernels.stash_rows.launch import launch_stash_rows
    from triton.runtime.jit import JITFunction

    tokens, vision, launches = 5 * requests, 7 * requests, []
    with aot.compile_only(90):
        compiling = JITFunction.run
        JITFunction.run = lambda self, *args, **kwargs: launches.append(self) or compiling(self, *args, **kwargs)
        heads = (shape.q_heads, shape.kv_heads, shape.head_dim)
        plan = ScorePlan([torch.arange(5)] * requests, [torch.arange(7)] * requests, *heads, shape.dtype, "cpu")
        q = torch.zeros(shape.layers, tokens, shape.q_heads, shape.head_dim, dtype=shape.dtype)
        lse = torch.zeros(shape.layers, tokens, shape.q_heads)
        rows = torch.arange(tokens)
        for layer in range(shape.layers):
            launch_stash_rows(q[0], lse[0], rows, rows, q[layer], lse[layer])
        k_flat = torch.zeros(1, shape.kv_heads, shape.head_dim, dtype=shape.dtype)
        where = (0, 100, 1.0, shape.q_heads)
        weights = None
        if kind == "weighted":
            weights, _ = launch_column_sums("text", plan, q, lse, None, k_flat, None, rows, *where)
        slots = torch.arange(vision)
        scores, masses = launch_column_sums(kind, plan, q, lse, weights, k_flat, None, slots, *where)
        table = torch.zeros(requests, 4, dtype=torch.int32)
        launch_select_batch(scores, masses, None, table, tokens, slots, 100, torch.int32)
        JITFunction.run = compiling
    return len(launches)


@pytest.mark.parametrize(("kind", "after_the_stash"), [("weighted", 5), ("peak", 3), ("peak4", 3)])
@pytest.mark.parametrize("requests", [1, 6])
def test_launches_of_a_scoring_prefill_do_not_grow_with_requests(compiler, requests, kind, after_the_stash):
    assert compiler(launches_of_a_prefill, QWEN3_VL_8B, requests, kind) == QWEN3_VL_8B.layers + after_the_stash


def blocks_by_kernel(arch):
    with aot.compile_only(arch) as compiled:
        warm_up_attention(QWEN3_VL_8B, "cpu")
        fitting = aot.blocks_per_multiprocessor
        return {name: min(fitting(kernel, arch) for kernel in kernels) for name, kernels in compiled.items()}


@pytest.mark.parametrize("arch", ARCHS)
def test_enough_blocks_run_at_once_to_hide_memory(compiler, arch):
    """Warps that a multiprocessor holds at once. Both kernels wait on gathered keys: one block could not hide that."""
    blocks = compiler(blocks_by_kernel, arch)
    assert blocks["view_decode_kernel"] >= (2 if arch == 80 else 3)  # 4 warps each
    assert blocks["column_sums_kernel"] >= (1 if arch != 90 else 2)  # 8 warps each


def compile_in_interpreter():
    with aot.compile_only(90):
        pass


def test_interpreter_process_refuses_to_compile(interpreted):
    with pytest.raises(aot.KernelBackendError, match="TRITON_INTERPRET=1"):
        interpreted(compile_in_interpreter)
