"""The command line without SGLang: defaults filled in, help, trace summaries, drawings."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from tgvkv_sglang.cli.client import ChatError, Conversation, image_part
from tgvkv_sglang.cli.demo_view import Column, Turn, turn_table
from tgvkv_sglang.cli.inspect_trace import span_grids
from tgvkv_sglang.cli.kept import BARS, Kept, bar, human_bytes, kv_unit_bytes, read_kept
from tgvkv_sglang.cli.main import main
from tgvkv_sglang.cli.serve import CPU_FLAGS, complete, server_environment
from tgvkv_sglang.config import REQUEST_OPTIONS, TgvConfig
from tgvkv_sglang.demo.bundle import DEMO_MODEL
from tgvkv_sglang.demo.questions import Question
from tgvkv_sglang.flags import FLAGS
from tgvkv_sglang.sglang_seam.ledger import SGLANG_VERSION
from tgvkv_sglang.trace import write_trace

# -- serve -----------------------------------------------------------------------------------------------------------


def test_nothing_given_on_a_cpu_machine_serves_the_bundled_model():
    out = complete([], cuda=False)
    assert out[:4] == ["--model-path", str(DEMO_MODEL), "--attention-backend", "tgvkv"]
    assert out[4 : 4 + len(CPU_FLAGS)] == list(CPU_FLAGS)


def test_the_cpu_flags_are_those_that_the_readme_tells_for_a_plain_sglang_serve():
    assert " ".join(CPU_FLAGS) in " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())


def test_nothing_is_added_for_a_gpu_but_the_backend():
    assert complete(["--model-path", "m"], cuda=True) == ["--model-path", "m", "--attention-backend", "tgvkv"]


@pytest.mark.parametrize("model", [["m"], ["--model-path", "m"], ["--model=m"], ["--model-path=m"], ["--config", "c"]])
def test_a_given_model_is_never_replaced(model):
    out = complete(model, cuda=False)
    assert out[: len(model)] == model
    assert str(DEMO_MODEL) not in out and "--max-total-tokens" not in out


def test_given_flags_win_in_either_spelling():
    given = ["--model-path", "m", "--dtype=bfloat16", "--page-size", "1", "--attention-backend", "torch_native"]
    out = complete(given, cuda=False)
    assert out[: len(given)] == given
    assert [a for a in out if a.startswith(("--dtype", "--page-size", "--attention-backend"))] == [
        "--dtype=bfloat16", "--page-size", "--attention-backend",
    ]  # fmt: skip


@pytest.mark.parametrize(("device", "cuda", "expected"), [("cpu", True, True), ("cuda", False, False)])
def test_device_decides_before_what_the_machine_has(device, cuda, expected):
    assert ("--disable-cuda-graph" in complete(["m", "--device", device], cuda)) is expected


def test_unknown_flags_pass_through_in_order():
    given = ["m", "--foo", "1", "--tgvkv-retention", "0.05", "--bar"]
    assert complete(given, cuda=True)[: len(given)] == given


def test_torch_compile_is_switched_off_on_the_cpu_alone_and_a_users_choice_stays():
    assert server_environment(["--device", "cpu"], {})["TORCH_COMPILE_DISABLE"] == "1"
    assert server_environment(["--device", "cpu"], {"TORCH_COMPILE_DISABLE": "0"})["TORCH_COMPILE_DISABLE"] == "0"
    assert "TORCH_COMPILE_DISABLE" not in server_environment(["m"], {})


def test_serve_help_lists_every_flag(capsys):
    assert main(["serve", "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(flag.option in shown for flag in FLAGS)


def test_help_imports_neither_sglang_nor_torch():
    code = (
        "import sys\nfrom tgvkv_sglang.cli.main import main\n"
        "for argv in (['--help'], ['demo', '--help'], ['serve', '--help']):\n"
        "    try: main(argv)\n    except SystemExit as end: assert end.code == 0\n"
        "print(sorted({'sglang', 'torch', 'transformers', 'triton'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_version_and_unknown_command(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0 and "tgvkv-sglang" in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        main(["nonsense"])
    assert end.value.code == 2


@pytest.mark.parametrize(
    ("argv", "named"),
    [(["--turns", "0"], "--turns"), (["--retention", "1.5"], "--retention"), (["--retention", "1.0"], "--retention")],
)
def test_demo_refuses_bad_values_before_starting_anything(argv, named, capsys, tmp_path):
    assert main(["demo", *argv, "--out", str(tmp_path / "out")]) == 2
    assert named in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# -- client ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def echo_server():
    """Answers with the number of messages it got; refuses ``custom_params`` that hold ``bad``."""
    seen: list[dict] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append(body)
            if "bad" in body.get("custom_params", {}):
                self.send_error(400, "no such option")
                return
            usage = {"prompt_tokens": 7, "prompt_tokens_details": {"cached_tokens": 3}}
            text = f" {len(body['messages'])} messages "
            reply = {"id": "r1", "choices": [{"message": {"content": text}}], "usage": usage}
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(reply).encode())

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", seen
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def png(tmp_path):
    path = tmp_path / "picture.png"
    Image.new("RGB", (4, 4), "red").save(path)
    return path


def test_a_conversation_sends_the_picture_once_and_its_own_answers(echo_server, png):
    url, seen = echo_server
    talk = Conversation(url, png, {"tgvkv_retention": 0.05})
    assert talk.ask("one?").text == "1 messages"
    reply = talk.ask("two?")
    assert (reply.text, reply.prompt_tokens, reply.cached_tokens, reply.rid) == ("3 messages", 7, 3, "r1")
    last = seen[-1]
    assert last["custom_params"] == {"tgvkv_retention": 0.05} and last["temperature"] == 0
    kinds = [[part["type"] for part in m["content"]] for m in last["messages"] if m["role"] == "user"]
    assert kinds == [["image_url", "text"], ["text"]]
    assert last["messages"][1] == {"role": "assistant", "content": " 1 messages "}


def test_a_refusal_leaves_the_conversation_as_it_was(echo_server, png):
    talk = Conversation(echo_server[0], png, {"bad": 1})
    with pytest.raises(ChatError, match="400"):
        talk.ask("one?")
    assert talk.messages == []


def test_no_server_and_no_image_are_told_plainly(png, tmp_path):
    with pytest.raises(ChatError, match="tgvkv serve"):
        Conversation("http://127.0.0.1:9", png).ask("one?")
    with pytest.raises(ChatError, match="missing.png"):
        image_part(tmp_path / "missing.png")


# -- what was kept ---------------------------------------------------------------------------------------------------


@pytest.fixture
def trace(tmp_path):
    """Two layers over a 2 x 3 token image at positions 2..8 and one token of text grounding."""
    kept = np.array([[1, 0, 0, 0, 0, 1], [0, 1, 1, 0, 1, 0]], bool)
    arrays = {
        "token_ids": np.arange(10), "spans": np.array([(0, 0, 2), (1, 2, 8), (0, 8, 10)]),
        "vision_positions": np.arange(2, 8), "grounding_positions": np.array([8, 9]),
        "text_weights": np.ones((2, 2)), "scores": np.arange(12.0).reshape(2, 6),
        "layer_mass": np.array([1.0, 3.0]), "budget": np.array([2, 3]), "kept": kept,
    }  # fmt: skip
    meta = {"rid": "abc", "retention": 0.4, "scope": "vision", "policy": "tgv", "grids": [[1, 4, 6]]}
    return write_trace(tmp_path, "abc", 0, arrays, meta)


def test_kept_is_read_by_request_id(trace):
    kept = read_kept(trace.parent, "abc", 0.0)
    assert kept == Kept((2, 3), 6) and kept.units == 5 and kept.full_units == 12
    assert read_kept(trace.parent, "other", 0.0) is None
    assert read_kept(None, "abc", 0.0) is None


def test_unit_bytes_follow_the_model_config():
    text = json.loads((DEMO_MODEL / "config.json").read_text())["text_config"]
    assert kv_unit_bytes(DEMO_MODEL) == 2 * text["num_key_value_heads"] * text["head_dim"] * 4


def test_bars_and_bytes():
    assert [bar(n, 8) for n in (0, 1, 4, 8)] == [BARS[0], BARS[1], BARS[4], BARS[8]]
    assert bar(1, 10_000) == BARS[1] and bar(0, 0) == BARS[0]
    assert [human_bytes(n) for n in (1023, 1536, 3 * 2**20)] == ["1023 B", "1.5 KiB", "3.0 MiB"]


def test_a_turn_without_a_selection_shows_the_last_one(png):
    column = Column("5 %", Conversation("http://127.0.0.1:9", png), png.parent)
    column.see(Kept((2, 3), 6))
    column.see(None)
    assert column.kept == Kept((2, 3), 6, fresh=False)


def test_turn_table_says_what_was_kept_and_what_is_right(png):
    from tgvkv_sglang.cli.client import Reply

    talk = Conversation("http://127.0.0.1:9", png)
    columns = [Column("all", talk, None), Column("some", talk, png.parent)]
    turns = [Turn(Reply("a", "red", 20, 5), True, None), Turn(Reply("b", "blue", 20, 6), False, Kept((2, 3), 6))]
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(turn_table(1, Question("color", "what color?", "red"), columns, turns, unit_bytes=1024))
    shown = console.export_text()
    for text in ("what color?", "✓ red", "✗ blue", "of 6 each", "12.0 KiB (100 %)", "12.0 KiB → 5.0 KiB (41.7%)"):
        assert text in shown


def test_inspect_prints_and_draws(trace, png, tmp_path, capsys):
    out = tmp_path / "map.png"
    assert main(["inspect", str(trace), "--image", str(png), "-o", str(out)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "retention 0.4" in shown and "5 of 12 units" in shown and "75.0%" in shown
    with Image.open(out) as image:
        assert image.width > 100 and len(np.unique(np.asarray(image))) > 10


def test_inspect_summarises_several_and_draws_one(trace, tmp_path, capsys):
    assert main(["inspect", str(trace), str(trace)]) == 0
    assert capsys.readouterr().out.count("5 of 12") == 2
    assert main(["inspect", str(trace), str(trace), "-o", str(tmp_path / "map.png")]) == 2
    assert not (tmp_path / "map.png").exists()


def test_inspect_refuses_what_is_no_trace(png, tmp_path, capsys):
    assert main(["inspect", str(png)]) == 2
    np.savez(tmp_path / "other.npz", a=np.ones(2), meta=np.array("{}"))
    assert main(["inspect", str(tmp_path / "other.npz")]) == 2
    said = capsys.readouterr().err.splitlines()
    assert [line.split(" is no ")[0] for line in said] == [f"tgvkv: {png}", f"tgvkv: {tmp_path / 'other.npz'}"]


def test_token_grids_of_two_images_and_one_without_a_grid():
    arrays = {
        "spans": np.array([(1, 0, 6), (0, 6, 7), (1, 7, 11), (1, 11, 14)]),
        "vision_positions": np.array([*range(6), *range(7, 11), *range(11, 14)]),
    }
    assert span_grids(arrays, {"grids": [[1, 4, 6], [2, 2, 4]]}) == [
        (slice(0, 6), (2, 3)), (slice(6, 10), (2, 2)), (slice(10, 13), (1, 3)),
    ]  # fmt: skip


# -- what is written down --------------------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parents[3]


def test_the_hooks_page_is_the_ledger():
    spec = importlib.util.spec_from_file_location("make_hooks", ROOT / "docs" / "make_hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "docs" / "hooks.md").read_text() == module.page(), "run: python docs/make_hooks.py"


def test_the_readme_has_every_flag_with_its_default_and_every_request_option():
    readme = (ROOT / "README.md").read_text()
    for flag in FLAGS:
        default = getattr(TgvConfig(), flag.field)
        shown = {type(None): "none", bool: "off"}.get(type(default), default)
        assert f"| `{flag.option}` | {shown} |" in readme
    for option in REQUEST_OPTIONS:
        assert f"| `{option}` |" in readme


def test_links_of_the_documentation_exist():
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_constraints_are_names_and_versions_and_pin_the_same_sglang():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pin = re.compile(r"[a-z0-9-]+==[0-9a-z.]+( ; python_version (<|>=) '3\.12')?")
    assert all(pin.fullmatch(line) for line in lines if not line.startswith("#"))
    assert f"sglang=={SGLANG_VERSION}" in lines
