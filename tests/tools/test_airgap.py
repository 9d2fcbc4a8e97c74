"""Packing for a machine without a network, and putting the parts together there."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import tracemalloc
import types

import pytest

from bench.gpu.programme import gpu_programme
from tools.airgap import background, install, modules, pack, verify


def test_packages_are_pinned():
    wanted = pack.wanted()
    assert all("==" in requirement for requirement in wanted) and len(set(wanted)) == len(wanted)
    assert "sglang==0.5.17" in wanted


def test_pruning_spares_what_a_server_loads():
    assert pack.pruned("sgl_kernel/flashmla_ops.abi3.so") and pack.pruned("sgl_kernel/sm100/common_ops.abi3.so")
    for kept in (
        pack.FLASH_ATTENTION, "sgl_kernel/sm90/common_ops.abi3.so", "sgl_kernel/__init__.py",
        "sglang/srt/server_args.py", "sglang/srt/grpc/__init__.py", "flashinfer/data/csrc/batch_prefill.cu",
        "xgrammar/libxgrammar_bindings.so", "flashinfer/data/cutlass/include/cute/tensor.hpp",
        "sglang-0.5.17.dist-info/entry_points.txt",
    ):  # fmt: skip
        assert not pack.pruned(kept), kept


def test_flash_attention_is_kept_for_every_model_of_the_programme():
    for dim in {96, *(model.head_dim for model in modules.MODELS)}:
        for kind in ("", "_packgqa", "_paged", "_split", "_paged_split"):
            assert pack.FLASH_SOURCES.fullmatch(f"flash_fwd_hdim{dim}_bf16{kind}_sm90")
    for unused in ("hdim128_bf16_sm80", "hdim128_fp16_sm90", "hdim128_bf16_softcap_sm90", "hdim256_bf16_sm90"):
        assert not pack.FLASH_SOURCES.fullmatch(f"flash_fwd_{unused}")


def packed(tmp_path, monkeypatch, part_bytes: int | None):
    """A packing of a few small files, cut into parts of ``part_bytes`` (None: not cut)."""
    out = tmp_path / "out"
    for name in ("site/sglang/a.py", "modules/tvm-ffi/x/x.so", "modules/triton/y", "modules/aot/m/m.so"):
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name * 50)
    monkeypatch.setattr(pack, "MIB", part_bytes or 1)
    pack.make_parts(out, part_bytes and 1)
    return out / "parts"


def test_parts_come_together_on_the_other_side(tmp_path, monkeypatch):
    parts, to = packed(tmp_path, monkeypatch, 200), tmp_path / "to"
    folders = sorted(parts.iterdir(), key=lambda path: int(path.name))
    assert len(folders) > 1 and all(folder.is_dir() for folder in folders)
    for number, folder in enumerate(folders, 1):
        manifest = install.store(folder, to)
        assert install.missing(manifest, to) == list(range(number + 1, len(folders) + 1))
    install.unpack(manifest, to)
    assert (to / "site/sglang/a.py").read_text() == "site/sglang/a.py" * 50
    assert (to / "site/flashinfer/data/aot/m/m.so").is_file() and (to / "triton/y").is_file()
    assert (to / "tvm-ffi/x/x.so").is_file()


def test_what_expands_a_thousandfold_is_not_held_in_memory(tmp_path, monkeypatch):
    """FlashAttention 3 is mostly zeros; kept in memory they are copied again for each read."""
    zeros = 64 * 2**20
    library = tmp_path / "out" / "site" / "zeros.so"
    library.parent.mkdir(parents=True)
    with library.open("wb") as file:
        file.truncate(zeros)
    parts, to = packed(tmp_path, monkeypatch, None), tmp_path / "to"
    manifest = install.store(parts / "1", to)
    tracemalloc.start()
    try:
        install.unpack(manifest, to)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (to / "site/zeros.so").stat().st_size == zeros and most < zeros / 4


def test_a_damaged_part_is_refused(tmp_path, monkeypatch):
    parts = packed(tmp_path, monkeypatch, None)
    assert [folder.name for folder in parts.iterdir()] == ["1"]
    path = parts / "1" / "part-1"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(SystemExit, match="part-1 arrived damaged"):
        install.store(parts / "1", tmp_path / "to")


def test_a_folder_without_parts_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="name a folder that pack.py made"):
        install.store(tmp_path, tmp_path / "to")


def test_the_plugin_is_registered_as_pip_would(tmp_path):
    (tmp_path / "site").mkdir()
    install.register_plugin(tmp_path)
    code = (
        "import importlib.metadata as m, json; print(json.dumps({g: {e.name: e.value for e in m.entry_points(group=g)}"
        " for g in ('sglang.srt.plugins', 'sglang.srt.platforms')}))"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); {code}"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert json.loads(done.stdout) == {
        "sglang.srt.plugins": {"tgvkv": "tgvkv_sglang.sglang_seam.plugin:activate"},
        "sglang.srt.platforms": {"tgvkv_cpu": "tgvkv_sglang.sglang_seam.platform:activate"},
    }


def test_archives_name_nobody(tmp_path):
    info = pack.anonymous(tarfile.TarInfo("x"))
    assert (info.uid, info.gid, info.uname, info.gname) == (0, 0, "root", "root")


def test_a_part_in_the_checkout_must_be_ignored_by_git(tmp_path):
    pack.check_ignored(tmp_path)
    with pytest.raises(SystemExit, match="git does not ignore tools/here.*exclude"):
        pack.check_ignored(pack.ROOT / "tools" / "here")


def test_kernels_are_compiled_by_the_gpu_machines_python(monkeypatch, tmp_path):
    """Triton's cache is good for one build of Triton, and each version of Python has its own."""
    monkeypatch.setattr(modules, "PYTHON", "{}.{}".format(*sys.version_info))
    modules.check_python(sys.executable)
    monkeypatch.setattr(modules, "PYTHON", "2.7")
    with pytest.raises(SystemExit, match=r"\(3\.1\d\) cannot compile.*name a Python 2.7"):
        modules.check_python(sys.executable)
    with pytest.raises(SystemExit, match="No such file"):
        modules.check_python(tmp_path / "python")


def test_packing_begins_with_the_wrong_python_in_no_step(monkeypatch, tmp_path):
    monkeypatch.setattr(modules, "PYTHON", "2.7")
    monkeypatch.setattr(sys, "argv", ["pack", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="name a Python 2.7"):
        pack.main()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("tool", [pack, install, modules, verify])
def test_help_names_commands_that_exist(tool, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tool", "--help"])
    with pytest.raises(SystemExit) as ended:
        tool.main()
    said = capsys.readouterr().out
    assert ended.value.code == 0 and ("tools.airgap." in said or "tools/airgap/" in said)
    for path in re.findall(r"tools/airgap/[\w.]+", said):
        assert (pack.ROOT / path).is_file(), path


def test_what_is_copied_beside_the_packages_can_run_the_benchmark(tmp_path):
    install.copy_sources(tmp_path)
    code = "import bench.gpu.__main__ as run, sys; sys.exit(run.main(['--plan']))"
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}/src:{tmp_path}/src/triton_kernels"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "src", env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "short-memory" in done.stdout, done.stderr


def test_what_verify_runs_imports_what_there_is():
    for code in (verify.IMPORTS, verify.COMMANDS, verify.MODULES, verify.KERNELS):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in ("bench", "tools"):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names), node.module


def test_verify_asks_sglang_about_every_servers_arguments(tmp_path, monkeypatch, capsys):
    """With a stand-in for SGLang's own parser, which finds the flags of every server of the programme in order."""
    seen = []

    def parse(words):
        after = dict(zip(words, words[1:], strict=False))
        seen.append(after)
        assert "--mm-attention-backend=triton_attn" in words and after["--port"] == "30000"
        backend = after.get("--attention-backend", "fa3")  # SGLang picks that on an H200
        graphs = types.SimpleNamespace(decode=types.SimpleNamespace(backend="full"))
        return types.SimpleNamespace(attention_backend=backend, device="cuda",
                                     cuda_graph_config=graphs, disable_overlap_schedule=False,
                                     disable_radix_cache=False)  # fmt: skip

    for name, content in (("plugins", {"load_plugins": lambda: None}), ("server_args", {"prepare_server_args": parse})):
        monkeypatch.setitem(sys.modules, f"sglang.srt.{name}", types.SimpleNamespace(**content))
    for name in ("sglang", "sglang.srt"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setattr("bench.gpu.models.model_directory", lambda name, under: tmp_path)
    monkeypatch.setattr(sys, "argv", ["verify", str(tmp_path)])
    exec(verify.COMMANDS, {})
    servers = [server for part in gpu_programme() for server in part.servers]
    assert len(seen) == len(servers) and f"{len(servers)} servers" in capsys.readouterr().out
    assert {"--attention-backend" in after for after in seen} == {True, False}


# -- commands that outlive their session -------------------------------------------------------------------------------


def test_a_command_is_followed_to_its_end(tmp_path, capsys):
    keep, out = tmp_path / "keep", tmp_path / "out"
    code = f"import pathlib; print('measured'); pathlib.Path({str(keep)!r}, 'r.json').write_text('{{}}')"
    assert background.main([str(keep), "start", sys.executable, "-c", code]) == 0
    assert background.follow(keep, out, 60)
    assert "measured" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == ["r.json", "run.txt"]
    assert background.running(keep) is None


def test_a_second_command_is_refused_while_one_runs(tmp_path, capsys):
    pid = background.start(tmp_path, [sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        with pytest.raises(SystemExit, match=f"process {pid}"):
            background.start(tmp_path, ["true"])
        assert background.main([str(tmp_path), "follow", "--seconds", "0"]) == 0
        assert "still running" in capsys.readouterr().out
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_nothing_started_has_ended(tmp_path):
    assert background.follow(tmp_path, None, 60)
    with pytest.raises(SystemExit):
        background.main([str(tmp_path), "start"])
