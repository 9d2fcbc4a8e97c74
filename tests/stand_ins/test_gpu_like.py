"""The ``gpu_like`` plugin: found only where its directory is on the path, and its stand-ins do what they stand for."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from tests.fakes import HERE, gpu_like_env

LIST = "import importlib.metadata as m; print([e.name for e in m.entry_points(group='sglang.srt.plugins')])"
FIND = "import tests.fakes.flashinfer_fake, importlib.metadata as m; " + (
    "(e,) = [e for e in m.entry_points(group='sglang.srt.plugins') if e.name == 'gpu_like']; print(e.load().__name__)"
)


def python(code: str, cwd, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env}, cwd=cwd
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def plugin():
    spec = importlib.util.spec_from_file_location("tgvkv_gpu_like", HERE / "gpu_like" / "tgvkv_gpu_like.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_plugin_is_found_only_with_its_environment(tmp_path):
    assert "gpu_like" not in python(LIST, tmp_path)
    assert python(FIND, tmp_path, **gpu_like_env()) == "activate"


def test_kv_indices_are_the_requests_slots(plugin):
    req_to_token = torch.arange(40, dtype=torch.int32).view(4, 10)
    kv_indices = torch.full((9,), -1, dtype=torch.int32)
    lengths, indptr = torch.tensor([3, 0, 4]), torch.tensor([0, 3, 3, 7], dtype=torch.int32)
    launch = plugin.TorchKernel()[(3,)]
    launch(req_to_token, torch.tensor([2, 0, 1]), lengths, indptr, None, kv_indices, 10)
    assert kv_indices.tolist() == [20, 21, 22, 10, 11, 12, 13, -1, -1]
    launch(req_to_token, torch.tensor([2, 0, 1]), lengths, indptr, torch.tensor([5, 1, 6]), kv_indices, 10)
    assert kv_indices.tolist() == [25, 26, 27, 16, 17, 18, 19, -1, -1]


def test_a_buffer_too_small_for_the_indices_raises(plugin):
    with pytest.raises(RuntimeError):
        plugin.TorchKernel()[(1,)](
            torch.zeros(2, 10, dtype=torch.int32),
            torch.tensor([1]),
            torch.tensor([4]),
            torch.tensor([0, 4], dtype=torch.int32),
            None,
            torch.zeros(3, dtype=torch.int32),
            10,
        )


def test_only_allocations_on_cuda_are_redirected(plugin):
    proxy = plugin.TorchOnCpu()
    assert proxy.empty(3, dtype=torch.int32, device="cuda").device.type == "cpu"
    assert proxy.zeros((2, 3), device="cuda").tolist() == [[0.0] * 3] * 2
    assert proxy.empty(1, device="meta").device.type == "meta"
    assert proxy.cumsum is torch.cumsum and proxy.Tensor is torch.Tensor


def test_a_failed_activation_ends_the_process(plugin, monkeypatch, capsys):
    """SGLang catches exceptions of plugins and would serve without the fakes."""

    def fail():
        raise ImportError("no such module")

    monkeypatch.setattr(plugin, "_install", fail)
    with pytest.raises(SystemExit, match="gpu_like: no such module"):
        plugin.activate()
    assert plugin.ACTIVE not in capsys.readouterr().err
