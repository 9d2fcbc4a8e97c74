"""Each kernel on a CUDA machine: correct first, then its time against the roofline and against torch.

Needs torch and triton; nothing else of this project and no SGLang.
The roof of a case is ``max(bytes / copy bandwidth, flops / matmul rate)``, both measured here; bytes are
those of README.md here. Times are of CUDA graph replays with a cold L2 (`triton.testing.do_bench`).

    python triton_kernels/benchmark.py --commit $(git rev-parse HEAD) --out kernels.json
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Callable, Iterator

import torch
from tgvkv_kernels.batch_scores import ScorePlan, batch_text_weights, batch_vision_scores
from tgvkv_kernels.dense_rows import dense_rows
from tgvkv_kernels.pack_units import pack_units
from tgvkv_kernels.select import select
from tgvkv_kernels.text_weights import text_weights
from tgvkv_kernels.view_attention import view_attention
from tgvkv_kernels.vision_scores import vision_scores


@dataclass(frozen=True)
class Sizes:
    """Model and load; the default is Qwen3-VL-8B (LLaVA-NeXT-Mistral-7B has the same heads)."""

    layers: int = 36
    q_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    rows: int = 2**20  # units of the flat storage: 2 GiB each of K and V
    vision: tuple[int, ...] = (1024, 4096, 16384)
    text: tuple[int, ...] = (32, 256, 1024)
    batch: tuple[int, ...] = (1, 16, 64)
    kept: tuple[int, ...] = (51, 205, 819)  # units of a layer's view: 5 % of each of `vision`

    @property
    def row_bytes(self) -> int:
        return self.kv_heads * self.head_dim * self.dtype.itemsize


MAIN = Sizes(vision=(4096,), text=(256,), batch=(1, 16, 64), kept=(205,))
SMALL = Sizes(3, 4, 2, 64, torch.bfloat16, 400, (40,), (9,), (1, 3), (7,))


@dataclass(frozen=True)
class Case:
    """``run`` and ``torch_run`` return nothing; ``error`` compares the kernel with the reference (0 = equal bits)."""

    kernel: str
    shape: str
    bytes: int
    flops: int
    run: Callable[[], object]
    torch_run: Callable[[], object]
    error: Callable[[], float]
    tolerance: float
    graph: bool = True


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest error over the largest expected value."""
    return ((got.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


def score_cases(sizes: Sizes, flats, device: str, backend: str) -> Iterator[Case]:
    """`text_weights` per text length, `vision_scores` per text and vision length."""
    k_flat, _ = flats
    scale = sizes.head_dim**-0.5
    for tokens in sizes.text:
        q = torch.randn(tokens, sizes.q_heads, sizes.head_dim, device=device).to(sizes.dtype)
        k = k_flat[:tokens].contiguous()
        lse = torch.full((tokens, sizes.q_heads), 8.0, device=device)  # any row sum will do for time and agreement
        q_bytes = q.numel() * q.element_size() + 4 * lse.numel()
        pair_flops = 2 * sizes.q_heads * sizes.head_dim
        args = (q, k, lse, scale)
        yield Case(
            "text_weights",
            f"T={tokens}",
            q_bytes + tokens * (sizes.row_bytes + 4),
            pair_flops * tokens * (tokens + 1) // 2,
            lambda args=args: text_weights(*args, backend=backend),
            lambda args=args: text_weights(*args, backend="reference"),
            lambda args=args: relative_error(
                text_weights(*args, backend=backend), text_weights(*args, backend="reference")
            ),
            1e-3,
        )
        for vision in sizes.vision:
            units = torch.randperm(sizes.rows, device=device)[:vision].int()
            w = torch.rand(tokens, device=device)
            q_pos = torch.arange(vision, vision + tokens, device=device)
            scores = (q, lse, w, k_flat, units, q_pos, torch.arange(vision, device=device), scale)
            yield Case(
                "vision_scores",
                f"T={tokens} V={vision}",
                q_bytes + vision * (sizes.row_bytes + 16),
                pair_flops * tokens * vision,
                lambda args=scores: vision_scores(*args, backend=backend),
                lambda args=scores: vision_scores(*args, backend="reference"),
                lambda args=scores: relative_error(
                    vision_scores(*args, backend=backend)[0], vision_scores(*args, backend="reference")[0]
                ),
                1e-3,
            )


def batch_score_cases(sizes: Sizes, flats, device: str, backend: str) -> Iterator[Case]:
    """A follow-up's scoring over all layers: `batch_scores` for one and several requests (torch: the reference)."""
    k_flat, _ = flats
    scale, slots_per_layer = sizes.head_dim**-0.5, sizes.rows // sizes.layers
    tokens, vision = sizes.text[0], sizes.vision[0]
    for requests in sizes.batch[:2]:
        text = [torch.arange(vision, vision + tokens)] * requests
        heads = (sizes.q_heads, sizes.kv_heads, sizes.head_dim)
        plan = ScorePlan(text, [torch.arange(vision)] * requests, *heads, sizes.dtype, device)
        q = torch.randn(sizes.layers, requests * tokens, *heads[::2], device=device).to(sizes.dtype)
        lse = torch.full(q.shape[:3], 12.0, device=device)
        w = torch.rand(q.shape[:2], device=device)
        slots = torch.randint(0, slots_per_layer, (requests * (vision + tokens),), device=device)
        text_slots, vision_slots = slots.split([requests * tokens, requests * vision])

        def score(backend, plan=plan, q=q, lse=lse, w=w, text_slots=text_slots, vision_slots=vision_slots):
            where = (0, slots_per_layer, scale)
            weights = batch_text_weights(plan, q, lse, k_flat, text_slots, *where, backend=backend)
            return weights, *batch_vision_scores(plan, q, lse, w, k_flat, vision_slots, *where, backend=backend)

        def score_error(score=score):
            return max(map(relative_error, score(backend), score("reference")))

        layer_bytes = (vision + tokens) * sizes.row_bytes + 2 * tokens * sizes.q_heads * (sizes.head_dim * 2 + 4)
        pairs = vision * tokens + tokens * (tokens + 1) // 2
        yield Case(
            "batch_scores",
            f"S={requests} T={tokens} V={vision}",
            sizes.layers * requests * (layer_bytes + 4 * vision),
            2 * sizes.q_heads * sizes.head_dim * pairs * sizes.layers * requests,
            lambda score=score: score(backend),
            lambda score=score: score("reference"),
            score_error,
            1e-3,
        )


def attention_cases(sizes: Sizes, flats, device: str, backend: str) -> Iterator[Case]:
    """Decode over views merged with a dense part; torch gathers and calls SDPA (without the merge)."""
    k_flat, v_flat = flats
    scale = sizes.head_dim**-0.5
    for batch, kept in product(sizes.batch, sizes.kept):
        units = torch.randperm(sizes.rows, device=device)[: batch * kept].int()
        indptr = torch.arange(0, batch * kept + 1, kept, device=device, dtype=torch.int32)
        q, dense = (torch.randn(batch, sizes.q_heads, sizes.head_dim, device=device).to(sizes.dtype) for _ in range(2))
        lse = torch.zeros(batch, sizes.q_heads, device=device)
        args = (q, k_flat, v_flat, units, indptr, None, scale)
        state = dense.clone(), lse.clone()  # what the timed runs write to

        def attend_error(args=args, dense=dense, lse=lse):
            got, expected = ((dense.clone(), lse.clone()) for _ in range(2))
            view_attention(*args, *got, backend=backend)
            view_attention(*args, *expected, backend="reference")
            return relative_error(got[0], expected[0])

        def gather_and_attend(q=q, units=units, batch=batch, kept=kept):
            k, v = (flat[units].view(batch, kept, sizes.kv_heads, -1).transpose(1, 2) for flat in (k_flat, v_flat))
            return torch.nn.functional.scaled_dot_product_attention(q[:, :, None], k, v, scale=scale, enable_gqa=True)

        yield Case(
            "view_attention",
            f"B={batch} kept={kept}",
            batch * kept * (2 * sizes.row_bytes + 4) + 3 * q.numel() * q.element_size() + 8 * lse.numel(),
            4 * batch * kept * sizes.q_heads * sizes.head_dim,
            lambda args=args, state=state: view_attention(*args, *state, backend=backend),
            gather_and_attend,
            attend_error,
            2e-2,
        )


def selection_cases(sizes: Sizes, flats, device: str, backend: str) -> Iterator[Case]:
    """`select` (torch: one stable sort) and `pack_units` (torch: index and index_put) at 5 % retention."""
    k_flat, v_flat = flats
    for vision in sizes.vision:
        scores = torch.rand(sizes.layers, vision, device=device)
        mass = torch.rand(sizes.layers, device=device)
        total = sizes.layers * vision // 20
        chosen = (scores, mass, total)
        yield Case(
            "select",
            f"L={sizes.layers} V={vision}",
            4 * scores.numel() + 4 * total,
            0,
            lambda args=chosen: select(*args, backend=backend),
            lambda scores=scores: scores.sort(dim=1, descending=True, stable=True),
            lambda args=chosen: float(
                not torch.equal(select(*args, backend=backend)[0], select(*args, backend="reference")[0])
            ),
            0.0,
        )
        src, dst = (torch.randperm(sizes.rows, device=device)[:total] for _ in range(2))

        def pack(src=src, dst=dst, backend=backend):
            pack_units(k_flat, v_flat, src, dst, backend=backend)

        def pack_error(src=src, dst=dst):
            expected = [flat[src].clone() for flat in flats]
            pack_units(k_flat, v_flat, src, dst, backend=backend)
            return float(not all(torch.equal(flat[dst], want) for flat, want in zip(flats, expected, strict=True)))

        yield Case(
            "pack_units",
            f"N={total}",
            total * (8 * sizes.row_bytes + 16),
            0,
            pack,
            lambda pack=pack: pack(backend="reference"),
            pack_error,
            0.0,
        )


def row_cases(sizes: Sizes, device: str, backend: str) -> Iterator[Case]:
    """`dense_rows` with one image of each size among 512 text tokens."""
    for batch, vision in product(sizes.batch, sizes.vision):
        length = vision + 512
        table = torch.randint(1, 2**30, (batch, length), device=device, dtype=torch.int32)
        rows = torch.arange(batch, device=device)
        hole = torch.full((batch,), 100, device=device)
        indices = torch.empty(batch * 512, device=device, dtype=torch.int32)
        indptr = torch.empty(batch + 1, device=device, dtype=torch.int32)
        request = (table, rows, torch.full_like(rows, length))
        holes = (hole, hole + vision, torch.arange(batch + 1, device=device))
        args = (*request, *holes, indices, indptr)
        keep = torch.ones(batch, length, dtype=torch.bool, device=device)
        keep[:, 100 : 100 + vision] = False

        def rows_error(args=args, table=table, keep=keep, indices=indices):
            dense_rows(*args, backend=backend)
            return float(not torch.equal(indices, table[keep]))

        yield Case(
            "dense_rows",
            f"B={batch} n={length - vision}",
            batch * (8 * (length - vision) + 12),
            0,
            lambda args=args: dense_rows(*args, backend=backend),
            lambda table=table, keep=keep: table[keep],
            rows_error,
            0.0,
            graph=False,  # the torch side reads a count back
        )


def all_cases(sizes: Sizes, device: str, backend: str) -> Iterator[Case]:
    """Every kernel, the one that matters most first."""
    shape = (sizes.rows, sizes.kv_heads, sizes.head_dim)
    flats = tuple(torch.randn(shape, device=device, dtype=sizes.dtype) for _ in range(2))
    yield from attention_cases(sizes, flats, device, backend)
    yield from score_cases(sizes, flats, device, backend)
    yield from batch_score_cases(sizes, flats, device, backend)
    yield from selection_cases(sizes, flats, device, backend)
    yield from row_cases(sizes, device, backend)


def quantiles_ms(run: Callable[[], object], graph: bool) -> list[float]:
    """20 %, 50 % and 80 % of the time of a run, as a graph replay where it can be captured."""
    from triton.testing import do_bench

    if graph:
        run()  # compiles outside the capture
        torch.cuda.synchronize()
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            run()
        run = captured.replay
    return list(do_bench(run, warmup=10, rep=50, quantiles=[0.2, 0.5, 0.8]))


def machine_rates() -> dict[str, float]:
    """Copy bandwidth in bytes/s (read plus write) and bfloat16 matmul rate in flop/s of this GPU."""
    source = torch.zeros(2**28, device="cuda")
    target = torch.empty_like(source)
    copy = quantiles_ms(lambda: target.copy_(source), graph=False)[1]
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    matmul = quantiles_ms(lambda: a @ a, graph=False)[1]
    return {"copy_bytes_per_s": 2 * source.nbytes / copy * 1e3, "matmul_flop_per_s": 2 * 8192**3 / matmul * 1e3}


def measure(case: Case, rates: dict[str, float]) -> dict:
    """One row of the result; a case that is wrong is not timed."""
    row = {"kernel": case.kernel, "shape": case.shape, "error": case.error(), "tolerance": case.tolerance}
    if not row["error"] <= case.tolerance:
        return row | {"wrong": True}
    p20, p50, p80 = quantiles_ms(case.run, case.graph)
    roof_ms = 1e3 * max(case.bytes / rates["copy_bytes_per_s"], case.flops / rates["matmul_flop_per_s"])
    torch_p50 = quantiles_ms(case.torch_run, case.graph)[1]
    return row | {
        "p20_ms": p20,
        "p50_ms": p50,
        "p80_ms": p80,
        "bytes": case.bytes,
        "flops": case.flops,
        "roof_ms": roof_ms,
        "share_of_roof": roof_ms / p50,
        "torch_p50_ms": torch_p50,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--commit", default="not given", help="recorded with the result")
    parser.add_argument("--out", type=Path, help="write the rows as JSON (default: print only)")
    parser.add_argument("--layers", type=int, default=36, help="36: Qwen3-VL-8B, 32: LLaVA-NeXT-Mistral-7B")
    parser.add_argument("--main", action="store_true", help="main cases only: 4096 vision tokens, 5 %% kept")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit(
            "this benchmark measures CUDA kernels and torch sees no CUDA device here: run it on a GPU machine "
            "(the kernels' correctness is tested without one by pytest tests/kernels)"
        )
    import triton

    rates = machine_rates()
    header = {
        "commit": args.commit,
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        **rates,
    }
    print(json.dumps(header), flush=True)
    rows = []
    torch.manual_seed(0)
    for case in all_cases(replace(MAIN if args.main else Sizes(), layers=args.layers), "cuda", "triton"):
        rows.append(measure(case, rates))
        print(json.dumps(rows[-1]), flush=True)
        if args.out:  # after every case: a run that is cut off keeps what it has
            args.out.write_text(json.dumps(header | {"rows": rows}, indent=1) + "\n")
    if any(row.get("wrong") for row in rows):
        raise SystemExit("some kernels are wrong on this GPU: see the rows marked wrong")


if __name__ == "__main__":
    main()
