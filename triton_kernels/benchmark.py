"""Each kernel on a CUDA machine: correct first, then its time against the roofline and against torch.

Needs torch and triton; nothing else of this project and no SGLang.
The roof of a case is ``max(bytes / copy bandwidth, flops / matmul rate)``, both measured here. ``bytes`` are the least
that can move (README.md here); ``moved_over_least`` says how many times that the kernel's own way of working moves,
partial results included, by count and not by a profiler. Times are of CUDA graph replays with a cold L2
(`triton.testing.do_bench`).

    python triton_kernels/benchmark.py --commit $(git rev-parse HEAD) --out kernels.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, product
from pathlib import Path

import torch
from tgvkv_kernels.batch_scores import ScorePlan, batch_peak_scores, batch_text_weights, batch_vision_scores
from tgvkv_kernels.dense_rows import dense_rows
from tgvkv_kernels.pack_units import pack_units
from tgvkv_kernels.select import select_batch
from tgvkv_kernels.stash_rows import stash_rows
from tgvkv_kernels.view_attention import view_attention
from tgvkv_kernels.view_attention.launch import CHUNK


@dataclass(frozen=True)
class Sizes:
    """Model and load; the default is Qwen3-VL-8B.

    ``text`` queries of a request, ``scoring`` requests of a prefill, ``batch`` requests of a decode step; ``kept``
    units of a layer's view (5 % of each of ``vision``), ``skewed`` where a layer took ten budgets. Typical ones first.
    """

    layers: int = 36
    q_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    rows: int = 2**20  # units of the flat storage: 2 GiB each of K and V
    vision: tuple[int, ...] = (4096, 1024, 16384)
    text: tuple[int, ...] = (64, 256, 4096)
    scoring: tuple[int, ...] = (1, 8)
    batch: tuple[int, ...] = (1, 16, 64)
    kept: tuple[int, ...] = (205, 51, 819)
    skewed: int = 2000

    @property
    def row_bytes(self) -> int:
        return self.kv_heads * self.head_dim * self.dtype.itemsize

    @property
    def query_bytes(self) -> int:
        """Of one token's queries and their LSE in one layer."""
        return self.q_heads * (self.head_dim * self.dtype.itemsize + 4)


MOST_TORCH_TEXT = 1024
MAIN = Sizes(vision=(4096,), kept=(205,))
SMALL = Sizes(3, 4, 2, 64, torch.bfloat16, 2000, (40,), (9, 20), (1, 3), (1, 3), (7,), 600)


@dataclass(frozen=True)
class Case:
    """``run`` and ``torch_run`` return nothing; ``error`` compares the kernel with the reference (0 = equal bits).

    ``torch_run`` is None where torch takes seconds. ``bytes`` are the least that can move, ``moved`` what the kernel
    moves (None: just those).
    """

    kernel: str
    shape: str
    bytes: int
    run: Callable[[], object]
    torch_run: Callable[[], object] | None
    error: Callable[[], float]
    tolerance: float = 0.0
    flops: int = 0
    moved: int | None = None
    graph: bool = True


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest error over the largest expected value."""
    return ((got.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


def differ(got: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """0 when all are equal, else 1."""
    return float(not all(map(torch.equal, got, expected)))


def attention_cases(sizes: Sizes, flats, device: str, backend: str) -> Iterator[Case]:
    """Decode over views merged with a dense part; torch gathers and calls SDPA (without the merge), once a length."""
    k_flat, v_flat = flats
    scale, units_bytes = sizes.head_dim**-0.5, 2 * sizes.row_bytes + 4
    lengths = [(f"B={batch} kept={kept}", [kept] * batch) for batch, kept in product(sizes.batch, sizes.kept)]
    batch, kept = sizes.batch[-1], sizes.kept[0]
    lengths.append((f"B={batch} kept={kept}, one {sizes.skewed}", [kept] * (batch - 1) + [sizes.skewed]))
    for shape, counts in lengths:
        batch, total = len(counts), sum(counts)
        units = torch.randint(0, sizes.rows, (total,), device=device, dtype=torch.int32)
        indptr = torch.tensor([0, *accumulate(counts)], device=device, dtype=torch.int32)
        q, dense = (torch.randn(batch, sizes.q_heads, sizes.head_dim, device=device).to(sizes.dtype) for _ in range(2))
        lse = torch.zeros(batch, sizes.q_heads, device=device)

        def attend(out, lse, backend=backend, q=q, units=units, indptr=indptr):
            view_attention(q, k_flat, v_flat, units, indptr, None, scale, out, lse, backend=backend)
            return out

        def attend_error(attend=attend, dense=dense, lse=lse):
            got, expected = (attend(dense.clone(), lse.clone(), backend=name) for name in (backend, "reference"))
            return relative_error(got, expected)

        def gather_and_attend(q=q, units=units, counts=counts):
            for kept in set(counts):  # the longest request comes last
                rows = slice(counts.index(kept), counts.index(kept) + counts.count(kept))
                own = units[sum(counts[: rows.start]) :][: kept * counts.count(kept)]
                k, v = (flat[own].view(-1, kept, *flat.shape[1:]).transpose(1, 2) for flat in flats)
                attention = torch.nn.functional.scaled_dot_product_attention
                attention(q[rows, :, None], k, v, scale=scale, enable_gqa=True)

        chunks = sum(-(-kept // CHUNK) for kept in counts if kept > CHUNK)
        least = total * units_bytes + 3 * q.numel() * q.element_size() + 8 * lse.numel()
        partial = 2 * chunks * sizes.q_heads * (sizes.head_dim + 1) * 4
        state = dense.clone(), lse.clone()  # what the timed runs write to
        yield Case("view_attention", shape, least, lambda attend=attend, state=state: attend(*state),
                   gather_and_attend, attend_error, 2e-2, 4 * total * sizes.q_heads * sizes.head_dim,
                   least + partial)  # fmt: skip


def stash_cases(sizes: Sizes, device: str, backend: str) -> Iterator[Case]:
    """`stash_rows` of one layer (torch: index_select), the queries at the end of a prefill of 4096 more rows."""
    for tokens in sizes.text:
        q = torch.randn(tokens + 4096, sizes.q_heads, sizes.head_dim, device=device).to(sizes.dtype)
        lse = torch.randn(q.shape[:2], device=device)
        rows, targets = torch.arange(4096, len(q), device=device), torch.arange(tokens, device=device)
        stashes = tuple(torch.zeros_like(tensor[:tokens]) for tensor in (q, lse))

        def stash(backend=backend, args=(q, lse, rows, targets, *stashes)):
            stash_rows(*args, backend=backend)

        def stash_error(stash=stash, stashes=stashes, q=q, lse=lse):
            stash()
            return differ(stashes, (q[4096:], lse[4096:]))

        def gather(q=q, lse=lse, rows=rows):
            return q[rows], lse[rows]

        yield Case("stash_rows", f"T={tokens}", tokens * (2 * sizes.query_bytes + 16), stash, gather, stash_error)


def score_cases(sizes: Sizes, flats, device: str, backend: str) -> Iterator[Case]:
    """All layers' scoring of a prefill: weights and scores in `batch_scores`, peaks alone in `batch_peak_scores`.

    Torch is the reference.
    """
    k_flat, _ = flats
    typical = sizes.text[0]
    for requests, tokens, vision in product(sizes.scoring, sizes.text, sizes.vision):
        if requests > 1 and (tokens, vision) != (typical, sizes.vision[0]):
            continue
        args = ScoreInputs(sizes, requests, tokens, vision, device)
        pairs = sizes.layers * requests * vision * tokens
        weights = sizes.layers * requests * tokens * (tokens + 1) // 2
        stash = requests * tokens * sizes.query_bytes
        vision_bytes = sizes.layers * (requests * vision * (sizes.row_bytes + 4) + stash)
        text_bytes = sizes.layers * (requests * tokens * (sizes.row_bytes + 4) + stash)
        pieces = (args.plan.text, args.plan.vision)
        partials = [8 * sizes.layers * sizes.kv_heads * piece.partials for piece in pieces]  # written and read
        kinds = [("batch_scores", args.score, vision_bytes + text_bytes, pairs + weights, sum(partials))]
        if tokens == typical:
            kinds.append(("batch_peak_scores", args.peaks, vision_bytes, pairs, partials[1]))
        for name, score, least, products, partial in kinds:

            def score_error(score=score):
                return max(map(relative_error, score(k_flat, backend), score(k_flat, "reference")))

            slow = tokens > MOST_TORCH_TEXT
            yield Case(name, f"S={requests} T={tokens} V={vision}", least, lambda score=score: score(k_flat, backend),
                       None if slow else lambda score=score: score(k_flat, "reference"), score_error, 1e-3,
                       2 * sizes.q_heads * sizes.head_dim * products, least + partial)  # fmt: skip


class ScoreInputs:
    """The stash of ``requests`` prefills of ``tokens`` text tokens behind ``vision`` vision tokens each."""

    def __init__(self, sizes: Sizes, requests: int, tokens: int, vision: int, device: str):
        heads = (sizes.q_heads, sizes.kv_heads, sizes.head_dim)
        text = [torch.arange(vision, vision + tokens)] * requests
        self.plan = ScorePlan(text, [torch.arange(vision)] * requests, *heads, sizes.dtype, device)
        self.q = torch.randn(sizes.layers, requests * tokens, *heads[::2], device=device).to(sizes.dtype)
        self.lse = torch.full(self.q.shape[:3], 12.0, device=device)  # any row sum will do for time and agreement
        self.w = torch.rand(self.q.shape[:2], device=device)
        slots = sizes.rows // sizes.layers
        self.text_slots, self.vision_slots = (
            torch.randint(0, slots, (requests * count,), device=device, dtype=torch.int32) for count in (tokens, vision)
        )
        self.where = (0, slots, sizes.head_dim**-0.5)

    def score(self, k_flat: torch.Tensor, backend: str) -> tuple[torch.Tensor, ...]:
        stash = (self.plan, self.q, self.lse)
        weights = batch_text_weights(*stash, k_flat, self.text_slots, *self.where, backend=backend)
        return weights, *batch_vision_scores(*stash, self.w, k_flat, self.vision_slots, *self.where, backend=backend)

    def peaks(self, k_flat: torch.Tensor, backend: str) -> tuple[torch.Tensor, ...]:
        where = (self.vision_slots, *self.where)
        return batch_peak_scores(self.plan, self.q, self.lse, k_flat, *where, backend=backend)


def selection_cases(sizes: Sizes, flats, device: str, backend: str) -> Iterator[Case]:
    """`select_batch` (torch: one stable sort) and `pack_units` (torch: index and index_put) at 5 % retention."""
    slots = sizes.rows // sizes.layers
    for requests, vision in product(sizes.scoring, sizes.vision):
        scores = torch.rand(sizes.layers, requests * vision, device=device)
        mass = torch.rand(sizes.layers, requests, device=device)
        span = torch.randint(0, slots, (requests * vision,), device=device, dtype=torch.int32)
        totals = [sizes.layers * vision // 20] * requests

        def choose(backend=backend, args=(scores, mass, [vision] * requests, totals, span, slots)):
            return select_batch(*args, backend=backend)

        yield Case("select_batch", f"S={requests} L={sizes.layers} V={vision}", 4 * scores.numel() + 8 * sum(totals),
                   choose, lambda scores=scores: scores.sort(dim=1, descending=True, stable=True),
                   lambda choose=choose: differ(choose(), choose("reference")), graph=False)  # fmt: skip
    for vision in sizes.vision:
        total = sizes.layers * vision // 20
        src, dst = (torch.randperm(sizes.rows, device=device)[:total] for _ in range(2))

        def pack(backend=backend, src=src, dst=dst):
            pack_units(*flats, src, dst, backend=backend)

        def pack_error(pack=pack, src=src, dst=dst):
            expected = [flat[src].clone() for flat in flats]
            pack()
            return differ([flat[dst] for flat in flats], expected)

        ids = 16 * total  # read twice, by the gather to the buffer and by the scatter from it
        rows = 4 * total * sizes.row_bytes
        yield Case("pack_units", f"N={total}", rows + ids, pack, lambda pack=pack: pack("reference"), pack_error,
                   moved=2 * rows + ids)  # fmt: skip


def row_cases(sizes: Sizes, device: str, backend: str) -> Iterator[Case]:
    """`dense_rows` with one image of each size among 512 text tokens (torch reads a count back)."""
    for batch, vision in product(sizes.batch, sizes.vision):
        length = vision + 512
        table = torch.randint(1, 2**30, (batch, length), device=device, dtype=torch.int32)
        rows = torch.arange(batch, device=device)
        hole = torch.full((batch,), 100, device=device)
        indices = torch.empty(batch * 512, device=device, dtype=torch.int32)
        indptr = torch.empty(batch + 1, device=device, dtype=torch.int32)
        holes = (hole, hole + vision, torch.arange(batch + 1, device=device))
        args = (table, rows, torch.full_like(rows, length), *holes, indices, indptr)
        keep = torch.ones(batch, length, dtype=torch.bool, device=device)
        keep[:, 100 : 100 + vision] = False

        def fill(args=args):
            dense_rows(*args, backend=backend)

        def rows_error(fill=fill, table=table, keep=keep, indices=indices):
            fill()
            return differ([indices], [table[keep]])

        yield Case("dense_rows", f"B={batch} n={length - vision}", batch * (8 * (length - vision) + 12), fill,
                   lambda table=table, keep=keep: table[keep], rows_error, graph=False)  # fmt: skip


def all_cases(sizes: Sizes, device: str, backend: str) -> Iterator[Case]:
    """Every kernel that serves, the one that matters most first."""
    shape = (sizes.rows, sizes.kv_heads, sizes.head_dim)
    flats = tuple(torch.randn(shape, device=device, dtype=sizes.dtype) for _ in range(2))
    yield from attention_cases(sizes, flats, device, backend)
    yield from score_cases(sizes, flats, device, backend)
    yield from stash_cases(sizes, device, backend)
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
    copy_ms, matmul_ms = (1e3 * case.bytes / rates["copy_bytes_per_s"], 1e3 * case.flops / rates["matmul_flop_per_s"])
    return row | {
        "p20_ms": p20,
        "p50_ms": p50,
        "p80_ms": p80,
        "bytes": case.bytes,
        "flops": case.flops,
        "moved_over_least": round((case.moved or case.bytes) / case.bytes, 3),
        "roof_ms": max(copy_ms, matmul_ms),
        "share_of_bandwidth": copy_ms / p50,
        "share_of_roof": max(copy_ms, matmul_ms) / p50,
        "torch_p50_ms": quantiles_ms(case.torch_run, case.graph)[1] if case.torch_run else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--commit", default="not given", help="recorded with the result")
    parser.add_argument("--out", type=Path, help="write the rows as JSON (default: print only)")
    parser.add_argument("--layers", type=int, default=36, help="of the model (default: Qwen3-VL-8B's 36)")
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
