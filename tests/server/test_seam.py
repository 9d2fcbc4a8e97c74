"""Hooks, refusals and the text-only path, in one process that imports SGLang but starts no server."""

from __future__ import annotations

import contextlib
import types

import pytest
import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.plugins import load_plugins
from sglang.srt.server_args import ServerArgs, prepare_server_args

from tgvkv_sglang.config import TgvConfig
from tgvkv_sglang.errors import ConfigError, IntegrityError, UnsupportedServerError
from tgvkv_sglang.sglang_seam import active
from tgvkv_sglang.sglang_seam.server_args import config_of

CPU = ["--device", "cpu", "--disable-cuda-graph", "--disable-fast-image-processor"]


@pytest.fixture(scope="module", autouse=True)
def plugins():
    load_plugins()
    active.require("this test")


def parse(model_dir, *flags: str) -> ServerArgs:
    return prepare_server_args(["--model-path", str(model_dir), *CPU, "--attention-backend", "tgvkv", *flags])


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
    args = prepare_server_args(["--model-path", str(model_dir), *CPU, "--attention-backend", "torch_native"])
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
        (("--kv-cache-dtype", "fp8_e5m2"), "--kv-cache-dtype"),
        (("--disable-radix-cache",), "--disable-radix-cache"),
        (("--decode-attention-backend", "torch_native"), "--decode-attention-backend"),
        (("--speculative-algorithm", "NGRAM"), "--speculative-algorithm"),
    ],
)
def test_impossible_combinations_are_refused(model_dir, flags, word):
    with pytest.raises(UnsupportedServerError, match=word):
        parse(model_dir, *flags)


@pytest.mark.parametrize("multimodal, backend, refused", [(True, "full", True), (True, "disabled", False),
                                                          (False, "full", False)])  # fmt: skip
def test_prefill_graphs_are_refused_where_images_are_served(multimodal, backend, refused):
    """A prefill replayed from a graph runs no Python, so nothing would be scored."""
    from tgvkv_sglang.sglang_seam.refusals import refuse_prefill_graph

    runner = types.SimpleNamespace(
        model_config=types.SimpleNamespace(is_multimodal=multimodal),
        server_args=types.SimpleNamespace(
            cuda_graph_config=types.SimpleNamespace(prefill=types.SimpleNamespace(backend=backend))
        ),
    )
    if not refused:
        refuse_prefill_graph(runner)
        return
    with pytest.raises(UnsupportedServerError, match="--disable-prefill-cuda-graph"):
        refuse_prefill_graph(runner)


@pytest.mark.parametrize(
    "change, word",
    [
        ({"attention_arch": "MLA"}, "MLA"),
        ({"is_hybrid_swa": True}, "sliding-window"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "hybrid"),
        ({"attn_logit_softcapping": 30.0}, "soft-capped"),
    ],
)
def test_models_that_cannot_work_are_refused(change, word):
    from sglang.srt.configs.model_config import AttentionArch

    from tgvkv_sglang.sglang_seam.refusals import refuse_model

    text = types.SimpleNamespace(layer_types=change.get("layer_types"))
    text.attn_logit_softcapping = change.get("attn_logit_softcapping")
    arch = AttentionArch[change.get("attention_arch", "MHA")]
    swa = change.get("is_hybrid_swa", False)
    config = types.SimpleNamespace(attention_arch=arch, is_hybrid_swa=swa, hf_text_config=text)
    with pytest.raises(UnsupportedServerError, match=word):
        refuse_model(config)
    plain = types.SimpleNamespace(layer_types=["full_attention"], attn_logit_softcapping=None)
    refuse_model(types.SimpleNamespace(attention_arch=AttentionArch.MHA, is_hybrid_swa=False, hf_text_config=plain))


def test_a_batch_without_vision_is_stock_call_for_call(monkeypatch):
    """Text-only traffic enters SGLang's own function with the very same arguments, and nothing else of ours."""
    from tgvkv_sglang.sglang_seam import backend as seam

    calls = []
    for name in ("forward_extend", "forward_decode"):
        monkeypatch.setattr(TorchNativeAttnBackend, name, lambda self, *args: calls.append(args) or "stock")
    for name in ("attend", "row_lse_e", "KeyRows"):
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
    for name in ("merge_views", "dense_indices", "BatchUnits", "Holes", "stash_and_score"):
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


@pytest.mark.parametrize("zero_bubble", (False, True))
def test_a_decode_step_waits_for_the_selection_of_its_prefill_unless_zero_bubble(zero_bubble):
    from tgvkv_sglang.sglang_seam.batches import is_disable_overlap_for_batch

    def mode(decode: bool):
        return types.SimpleNamespace(is_decode=lambda: decode, is_extend=lambda: not decode)

    def held_back(batch_decodes: bool, queued_decodes: bool, states: list) -> bool:
        requests = [types.SimpleNamespace(_tgvkv_state=state) for state in states]
        queued = types.SimpleNamespace(forward_mode=mode(queued_decodes), reqs=requests)
        scheduler = types.SimpleNamespace(
            server_args=types.SimpleNamespace(_tgvkv=TgvConfig(zero_bubble=zero_bubble)), result_queue=[(queued, None)]
        )
        batch = types.SimpleNamespace(forward_mode=mode(batch_decodes))
        return is_disable_overlap_for_batch(lambda self, batch, last: False, scheduler, batch, None)

    assert held_back(True, False, [None, "vision"]) is not zero_bubble
    assert not held_back(True, False, [None, None])  # text alone overlaps as stock
    assert not held_back(True, True, ["vision"])
    assert not held_back(False, False, ["vision"])


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


def test_slot_zero_is_never_freed():
    from tgvkv_sglang.sglang_seam.allocator import CpuSlotAllocator

    allocator = CpuSlotAllocator(8, 1, torch.float32, "cpu", None, False)
    slots = allocator.alloc(4)
    with pytest.raises(IntegrityError, match="slot 0"):
        allocator.free(torch.tensor([int(slots[0]), 0]))
    allocator.free(slots)
    assert allocator.available_size() == 8
