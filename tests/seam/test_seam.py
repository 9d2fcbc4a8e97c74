"""Hooks, refusals and the text-only path, in one process that imports SGLang but starts no server."""

from __future__ import annotations

import contextlib
import types

import numpy as np
import pytest
import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.plugins import load_plugins
from sglang.srt.server_args import ServerArgs, prepare_server_args
from transformers import Qwen3Config

from tgvkv_sglang.cli.serve import CPU_FLAGS
from tgvkv_sglang.config import TgvConfig
from tgvkv_sglang.errors import ConfigError, IntegrityError, UnsupportedServerError
from tgvkv_sglang.sglang_seam import active
from tgvkv_sglang.sglang_seam.refusals import refuse
from tgvkv_sglang.sglang_seam.server_args import config_of


@pytest.fixture(scope="module", autouse=True)
def plugins():
    load_plugins()
    active.require("this test")


def parse(model_dir, *flags: str) -> ServerArgs:
    return prepare_server_args(["--model-path", str(model_dir), *CPU_FLAGS, "--attention-backend", "tgvkv", *flags])


def test_flags_reach_the_configuration(model_dir):
    args = parse(model_dir, "--tgvkv-retention", "0.25", "--tgvkv-scope", "total", "--tgvkv-reclaim", "eager")
    config = config_of(args)
    assert (config.retention, config.scope, config.reclaim) == (0.25, "total", "eager")
    assert args.radix_cache_backend == "tgvkv"


def test_engine_keywords_reach_the_configuration(model_dir):
    args = ServerArgs(
        model_path=str(model_dir), device="cpu", attention_backend="tgvkv", disable_cuda_graph=True,
        disable_fast_image_processor=True, tgvkv_retention=0.5,
    )  # fmt: skip
    assert config_of(args).retention == 0.5


def test_defaults_are_pressure_and_a_tenth(model_dir):
    config = config_of(parse(model_dir))
    assert (config.retention, config.scope, config.reclaim, config.policy) == (0.1, "vision", "pressure", "tgv")


def test_stock_servers_are_left_alone(model_dir):
    args = prepare_server_args(["--model-path", str(model_dir), *CPU_FLAGS, "--attention-backend", "torch_native"])
    assert config_of(args) is None and args.radix_cache_backend is None


@pytest.mark.parametrize("value", ("0", "1.5", "-0.1", "nan"))
def test_bad_retention_is_refused(model_dir, value):
    with pytest.raises(ConfigError, match="--tgvkv-retention.*0 < retention <= 1"):
        parse(model_dir, "--tgvkv-retention", value)


@pytest.mark.parametrize(
    "flags, word",
    [
        (("--page-size", "16"), "--page-size"),
        (("--enable-mixed-chunk",), "--enable-mixed-chunk"),
        (("--enable-hierarchical-cache",), "HiCache"),
        (("--enable-lmcache",), "--enable-lmcache"),
        (("--disaggregation-mode", "prefill"), "--disaggregation-mode"),
        (("--pp-size", "2"), "--pp-size"),
        (("--enable-streaming-session",), "--enable-streaming-session"),
        (("--disable-radix-cache",), "--disable-radix-cache"),
        (("--decode-attention-backend", "torch_native"), "--decode-attention-backend"),
        (("--speculative-algorithm", "NGRAM"), "--speculative-algorithm"),
        (("--enable-torch-compile",), "--enable-torch-compile"),
        (("--cuda-graph-backend-decode", "breakable"), "--cuda-graph-backend-decode.*use full or disabled"),
        (("--cuda-graph-backend-decode", "tc_piecewise"), "--cuda-graph-backend-decode.*use full or disabled"),
        (("--cuda-graph-config", '{"decode": {"backend": "breakable"}}'), "--cuda-graph-backend-decode"),
        (("--cuda-graph-backend-prefill", "full"), "--disable-prefill-cuda-graph"),
        (("--cuda-graph-backend-prefill", "breakable"), "--disable-prefill-cuda-graph"),
        (("--dtype", "float16", "--kv-cache-dtype", "bfloat16"), "--kv-cache-dtype bfloat16.*use auto"),
        (("--dtype", "float32", "--kv-cache-dtype", "bf16"), "--kv-cache-dtype bf16.*use auto"),
        (("--radix-eviction-policy", "lfu"), "--radix-eviction-policy lfu"),
        (("--dcp-size", "2", "--tp-size", "2"), "--dcp-size 2"),
        (("--attn-cp-size", "2", "--tp-size", "2", "--enable-prefill-cp", "--cp-strategy", "zigzag"),
         "--attn-cp-size 2"),
        (("--elastic-ep-backend", "mooncake"), "--elastic-ep-backend"),
        (("--kv-canary", "log"), "--kv-canary log"),
        (("--enable-return-routed-experts",), "--enable-return-routed-experts"),
        (("--tokenizer-worker-num", "2"), "--tokenizer-worker-num 2"),
        (("--smg-grpc-mode",), "--smg-grpc-mode"),
        (("--decoupled-spec-role", "verifier"), "--decoupled-spec-role"),
        (("--enable-dp-attention", "--tp-size", "2", "--dp-size", "2"), "--enable-dp-attention"),
        (("--enable-session-radix-cache",), "--enable-session-radix-cache"),
        (("--kv-events-config", "{}"), "--kv-events-config"),
        (("--enable-pdmux",), "--enable-pdmux"),
        (("--enable-hisparse",), "--enable-hisparse"),
        (("--enable-flexkv",), "--enable-flexkv"),
        (("--enable-two-batch-overlap",), "--enable-two-batch-overlap"),
        (("--encoder-only",), "--encoder-only.*without --attention-backend tgvkv"),
        (("--language-only",), "--language-only.*leave it out"),
    ],
)
def test_impossible_combinations_are_refused(model_dir, flags, word):
    with pytest.raises(UnsupportedServerError, match=word):
        parse(model_dir, *flags)


def test_supported_values_of_those_flags_are_accepted(model_dir):
    """The refusals above go by value, not by the presence of a flag."""
    args = parse(model_dir, "--dtype", "bfloat16", "--kv-cache-dtype", "bf16", "--cuda-graph-backend-decode", "full",
                 "--cuda-graph-backend-prefill", "disabled", "--radix-eviction-policy", "lru")  # fmt: skip
    assert config_of(args) is not None
    assert (args.cuda_graph_config.decode.backend, args.cuda_graph_config.prefill.backend) == ("full", "disabled")
    assert all(config_of(parse(model_dir, "--kv-cache-dtype", name)) for name in ("fp8_e4m3", "fp8_e5m2"))


def test_a_flag_that_sglang_drops_without_cuda_is_refused_with_it(model_dir):
    args = parse(model_dir, "--debug-cuda-graph")
    assert not args.debug_cuda_graph
    object.__setattr__(args, "debug_cuda_graph", True)
    with pytest.raises(UnsupportedServerError, match="--debug-cuda-graph"):
        refuse(args)


def text_model(directory, architecture: str):
    Qwen3Config(architectures=[architecture]).save_pretrained(directory)
    return directory


def test_text_models_keep_their_prefill_graphs(tmp_path):
    directory = text_model(tmp_path, "Qwen3ForCausalLM")
    args = parse(directory, "--cuda-graph-backend-prefill", "full", "--skip-tokenizer-init")
    assert args.cuda_graph_config.prefill.backend == "full"


def test_diffusion_models_are_refused(tmp_path):
    with pytest.raises(UnsupportedServerError, match="--dllm-algorithm LowConfidence"):
        parse(text_model(tmp_path, "SDARForCausalLM"), "--dllm-algorithm", "LowConfidence", "--skip-tokenizer-init")


@pytest.mark.parametrize(
    "name", ("SGLANG_RUST_SERVER", "SGLANG_RADIX_FORCE_MISS", "SGLANG_ENABLE_POST_CAPTURE_KV_SIZING")
)
def test_environments_that_cannot_work_are_refused(model_dir, name):
    from sglang.srt.environ import envs

    with getattr(envs, name).override(True), pytest.raises(UnsupportedServerError, match=f"tgvkv: {name}=1 .*unset it"):
        parse(model_dir)


def test_a_batch_without_vision_is_stock_call_for_call(monkeypatch):
    """Text-only traffic enters SGLang's own function with the very same arguments, and nothing else of ours."""
    from tgvkv_sglang.sglang_seam import torch_backend as seam

    calls = []
    for name in ("forward_extend", "forward_decode"):
        monkeypatch.setattr(TorchNativeAttnBackend, name, lambda self, *args: calls.append(args) or "stock")
    for name in ("attend", "row_lse_e", "KeyRows", "decode_rows", "page_rows"):
        monkeypatch.setattr(seam, name, lambda *args: pytest.fail("code for views ran on a batch without vision"))
    ours = object.__new__(seam.TgvTorchBackend)
    monkeypatch.setattr(seam, "states_of", lambda batch: None)
    ours.use_sliding_window_kv_pool = False
    ours.init_forward_metadata(types.SimpleNamespace())
    assert ours.forward_extend(1, 2, 3, 4, 5) == ours.forward_decode(1, 2, 3, 4, 5) == "stock"
    assert calls == [(1, 2, 3, 4, 5, True)] * 2


def test_a_batch_without_vision_is_stock_flashinfer_call_for_call(monkeypatch):
    from tgvkv_sglang.sglang_seam import flashinfer_backend as seam

    calls = []
    for name in ("init_forward_metadata", "forward_extend", "forward_decode"):
        monkeypatch.setattr(
            seam.FlashInferAttnBackend, name, lambda self, *args, name=name: calls.append((name, *args)) or "stock"
        )
    for name in ("merge_views", "dense_rows", "ViewPlanner", "page_rows"):
        monkeypatch.setattr(seam, name, lambda *args: pytest.fail("code for views ran on a batch without vision"))
    monkeypatch.setattr(seam, "states_of", lambda batch: None)
    ours = object.__new__(seam.TgvFlashInferBackend)
    ours.init_forward_metadata("batch")
    assert ours.forward_extend(1, 2, 3, 4, 5) == ours.forward_decode(1, 2, 3, 4, 5) == "stock"
    ours._update_decode(lambda *args, **options: calls.append((args, options)), 1, 2, 3, 4, decode_wrappers=5,
                        encoder_lens=6, spec_info=None, fixed_split_size=8)  # fmt: skip
    assert calls == [
        ("init_forward_metadata", "batch"),
        ("forward_extend", 1, 2, 3, 4, 5, True),
        ("forward_decode", 1, 2, 3, 4, 5, True),
        ((1, 2, 3, 4, 5, 6, None), {"fixed_split_size": 8}),
    ]


@pytest.fixture
def graph_runner(monkeypatch):
    """A stand-in for SGLang's decode graph runner with our backend's three graph methods; notes captures."""
    from tgvkv_sglang.sglang_seam import cuda_graphs

    class Backend:
        capturing = False

        @contextlib.contextmanager
        def capture_views(self):
            self.capturing = True
            yield
            self.capturing = False

        def views_in(self, states):
            return "viewed" in states

        def graph_fits(self, states):
            return "too many" not in states

    monkeypatch.setattr(cuda_graphs, "states_of", lambda batch: batch.states)
    return types.SimpleNamespace(attn_backend=Backend())


def decode_batch(states: list | None, decode: bool = True):
    return types.SimpleNamespace(states=states, forward_mode=types.SimpleNamespace(is_decode=lambda: decode))


def test_every_batch_size_is_captured_without_and_with_views(graph_runner):
    from tgvkv_sglang.sglang_seam.cuda_graphs import capture_one_shape

    captured = []

    def original(self, size, forward, stream_idx, label):
        captured.append((size, label, self.attn_backend.capturing))

    capture_one_shape(original, graph_runner, 4, None)
    capture_one_shape(original, graph_runner, 2, None, 0, "lora")
    assert captured == [(4, None, False), (4, "tgvkv", True), (2, "lora", False), (2, "lora+tgvkv", True)]
    stock = types.SimpleNamespace(attn_backend=types.SimpleNamespace(capturing=None))
    capture_one_shape(original, stock, 1, None)
    assert captured[4:] == [(1, None, None)]


def test_a_decode_batch_goes_through_the_graph_that_fits_it(graph_runner):
    from tgvkv_sglang.sglang_seam.cuda_graphs import can_run_graph, resolve_variant

    label = lambda batch, stock=None: resolve_variant(lambda self, batch: stock, graph_runner, batch)  # noqa: E731
    assert label(decode_batch(["viewed", None])) == "tgvkv"
    assert label(decode_batch(["viewed"]), "nolora") == "nolora+tgvkv"
    assert label(decode_batch([None])) is label(decode_batch(None)) is label(decode_batch(["viewed"], False)) is None
    fits = lambda batch, stock=True: can_run_graph(lambda self, batch: stock, graph_runner, batch)  # noqa: E731
    assert fits(decode_batch(["viewed"])) and fits(decode_batch(None))
    assert not fits(decode_batch(["too many"])) and not fits(decode_batch(["viewed"]), stock=False)


def test_steps_that_views_keep_out_of_graphs_are_counted_and_logged_each_time_they_doubled(caplog, monkeypatch):
    """By the backend's own check, once a step; the tables are a real planner's and hold 12 units."""
    from tgvkv_sglang.attention.planner import ViewPlanner
    from tgvkv_sglang.kv.store import UnitStore
    from tgvkv_sglang.kv.views import KeptUnits, ViewTable
    from tgvkv_sglang.selection.policy import Model
    from tgvkv_sglang.sglang_seam import cuda_graphs
    from tgvkv_sglang.sglang_seam.flashinfer_backend import TgvFlashInferBackend

    monkeypatch.setattr(cuda_graphs, "is_first_rank", lambda: True)
    store = UnitStore(torch.zeros(2, 6, 1, 4), torch.zeros(2, 6, 1, 4))
    backend = object.__new__(TgvFlashInferBackend)
    backend._planner = ViewPlanner(store, Model(2, 1), torch.zeros(8, 9, dtype=torch.int32), 2**20)
    backend._planner.make_graph_tables(8)
    backend.steps_without_graph = cuda_graphs.StepsWithoutGraph()
    kept = torch.arange(4, dtype=torch.int32)
    view = KeptUnits([(0, 5)], kept, kept, torch.tensor([0, 3, 4], dtype=torch.int32))
    viewer = types.SimpleNamespace(table=lambda decode: ViewTable([view]))
    assert all(backend.graph_fits(states) for states in ([], [None], [viewer, None], [viewer] * 3))
    assert backend.steps_without_graph.count == 0
    with caplog.at_level("WARNING"):
        for _ in range(9):
            assert not backend.graph_fits([viewer, None, viewer, viewer, viewer])
    assert backend.steps_without_graph.count == 9
    assert [record.message.split(" (this")[0] for record in caplog.records] == [
        "tgvkv: a decode step of 5 requests ran without a CUDA graph, which is slower: their views have 16 units, the "
        f"graphs' tables hold 12. Such steps so far: {count}" for count in (1, 2, 4, 8)
    ]  # fmt: skip


def cache_of(slots: int):
    """The prefix cache as SGLang makes it, over a pool of one layer."""
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams

    from tgvkv_sglang.sglang_seam.allocator import CpuSlotAllocator
    from tgvkv_sglang.sglang_seam.pool import TgvKVPool
    from tgvkv_sglang.sglang_seam.radix_cache import TgvRadixCache

    pool = TgvKVPool(slots, 1, torch.float32, 1, 2, 1, "cpu", False)
    allocator = CpuSlotAllocator(slots, 1, torch.float32, "cpu", pool, False)
    return TgvRadixCache(CacheInitParams(False, None, allocator, 1), TgvConfig(retention=0.5))


@pytest.mark.parametrize("strict, finds_two_owners", [(0, False), (1, True)])
def test_an_idle_server_counts_slots_one_by_one_only_where_memory_is_checked_strictly(strict, finds_two_owners):
    from sglang.srt.environ import envs

    cache = cache_of(20)
    allocator, tree = cache.token_to_kv_pool_allocator, cache.tree
    tree.insert(None, np.arange(5), allocator.alloc(5), 0, True)
    with envs.SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY.override(strict):
        cache.check_ownership()
        (node,) = tree.nodes()
        node.value[0] = node.value[1]  # the sums are right, the owners are not
        tree.clock += 1
        with pytest.raises(IntegrityError, match="two owners") if finds_two_owners else contextlib.nullcontext():
            cache.check_ownership()
        allocator.alloc(3)  # somebody keeps three
        with pytest.raises(IntegrityError, match="free 12"):
            cache.check_ownership()


def test_slot_zero_is_never_freed():
    from tgvkv_sglang.sglang_seam.allocator import CpuSlotAllocator

    allocator = CpuSlotAllocator(8, 1, torch.float32, "cpu", None, False)
    slots = allocator.alloc(4)
    with pytest.raises(IntegrityError, match="slot 0"):
        allocator.free(torch.tensor([int(slots[0]), 0]))
    allocator.free(slots)
    assert allocator.available_size() == 8
