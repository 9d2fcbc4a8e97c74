"""KV is read and written in order on every stream: SGLang's own event loops around our cache, on fake streams.

What is real: ``Scheduler.run_event_loop`` with its loops, ``run_batch``, and the barrier behind a launch;
the radix cache, the unit store and its moves. What stands in: the streams, and the forward, which only tells which
units it would read and write.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Callable, Iterator

import pytest
import torch
from sglang.srt.disaggregation.utils import DisaggregationMode
from sglang.srt.environ import envs
from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.mem_cache.base_prefix_cache import EvictParams
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from tests.fakes.streams import Streams
from tests.seam.one_process import LAYERS, OneProcess, configured, picture
from tgvkv_sglang.sglang_seam import flashinfer_backend
from tgvkv_sglang.sglang_seam.flashinfer_backend import order_moves
from tgvkv_sglang.sglang_seam.requests import state_of

NOTHING = lambda *args, **options: None  # noqa: E731


class Forwards:
    """SGLang's model worker: runs a batch by saying what it reads and writes, on whatever stream is current."""

    def __init__(self, engine: OneProcess, device: Streams, graphs: bool):
        self.engine, self.device, self.graphs = engine, device, graphs
        self.war_fastpath_runner = self
        self.war_fastpath_read_done_event = None

    def forward_batch_generation(self, batch: ScheduleBatch, pp_proxy_tensors: object = None) -> SimpleNamespace:
        reads, writes = [], []
        for req in batch.reqs:
            if batch.forward_mode.is_decode():
                units = self.engine.units(req)
                new = self.engine.new_units(req, req.kv_committed_len - 1)
                reads += set(units) - set(new)
            else:
                self.engine.run(req)
                new = self.engine.new_units(req, req.extend_range.start)
                reads += [u for u in self.engine.units(req, decode=False) if u not in set(new)]
            writes += new
        if self.graphs and batch.forward_mode.is_decode():  # as the decode graph runner does, before the replay
            self.war_fastpath_read_done_event = self.device.Event()
            self.war_fastpath_read_done_event.record()
        kind = "decode" if batch.forward_mode.is_decode() else "prefill"
        self.device.run(f"{kind} of {', '.join(req.rid for req in batch.reqs)}", reads, writes)
        return SimpleNamespace(extra_keep_alive_refs=None, delay_sample_func=None, has_sampled_token_ids=False,
                               next_draft_input=None, copy_to_cpu=NOTHING)  # fmt: skip


class Loop(Scheduler):
    """A scheduler without processes around it: it runs the batches of a script, then stops."""

    def __init__(self, args, engine: OneProcess, device: Streams, script: Iterator, graphs: bool):
        self.server_args, self.engine, self._script = args, engine, script
        self.enable_overlap, self.enable_overlap_mlx = not args.disable_overlap_schedule, False
        self.device_module, self.device = device, "cuda"
        self.forward_stream = device.Stream(name="forward stream")
        self.forward_stream_ctx = device.stream(self.forward_stream)
        self.copy_stream = device.Stream(name="copy stream")
        self.copy_stream_ctx = device.stream(self.copy_stream)
        self.batch_record_buf, self.batch_record_ct = [None] * 2, 0
        self.model_worker = Forwards(engine, device, graphs)
        self.future_map = SimpleNamespace(resolve_seq_lens_cpu=NOTHING, publish=NOTHING)
        self.spec_algorithm, self.disaggregation_mode = SpeculativeAlgorithm.NONE, DisaggregationMode.NULL
        self.profiler_manager = SimpleNamespace(_profile_batch_predicate=NOTHING)
        self.request_receiver = SimpleNamespace(recv_requests=list)
        self.scripted_scheduler_hook = self.forward_sleep_time = self._confidence_budget_prepare = None
        self.gracefully_exit = self._engine_paused = self.enable_pdmux = self.enable_unified_memory = False
        self.require_mlp_sync, self.enable_dp_attention, self.is_generation = False, False, True
        self.running_batch = self.last_batch = None
        self.forward_ct = 0
        self.processed: list[str] = []

    process_input_requests = NOTHING

    def get_next_batch_to_run(self, running_batch, last_batch):
        return SimpleNamespace(running_batch=None, batch_to_run=next(self._script, None))

    def process_batch_result(self, batch: ScheduleBatch, result) -> None:
        if batch.forward_mode.is_extend():
            for req in batch.reqs:
                self.engine.take_result(req)
                self.processed.append(req.rid)

    def on_idle(self) -> None:
        self.gracefully_exit = True


class Engine(OneProcess):
    def units(self, req: Req, decode: bool = True) -> list[int]:
        """Units that a step of the request attends to, in all layers."""
        length = req.kv_committed_len if decode else req.extend_range.end
        keys = self.keys(req, length, decode)
        return [unit for layer in range(LAYERS) for unit in keys.layer(layer).units.tolist()]

    def new_units(self, req: Req, start: int) -> list[int]:
        """Units of the request's own slots from logical position ``start`` on."""
        slots = self.rows.req_to_token[req.req_pool_idx, start : req.kv_committed_len].tolist()
        return [layer * self.store.slots + slot for layer in range(LAYERS) for slot in slots]


def batch_of(mode: ForwardMode, *reqs: Req) -> ScheduleBatch:
    batch = ScheduleBatch(reqs=list(reqs), forward_mode=mode, spec_algorithm=SpeculativeAlgorithm.NONE)
    batch.seq_lens = torch.tensor([req.kv_committed_len for req in reqs])
    batch.input_ids = batch.req_pool_indices = torch.tensor([req.req_pool_idx for req in reqs])
    return batch


def story(engine: Engine) -> Iterator[ScheduleBatch]:
    """An image is answered, reclaimed while a decode step may be in flight, and its slots go to another image."""

    def decode(*reqs: Req) -> ScheduleBatch:
        for req in reqs:
            engine.decode(req)
        return batch_of(ForwardMode.DECODE, *reqs)

    first = engine.request("first", [1, *picture(0, 150), 2, 3])
    engine.schedule(first)
    yield batch_of(ForwardMode.EXTEND, first)
    yield decode(first)
    yield decode(first)
    (view,) = state_of(first).views
    taken = set(view.span.value.tolist())
    second = engine.request("second", [4, *picture(1, 200), 5, 6])
    engine.cache.evict(EvictParams(num_tokens=203 - engine.free()))
    assert view.packed, "reclaimed under the request that decodes through it"
    engine.schedule(second)
    assert taken & set(engine.rows.req_to_token[second.req_pool_idx, :203].tolist()), "slots have a new owner"
    yield batch_of(ForwardMode.EXTEND, second)
    yield decode(first, second)
    yield decode(first, second)
    engine.finish(first)
    yield decode(second)


@pytest.fixture
def tell(model_dir, monkeypatch) -> Iterator[Callable]:
    """Run the story and return the fake device."""

    def tell(order: Callable, *flags: str, graphs: bool = True) -> Streams:
        device = Streams()
        device.install(monkeypatch)
        with configured(model_dir, *flags) as args:
            engine = Engine(retention=0.2)
            loop = Loop(args, engine, device, story(engine), graphs)
            order(engine.store, SimpleNamespace(device="cuda", forward_stream=loop.forward_stream, server_args=args))
            move = engine.store._move
            monkeypatch.setattr(engine.store, "_move", lambda source, target: (
                device.run("move", source.tolist(), target.tolist()), move(source, target)))  # fmt: skip
            loop.run_event_loop()
        assert loop.processed == ["first", "second"]
        return device

    with envs.SGLANG_ENABLE_WAR_BARRIER.override(True), envs.SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY.override(0):
        yield tell


def where(device: Streams) -> dict[str, set[str]]:
    """On which streams forwards and moves ran."""
    found: dict[str, set[str]] = {}
    for operation in device.operations:
        kind = "moves" if operation.name == "move" else "forwards"
        found.setdefault(kind, set()).add(str(operation.stream))
    return found


@pytest.mark.parametrize("graphs", (True, False), ids=("graphs", "eager"))
@pytest.mark.parametrize(
    "flags, stream",
    [((), "forward stream"), (("--disable-overlap-schedule",), "stream")],
)
def test_every_access_to_kv_is_in_order(tell, flags, stream, graphs):
    device = tell(order_moves, *flags, graphs=graphs)
    assert device.races == []
    assert where(device) == {"forwards": {stream}, "moves": {stream}}
    assert [operation.name for operation in device.operations] == [
        "prefill of first", "decode of first", "decode of first", "move", "prefill of second",
        "decode of first, second", "decode of first, second", "decode of second",
    ]  # fmt: skip


def always(store, model_runner) -> None:
    store.move_on(model_runner.forward_stream)


def never(store, model_runner) -> None:
    """Moves stay on the scheduler's stream."""


def test_moves_on_another_stream_than_forwards_race_with_them(tell):
    """Without overlap: what comes after the move does not wait for it."""
    races = tell(always, "--disable-overlap-schedule").races
    assert any(race.startswith("'prefill of second'") and "writes over what is read by 'move'" in race
               for race in races)  # fmt: skip
    assert any(race.startswith("'decode of first, second'") and "reads what is written by 'move'" in race
               for race in races)  # fmt: skip
    races = tell(never).races
    assert any(race.startswith("'move'") and "writes over what is read by 'decode of first'" in race for race in races)


def test_lists_of_units_outlive_the_move(tell):
    """They are the scheduler's memory, read on the forward stream: the allocator must know."""
    device = tell(order_moves)
    assert len(device.recorded) == 2 and {str(stream) for _, stream in device.recorded} == {"forward stream"}
    assert not tell(order_moves, "--disable-overlap-schedule").recorded


def test_the_backend_asks_for_the_order(model_dir, monkeypatch):
    """It is made when SGLang builds the backend, on the store of its own pool."""
    asked = []
    monkeypatch.setattr(flashinfer_backend, "order_moves", lambda *args: asked.append(args))
    monkeypatch.setattr(flashinfer_backend.FlashInferAttnBackend, "__init__", NOTHING)
    monkeypatch.setattr(flashinfer_backend, "model_of", NOTHING)
    backend = object.__new__(flashinfer_backend.TgvFlashInferBackend)
    backend.token_to_kv_pool = SimpleNamespace(store=OneProcess().store, start_layer=0)
    backend.req_to_token_pool = SimpleNamespace(req_to_token=torch.zeros(2, 8, dtype=torch.int32))
    backend.decode_cuda_graph_metadata, backend.indices_updater_decode = {}, SimpleNamespace(update=NOTHING)
    with configured(model_dir) as args:
        runner = SimpleNamespace(server_args=args, model=torch.nn.Module())
        backend.__init__(runner)
    assert asked == [(backend.token_to_kv_pool.store, runner)]
