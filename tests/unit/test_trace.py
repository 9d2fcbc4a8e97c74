"""Traces read back as written; a request id is never a path, no file is overwritten, a failure costs only itself."""

import errno
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tgvkv_sglang import trace
from tgvkv_sglang.trace import file_stem, read_trace, try_write_trace, write_trace

ARRAYS = {"kept": np.eye(3, dtype=bool), "scores": np.linspace(0, 1, 6, dtype=np.float32).reshape(2, 3)}
META = {"rid": "x", "retention": 0.1}
NASTY = ["../../etc/passwd", "/abs/path", "..", ".", "", "a/b", "a\\b", "a\0b", "x" * 5000, "ü", "\ud800", "con:"]


def test_round_trip(tmp_path):
    path = write_trace(tmp_path / "new" / "folder", "r-1_A", 0, ARRAYS, META)
    assert path == tmp_path / "new" / "folder" / "r-1_A.0.npz"
    arrays, meta = read_trace(path)
    assert meta == META and arrays.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert arrays[name].dtype == array.dtype and np.array_equal(arrays[name], array)


@pytest.mark.parametrize("rid", NASTY)
def test_a_request_id_never_leaves_the_folder(tmp_path, rid):
    folder = tmp_path / "traces"
    path = write_trace(folder, rid, 3, ARRAYS, META)
    assert path.parent == folder and path.resolve().parent == folder.resolve()
    assert [p.name for p in tmp_path.iterdir()] == ["traces"] and len(list(folder.iterdir())) == 1


@given(st.text(st.characters(exclude_categories=()), max_size=200))
def test_file_stem_is_harmless(rid):
    stem = file_stem(rid)
    assert re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}", stem)


def test_ids_that_clean_alike_get_different_names():
    assert len({file_stem(rid) for rid in ("a/b", "a\\b", "a b", "a_b", "a.b")}) == 5
    assert file_stem("x" * 81) != file_stem("x" * 82)


def test_an_existing_file_is_never_overwritten(tmp_path):
    (tmp_path / "r.0.npz").write_bytes(b"mine")
    (tmp_path / "r.1.npz").symlink_to(tmp_path / "elsewhere")
    assert write_trace(tmp_path, "r", 0, ARRAYS, META).name == "r.2.npz"
    assert (tmp_path / "r.0.npz").read_bytes() == b"mine" and not (tmp_path / "elsewhere").exists()


def test_meta_is_json(tmp_path):
    with np.load(write_trace(tmp_path, "r", 0, ARRAYS, META), allow_pickle=False) as data:
        assert json.loads(str(data["meta"])) == META


def test_a_full_disk_costs_the_trace_alone(tmp_path, monkeypatch, caplog):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(trace.os, "open", full)
        assert try_write_trace(tmp_path, "r", 0, ARRAYS, META) is None
    assert "No space left" in caplog.text and "the request goes on" in caplog.text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the always-full device of Linux")
def test_a_disk_that_fills_up_while_writing_leaves_no_partial_file(tmp_path, monkeypatch):
    really_open = os.open

    def onto_the_full_device(path, flags, mode=0o777):
        os.close(really_open(path, flags, mode))
        return really_open("/dev/full", os.O_WRONLY)

    with monkeypatch.context() as patch:
        patch.setattr(trace.os, "open", onto_the_full_device)
        with pytest.raises(OSError) as error:
            write_trace(tmp_path, "r", 0, ARRAYS, META)
    assert error.value.errno == errno.ENOSPC and list(tmp_path.iterdir()) == []


def test_a_folder_that_is_a_file_costs_the_trace_alone(tmp_path, caplog):
    (tmp_path / "file").write_text("not a folder")
    assert try_write_trace(tmp_path / "file", "r", 0, ARRAYS, META) is None
    assert "could not be written" in caplog.text
    with pytest.raises(OSError, match="file"):
        write_trace(tmp_path / "file", "r", 0, ARRAYS, META)
