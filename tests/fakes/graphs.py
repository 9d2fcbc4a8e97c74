"""CUDA graphs on the CPU: a decode step is recorded operation by operation and replayed on the very same tensors.

What a real graph freezes is frozen here: Python ran once, at capture, and a replay repeats its operations on the
addresses it saw. Whoever forgets to refresh a table, or makes a new tensor for each step, gets old data. Reading a
value back to the host, uploading or pinning one, which a real capture refuses, is refused. Memory left uninitialised is
NaN. Decode steps that were not replayed are told in the log.
"""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, Callable, Iterator

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.fakes.fake_cuda import ALLOCATIONS
from tests.fakes.host_reads import NoHostCalls, reads_back

BATCHES = [1, 2, 4, 8, 16]
_recorder: "_Recorder | None" = None


class _Recorder(TorchDispatchMode):
    """Notes every operation that runs under it."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[Callable, tuple, dict, Any]] = []
        self.paused = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if self.paused:
            return out
        name = func._schema.name.removeprefix("aten::")
        if reads_back(name, args, kwargs) or name == "_pin_memory":
            raise RuntimeError(f"{name} reads the device from the host: a CUDA graph cannot be captured around it")
        if name in ALLOCATIONS:
            for tensor in tree_leaves(out):
                if tensor.is_floating_point():
                    tensor.fill_(float("nan"))
        else:
            self.steps.append((func, args, kwargs, out))
        return out


def opaque(function: Callable) -> Callable:
    """A function that is one kernel launch on a GPU: recorded as a whole, whatever it does inside."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if _recorder is None or _recorder.paused:
            return function(*args, **kwargs)
        _recorder.paused = True
        try:
            out = function(*args, **kwargs)
        finally:
            _recorder.paused = False
        _recorder.steps.append((function, args, kwargs, out))
        return out

    return call


class RecordedGraph:
    """Stands for ``torch.cuda.CUDAGraph``."""

    def __init__(self) -> None:
        self._steps: list[tuple[Callable, tuple, dict, Any]] = []

    def record(self, forward: Callable[[], Any]) -> Any:
        global _recorder
        _recorder = _Recorder()
        try:
            with NoHostCalls(lambda: _recorder.paused), _recorder:
                out = forward()
            self._steps = _recorder.steps
        finally:
            _recorder = None
        return out

    def replay(self) -> None:
        for function, args, kwargs, recorded in self._steps:
            for old, new in zip(tree_leaves(recorded), tree_leaves(function(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class EmulatedGraphBackend:
    """Same methods as SGLang's ``FullCudaGraphBackend``."""

    def __init__(self) -> None:
        self._graphs: dict[Any, tuple[RecordedGraph, Any]] = {}
        self.replays: dict[Any, int] = {}

    @contextmanager
    def capture_session(self, stream: Any) -> Iterator[None]:
        yield

    def capture_one(
        self, shape_key: Any, forward_fn: Callable, capture_inputs: Any = None, post_warmup_hook: Callable | None = None
    ) -> None:
        for _ in range(2):
            forward_fn()
            if post_warmup_hook is not None:
                post_warmup_hook()
        graph = RecordedGraph()
        self._graphs[shape_key] = graph, graph.record(forward_fn)

    def can_run(self, forward_batch: Any, shape_key: Any) -> bool:
        return shape_key in self._graphs

    @contextmanager
    def replay_session(self) -> Iterator[None]:
        yield

    def replay(self, shape_key: Any, static_forward_batch: Any, **kwargs: Any) -> Any:
        graph, out = self._graphs[shape_key]
        with torch.no_grad():
            graph.replay()
        if shape_key not in self.replays:
            print(
                f"gpu_like: first replay of graph size={shape_key.size} variant={shape_key.variant_label}", flush=True
            )
        self.replays[shape_key] = self.replays.get(shape_key, 0) + 1
        return out

    def cleanup(self) -> None:
        self._graphs.clear()


@contextmanager
def _capture(*args: Any, **kwargs: Any) -> Iterator[Any]:
    yield SimpleNamespace(stream=None)


def install() -> None:
    """Make a CPU server capture and replay its decode steps through SGLang's own ``DecodeCudaGraphRunner``."""
    from sglang.srt.model_executor.graph_shared_output import GraphSharedOutput
    from sglang.srt.model_executor.model_runner_components import cuda_graph_setup as setup
    from sglang.srt.model_executor.runner import decode_cuda_graph_runner as runner
    from sglang.srt.model_executor.runner.eager_runner import EagerRunner

    from tests.fakes import flashinfer_fake
    from tgvkv_sglang.attention import merge

    def capture_decode_graph(*, model_runner: Any) -> Any:
        model_runner.graph_shared_output = GraphSharedOutput(device=torch.device("cpu"), max_rows=max(BATCHES))
        graphs = runner.DecodeCudaGraphRunner(model_runner)
        return setup.GraphCapture(runner=graphs, memory_phase="decode", memory_usage_gb=0, capture_time=0)

    setup.capture_decode_graph = capture_decode_graph
    runner.get_batch_sizes_to_capture = lambda model_runner, tokens_per_request: (BATCHES, [])
    runner.graph_capture = _capture
    runner.resolve_decode_backend = lambda cuda_graph_runner: EmulatedGraphBackend()
    EagerRunner.execute = telling_of_decode(EagerRunner.execute)
    merge.view_attention = opaque(merge.view_attention)
    decode = flashinfer_fake.BatchDecodeWithPagedKVCacheWrapper
    decode.run = opaque_method(decode.run)


def telling_of_decode(execute: Callable) -> Callable:
    """SGLang's way without graphs, which says when a decode step takes it."""

    def call(self: Any, forward_batch: Any, *args: Any, **kwargs: Any) -> Any:
        if forward_batch.forward_mode.is_decode():
            print(f"gpu_like: decode step of {forward_batch.batch_size} without a graph", flush=True)
        return execute(self, forward_batch, *args, **kwargs)

    return call


def opaque_method(method: Callable) -> Callable:
    """:func:`opaque` for a method: looked up anew at each call, so that it can be bound."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return opaque(method)(self, *args, **kwargs)

    return call
