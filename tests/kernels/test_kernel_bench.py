"""The kernel benchmark's cases are right at small sizes, so that GPU time is not spent on finding that out."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmark import SMALL, all_cases

SCRIPT = Path(__file__).resolve().parents[2] / "triton_kernels" / "benchmark.py"


def check_cases(backend):
    torch.manual_seed(0)
    names = set()
    for case in all_cases(SMALL, "cpu", backend):
        names.add(case.kernel)
        error = case.error()
        assert error <= case.tolerance, f"{case.kernel} {case.shape}: error {error}"
        assert case.bytes > 0
        assert case.moved is None or case.moved >= case.bytes
        case.run()
        case.torch_run()
    return names


def test_cases_agree_under_the_interpreter(interpreted):
    assert interpreted(check_cases, "triton") == {
        "view_attention",
        "batch_scores",
        "batch_peak_scores",
        "stash_rows",
        "select_batch",
        "pack_units",
        "dense_rows",
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="the refusal is for machines without CUDA; this one has it")
def test_refuses_without_cuda():
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True)
    assert done.returncode == 1 and "torch sees no CUDA device here" in done.stderr
