"""The recipe of docs/evaluation.md: lmms-eval's own command line, our model and task, a live server.

Without lmms-eval only what the task asks, how it scores, and which options a request carries is tested.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import threading
import tomllib
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from bench import lmms_eval_boards
from tests.unit.demo.answers import answer
from tgvkv_sglang.demo.bundle import DEMO_MODEL
from tgvkv_sglang.demo.scenes import make_scene, render
from tgvkv_sglang.errors import ConfigError
from tgvkv_sglang.testing.server import launch
from training.demo_model import probes

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "lmms_eval"
TASKS = EXAMPLE / "tasks"
TURNS = 3
CHATS_OF_A_BOARD = TURNS  # rotations
LIMIT_S = 500
needs_lmms_eval = pytest.mark.skipif(
    importlib.util.find_spec("lmms_eval") is None, reason="needs lmms-eval: pip install -c constraints.txt '.[eval]'"
)


@pytest.fixture(scope="module")
def boards() -> ModuleType:
    """The task's functions, loaded as lmms-eval loads them: from the file beside the YAML."""
    spec = importlib.util.spec_from_file_location("boards", TASKS / "boards.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def plugin(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLE))
    return importlib.import_module("tgvkv_lmms_eval")


def lines() -> list[dict]:
    return [json.loads(line) for line in (TASKS / "boards.jsonl").read_text(encoding="utf-8").splitlines()]


# -- the task --------------------------------------------------------------------------------------------------------


def test_the_boards_are_held_out_and_their_answers_true():
    assert (TASKS / "boards.jsonl").read_text(encoding="utf-8") == lmms_eval_boards.text()
    assert len({board["seed"] for board in lines()}) == len(lines()) == lmms_eval_boards.BOARDS
    for board in lines():
        assert board["seed"] >= probes._SCENE_SEEDS, "no training run draws these"
        assert len(set(board["questions"])) == TURNS
        assert board["answers"] == [answer(make_scene(board["seed"]), question) for question in board["questions"]]


def test_every_question_comes_once_in_every_turn(boards):
    for board in lines():
        documents = boards.rotations(board)
        assert [doc["turn"] for doc in documents] == [*range(1, TURNS + 1)] * CHATS_OF_A_BOARD
        asked = Counter((boards.question(doc), doc["turn"]) for doc in documents)
        assert asked == {(question, turn): 1 for question in board["questions"] for turn in range(1, TURNS + 1)}
        truth = dict(zip(board["questions"], board["answers"], strict=True))
        for before, doc in zip(documents, documents[1:], strict=False):
            assert [truth[question] for question in doc["questions"]] == doc["answers"]
            if doc["turn"] > 1:
                assert doc["questions"][:-1] == before["questions"], "a turn follows the turn before it"


def test_a_chat_shows_the_picture_once_and_never_the_answer(boards):
    board = lines()[0]
    for doc in boards.rotations(board):
        chat = boards.messages(doc)
        assert [message["role"] for message in chat] == ["user", "assistant"] * (doc["turn"] - 1) + ["user"]
        (image,) = [part["url"] for message in chat for part in message["content"] if part["type"] == "image"]
        assert chat[0]["content"][0]["url"] is image
        assert image.tobytes() == render(make_scene(board["seed"])).tobytes()
        words = [part["text"] for message in chat for part in message["content"] if part["type"] == "text"]
        said = [word for pair in zip(doc["questions"], doc["answers"], strict=True) for word in pair]
        assert words == said[:-1]


@pytest.mark.parametrize(
    ("said", "share"), [(" 5 6 8\n", 1), ("5 8 6", 0), ("5 6", 0), ("5 6 8 8", 0), ("", 0)], ids=repr
)
def test_an_answer_is_right_word_for_word(boards, said, share):
    doc = {"answers": ["red", "5 6 8"], "turn": 2}
    assert boards.score(doc, [said]) == {"exact": share, "turn_2": share}


# -- what a request carries ------------------------------------------------------------------------------------------


def test_options_that_are_given_are_sent(plugin):
    own = plugin.extra_body(retention=0.05, policy="tgv", budget=None)
    assert own == {"custom_params": {"tgvkv_retention": 0.05, "tgvkv_policy": "tgv"}}
    assert plugin.extra_body(retention=None, policy=None, budget=None) == {}


@pytest.mark.parametrize(
    ("option", "value"), [("retention", 1.5), ("retention", "5%"), ("policy", "best"), ("budget", "most"), ("keep", 1)]
)
def test_what_the_server_would_refuse_is_refused_before_anything_is_asked(plugin, option, value):
    with pytest.raises(ConfigError, match=f"tgvkv_{option}"):
        plugin.extra_body(**{option: value})


class Endpoint(ThreadingHTTPServer):
    """Answers every chat with the number of its messages, or with ``status``; keeps what it was sent."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.bodies: list[dict] = []
        self.status = 200
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Endpoint

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        message = {"role": "assistant", "content": str(len(body["messages"]))}
        reply = {"id": "1", "object": "chat.completion", "created": 1, "model": body["model"],
                 "choices": [{"index": 0, "finish_reason": "stop", "message": message}]}  # fmt: skip
        data = json.dumps(reply if self.server.status == 200 else {"error": {"message": "no such policy"}}).encode()
        self.send_response(self.server.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def endpoint():
    with Endpoint() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def requests_of(model, boards) -> list[SimpleNamespace]:
    """What lmms-eval hands a model for the documents of one board."""
    documents = boards.rotations(lines()[0])
    model.task_dict = {"tgvkv_boards": {"test": documents}}
    return [
        SimpleNamespace(args=(boards.question(doc), boards.messages, {"max_new_tokens": 8}, i, "tgvkv_boards", "test"))
        for i, doc in enumerate(documents)
    ]


@needs_lmms_eval
def test_each_request_carries_the_options_in_the_order_of_the_documents(plugin, boards, endpoint):
    model = importlib.import_module("tgvkv_lmms_eval.model").TgvkvChat.create_from_arg_string(
        f"base_url={endpoint.url},retention=0.05,budget=uniform,num_cpus=1", {"batch_size": 1, "device": "cpu"}
    )
    requests = requests_of(model, boards)
    answers = model.generate_until(requests)
    assert [answer.text for answer in answers] == ["1", "3", "5"] * CHATS_OF_A_BOARD
    asked = [body["messages"][-1]["content"][-1]["text"] for body in endpoint.bodies]
    assert asked == [request.args[0] for request in requests]
    for body in endpoint.bodies:
        assert body["custom_params"] == {"tgvkv_retention": 0.05, "tgvkv_budget": "uniform"}
        assert body["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")


@needs_lmms_eval
def test_a_request_without_an_answer_is_no_wrong_answer(plugin, boards, endpoint):
    model = importlib.import_module("tgvkv_lmms_eval.model").TgvkvChat(
        base_url=endpoint.url, max_retries=1, retry_backoff_s=0
    )
    endpoint.status = 400
    with pytest.raises(RuntimeError, match="9 of 9 requests got no answer.*no such policy"):
        model.generate_until(requests_of(model, boards))


@needs_lmms_eval
def test_a_misspelt_argument_is_refused(plugin):
    with pytest.raises(ConfigError, match="'retenton'.*retention"):
        importlib.import_module("tgvkv_lmms_eval.model").TgvkvChat(retenton=0.05)


# -- all of it -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> dict[str, str]:
    """Environment in which lmms-eval finds the plugin as if it had been installed, and no network."""
    directory = tmp_path_factory.mktemp("installed")
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    points = project["entry-points"]["lmms_eval.models"]
    metadata = directory / "tgvkv_lmms_eval-0.1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: 0.1\n")
    text = "".join(f"{name} = {value}\n" for name, value in points.items())
    (metadata / "entry_points.txt").write_text(f"[lmms_eval.models]\n{text}")
    paths = [directory, EXAMPLE, ROOT, ROOT / "triton_kernels", os.environ.get("PYTHONPATH", "")]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(directory / "hf")}
    return {**os.environ, **offline, "PYTHONPATH": os.pathsep.join(str(path) for path in paths if str(path))}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Keeps next to nothing of a picture unless a request says otherwise."""
    flags = ("--attention-backend", "tgvkv", "--tgvkv-retention", "0.005")
    with launch(DEMO_MODEL, tmp_path_factory.mktemp("lmms_eval"), *flags) as server:
        yield server


def evaluate(server, env: dict[str, str], out: Path, options: str = "") -> dict[str, float]:
    """Scores of lmms-eval's command line for the first board."""
    command = [sys.executable, "-m", "lmms_eval", "--model", "tgvkv", "--include_path", str(TASKS)]
    command += ["--model_args", f"base_url={server.url}/v1,num_cpus=1{options}", "--tasks", "tgvkv_boards"]
    command += ["--limit", str(TURNS * CHATS_OF_A_BOARD), "--output_path", str(out), "--log_samples"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=LIMIT_S, cwd=out)
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    (file,) = out.rglob("*_results.json")
    (samples,) = out.rglob("*_samples_tgvkv_boards.jsonl")
    assert len(samples.read_text(encoding="utf-8").splitlines()) == TURNS * CHATS_OF_A_BOARD
    results = json.loads(file.read_text(encoding="utf-8"))["results"]["tgvkv_boards"]
    return {name.partition(",")[0]: value for name, value in results.items() if name.endswith(",none")}


@needs_lmms_eval
@pytest.mark.server
def test_a_request_with_the_whole_picture_is_right_where_the_servers_own_retention_is_not(server, installed, tmp_path):
    """The options that lmms-eval sends reach the selection: the same nine questions, right with them, wrong without."""
    (tmp_path / "full").mkdir()
    (tmp_path / "few").mkdir()
    full = evaluate(server, installed, tmp_path / "full", ",retention=1.0")
    few = evaluate(server, installed, tmp_path / "few")
    turns = [full[f"turn_{turn}"] for turn in range(1, TURNS + 1)]
    assert full["exact"] == pytest.approx(sum(turns) / TURNS) and full["exact"] >= 8 / 9
    assert few["exact"] <= 5 / 9
