"""What every api shares: no Triton on import, dispatch, errors, LSE bases, bfloat16 in the interpreter."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tgvkv_kernels.batch_scores.api import batch_text_weights, batch_vision_scores
from tgvkv_kernels.batch_scores.plan import ScorePlan
from tgvkv_kernels.common.checks import check_units
from tgvkv_kernels.common.errors import KernelBackendError, KernelInputError
from tgvkv_kernels.common.interpreter import bf16_bits_to_f32, f32_to_bf16_bits
from tgvkv_kernels.common.lse import merge_by_lse
from tgvkv_kernels.view_attention import view_attention

from tests.kernels.kernel_support import generator, normal

KERNEL_ROOT = Path(__file__).resolve().parents[2] / "triton_kernels"
COLD_IMPORT = """
import sys
sys.modules["triton"] = None  # any import of Triton raises
import importlib, pkgutil, torch, tgvkv_kernels
for module in pkgutil.walk_packages(tgvkv_kernels.__path__, "tgvkv_kernels."):
    if module.name.rsplit(".", 1)[-1] not in ("kernel", "launch", "tiles"):
        importlib.import_module(module.name)
from tgvkv_kernels.view_attention import view_attention
flat = torch.ones(3, 1, 4)
out, lse_b2 = torch.zeros(1, 2, 4), torch.full((1, 2), float("-inf"))
view_attention(out + 1, flat, flat, torch.tensor([0, 2]), torch.tensor([0, 2]), None, 0.5, out, lse_b2)
assert torch.equal(out, torch.ones(1, 2, 4)), out
print("cold")
"""


def test_import_and_cpu_path_without_triton():
    done = subprocess.run([sys.executable, "-c", COLD_IMPORT], cwd=KERNEL_ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "cold", done.stderr


def test_references_are_imported_by_apis_and_references_only():
    """What defines correctness must not be made of what it judges, nor the other way round."""
    importers = {
        path.relative_to(KERNEL_ROOT).parts[-1]
        for path in KERNEL_ROOT.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.Import, ast.ImportFrom)) and "reference" in ast.unparse(node)
    }
    assert importers == {"api.py"}, importers


def score_case(tokens=3, vision=4):
    """Plan, stash, keys and slots of one small request."""
    plan = ScorePlan([torch.arange(vision, vision + tokens)], [torch.arange(vision)], 4, 2, 8, torch.float32, "cpu")
    q, lse = torch.zeros(1, tokens, 4, 8), torch.zeros(1, tokens, 4)
    return plan, q, lse, torch.zeros(5, 2, 8), torch.arange(tokens)


def test_triton_on_cpu_needs_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    case = score_case()
    with pytest.raises(KernelBackendError, match="TRITON_INTERPRET=1"):
        batch_text_weights(*case, 0, 5, 1.0, backend="triton")
    with pytest.raises(KernelInputError, match="backend='cuda'"):
        batch_text_weights(*case, 0, 5, 1.0, backend="cuda")


def test_score_errors_name_the_value():
    plan, q, lse, k, slots = score_case()
    with pytest.raises(KernelInputError, match=r"lse_b2 has shape \[1, 3, 3\], expected \[1, 3, 4\]"):
        batch_text_weights(plan, q, lse[..., :3].contiguous(), k, slots, 0, 5, 1.0)
    with pytest.raises(KernelInputError, match="4 query heads cannot share 3"):
        batch_text_weights(plan, q, lse, torch.zeros(5, 3, 8), slots, 0, 5, 1.0)
    with pytest.raises(KernelInputError, match="total_q_heads=2"):
        batch_text_weights(plan, q, lse, k, slots, 0, 5, 1.0, total_q_heads=2)
    with pytest.raises(
        KernelInputError, match="k_flat has dtype torch.float16, expected one of: torch.float32, torch.float8_e4m3fn"
    ):
        batch_text_weights(plan, q, lse, k.half(), slots, 0, 5, 1.0)
    with pytest.raises(KernelInputError, match=r"slots -1\.\.5 lie outside 0\.\.4"):
        batch_vision_scores(plan, q, lse, torch.zeros(1, 3), k, torch.tensor([-1, 5, 0, 1]), 0, 5, 1.0)
    with pytest.raises(KernelInputError, match="lie outside the storage"):
        batch_text_weights(plan, q, lse, k, slots, 1, 5, 1.0)


def test_view_attention_errors_name_the_value():
    q, flat, units, lse = torch.zeros(2, 4, 8), torch.zeros(5, 2, 8), torch.arange(3), torch.zeros(2, 4)
    with pytest.raises(KernelInputError, match=r"indptr=\[0, 4, 3\] must ascend"):
        view_attention(q, flat, flat, units, torch.tensor([0, 4, 3]), None, 1.0, q, lse)
    with pytest.raises(KernelInputError, match=r"expected \[1, 4, 8\]"):
        view_attention(q, flat, flat, units, torch.tensor([0, 3]), None, 1.0, q, lse)
    with pytest.raises(KernelInputError, match=r"lse_b2 has shape \[2\], expected \[2, 4\]"):
        view_attention(q, flat, flat, units, torch.tensor([0, 1, 3]), None, 1.0, q, torch.zeros(2))
    with pytest.raises(KernelInputError, match="out has dtype torch.float16, expected one of: torch.float32$"):
        view_attention(q, flat, flat, units, torch.tensor([0, 1, 3]), None, 1.0, q.half(), lse)
    with pytest.raises(
        KernelInputError, match="v_flat has dtype torch.float16, expected one of: torch.float32, torch.float8_e4m3fn"
    ):
        view_attention(q, flat, flat.half(), units, torch.tensor([0, 1, 3]), None, 1.0, q, lse)


def test_int32_units_only_below_2_to_31():
    units = torch.zeros(1, dtype=torch.int32)
    check_units("units", units, 2**31)
    with pytest.raises(KernelInputError, match="use int64"):
        check_units("units", units, 2**31 + 1)
    check_units("units", units.long(), 2**31 + 1)


def test_merge_by_lse_is_attention_over_the_union():
    logits = normal(generator(2), 1, 1, 7, dtype=torch.float64)
    values = normal(generator(3), 7, 5, dtype=torch.float64)
    parts = [(logits[..., s].softmax(-1) @ values[s], logits[..., s].logsumexp(-1)) for s in (slice(3), slice(3, 7))]
    out, lse_e = merge_by_lse(*parts[0], *parts[1])
    torch.testing.assert_close(out, logits.softmax(-1) @ values)
    torch.testing.assert_close(lse_e, logits.logsumexp(-1))
    empty = (torch.full((1, 1, 5), float("nan"), dtype=torch.float64), torch.full((1, 1), float("-inf")).double())
    for merged in (merge_by_lse(*parts[0], *empty), merge_by_lse(*empty, *parts[0])):
        torch.testing.assert_close(merged[0], parts[0][0])
        torch.testing.assert_close(merged[1], parts[0][1])
    out, lse_e = merge_by_lse(*empty, *empty)
    assert bool((out == 0).all()) and bool((lse_e == float("-inf")).all())


def test_bfloat16_conversions_of_the_interpreter_equal_torch():
    values = torch.cat(
        [
            normal(generator(4), 5000) * torch.exp2(torch.arange(5000) % 250 - 125.0),
            torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan"), 3.4e38, 1e-45, 1.00390625, 1.01171875]),
        ]
    )
    expected = values.to(torch.bfloat16)
    bits = torch.from_numpy(f32_to_bf16_bits(values.numpy())).view(torch.bfloat16)
    torch.testing.assert_close(bits, expected, rtol=0, atol=0, equal_nan=True)
    back = torch.from_numpy(bf16_bits_to_f32(expected.view(torch.uint16).numpy()))
    torch.testing.assert_close(back, expected.float(), rtol=0, atol=0, equal_nan=True)
