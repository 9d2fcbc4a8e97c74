"""The examples, run as a user runs them, against a live server."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.server
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
LIMIT_S = 600


def run(name: str, *arguments: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "TORCH_COMPILE_DISABLE": "1"}
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=LIMIT_S)


def questions_and_answers(output: str) -> tuple[list[str], list[str]]:
    """Lines of ``> question`` and everything between them."""
    blocks = output.split("\n> ")
    assert blocks[0].startswith("> "), output
    blocks[0] = blocks[0][2:]
    questions, answers = zip(*(block.split("\n", 1) if "\n" in block else (block, "") for block in blocks), strict=True)
    return list(questions), [answer.strip() for answer in answers]


def ended_well(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}\n{done.stderr[-4000:]}"
    return done.stdout.strip()


def test_openai_client(tgvkv_server):
    output = ended_well(run("openai_multi_turn.py", "--base-url", tgvkv_server.url))
    questions, answers = questions_and_answers(output)
    assert questions == ["what color is number 1?", "read the numbers in the first row.", "list the green objects."]
    prompts = [int(answer.rsplit("[", 1)[1].split()[0]) for answer in answers]
    assert prompts == sorted(set(prompts)), "each turn's prompt holds the ones before"
    assert prompts[0] > 256, "the 512 x 512 px picture alone is 256 tokens"


def test_openai_client_with_its_own_retention(tgvkv_server):
    flags = ("--base-url", tgvkv_server.url, "--retention", "0.2", "--policy", "peak-last", "--question", "a?")
    questions, _ = questions_and_answers(ended_well(run("openai_multi_turn.py", *flags)))
    assert questions == ["a?"]


def test_openai_client_reports_a_refused_retention(tgvkv_server):
    done = run("openai_multi_turn.py", "--base-url", tgvkv_server.url, "--retention", "1.5")
    assert done.returncode != 0
    assert "tgvkv_retention" in done.stderr and "1.5" in done.stderr


def test_requests_alone(tgvkv_server):
    output = ended_well(run("requests_multi_turn.py", "--base-url", tgvkv_server.url))
    questions, _ = questions_and_answers(output)
    assert questions == ["what shape is number 1?", "list the objects in the first row.", "where is number 1?"]


def test_sglang_frontend_with_a_fork(tgvkv_server):
    output = ended_well(run("sglang_frontend.py", "--base-url", tgvkv_server.url, "--max-tokens", "12"))
    questions, _ = questions_and_answers(output)
    assert questions == [
        "what color is number 1?",
        "where is number 1?",
        "read the numbers in the first row.",
        "how many red objects?",
        "list the purple objects.",
    ]


def test_no_server_is_a_failure_that_says_so():
    done = run("requests_multi_turn.py", "--base-url", "http://127.0.0.1:9")
    assert done.returncode != 0
    assert "cannot be reached" in done.stderr
