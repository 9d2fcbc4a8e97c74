"""Probe the demo model: accuracy per class at 100 % of the vision KV and at the 0 % floor.

    python -m training.demo_model.evaluate                                   # transformers, the bundled weights
    python -m training.demo_model.evaluate --base-url http://127.0.0.1:30000 # a running OpenAI-compatible server

At the floor, prefill sees the whole picture and decode sees none of it. Through a server only what the server does is
measured (its retention), so the floor column needs transformers.
"""

from __future__ import annotations

import argparse
import copy
import json
import urllib.request
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from tgvkv_sglang.demo.bundle import DEMO_MODEL
from tgvkv_sglang.demo.scenes import render

from . import probes as P

MAX_NEW = 40


class TransformersRunner:
    """Greedy decode with transformers, batched over prompts of equal length (so there is no padding at all)."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        import torch
        from transformers import AutoProcessor, Qwen3VLForConditionalGeneration

        self.torch, self.device = torch, device
        self.processor = AutoProcessor.from_pretrained(folder)
        self.model = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).to(device).eval()

    def prepare(self, probe: P.Probe) -> dict:
        parts = [{"type": "image"} for _ in probe.scenes]
        messages = P.chat_messages(probe, image_parts=parts)
        text = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return self.processor(text=[text], images=[render(s) for s in probe.scenes], return_tensors="pt")

    def answers(self, inputs: list[dict], blinds: tuple[bool, ...]) -> list[list[str]]:
        """Greedy answers to prompts of equal length, once for each entry of ``blinds``, from one prefill.

        ``True``: decode steps do not see vision tokens (the 0 % floor).
        """
        torch, model = self.torch, self.model
        batch = {k: torch.cat([x[k] for x in inputs]).to(self.device) for k in inputs[0]}
        with torch.inference_mode():
            prefilled = model(**batch, use_cache=True, logits_to_keep=1)
            first = prefilled.logits[:, -1].argmax(-1, keepdim=True)
            delta = model.model.rope_deltas.to(self.device).view(-1, 1)
            return [
                self._decode(batch["input_ids"], first, delta, copy.deepcopy(prefilled.past_key_values), blind)
                for blind in blinds
            ]

    def _decode(self, ids, token, delta, cache, blind: bool) -> list[str]:
        torch, model = self.torch, self.model
        end = model.generation_config.eos_token_id
        seen = (ids != model.config.image_token_id).long() if blind else torch.ones_like(ids)
        said, done = [token], token[:, 0] == end
        while len(said) < MAX_NEW and not done.all():
            seen = torch.cat([seen, torch.ones_like(token)], dim=1)
            place = delta + ids.shape[1] + len(said) - 1
            out = model(
                input_ids=token,
                attention_mask=seen,
                position_ids=place.expand(3, len(ids), 1),
                past_key_values=cache,
                use_cache=True,
            )
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            said.append(token)
            done |= token[:, 0] == end
        rows = [row[: row.index(end)] if end in row else row for row in torch.cat(said, dim=1).tolist()]
        return [self.processor.tokenizer.decode(row).strip() for row in rows]


def run_transformers(
    probes: list[P.Probe], runner: TransformersRunner, batch: int, blinds: tuple[bool, ...]
) -> list[list[str]]:
    """Answers to ``probes`` for each entry of ``blinds``."""
    groups = defaultdict(list)
    prepared = [runner.prepare(probe) for probe in probes]
    for i, inputs in enumerate(prepared):
        groups[inputs["input_ids"].shape[1]].append(i)
    found: list[list[str]] = [[""] * len(probes) for _ in blinds]
    for members in groups.values():
        for start in range(0, len(members), batch):
            chunk = members[start : start + batch]
            for column, said in zip(found, runner.answers([prepared[i] for i in chunk], blinds), strict=True):
                for i, words in zip(chunk, said, strict=True):
                    column[i] = words
    return found


def run_server(probes: list[P.Probe], base_url: str, model: str, parallel: int) -> list[str]:
    def one(probe: P.Probe) -> str:
        body = {"model": model, "messages": P.chat_messages(probe), "temperature": 0, "max_tokens": MAX_NEW}
        request = urllib.request.Request(
            f"{base_url.rstrip('/')}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=600) as reply:
            return json.load(reply)["choices"][0]["message"]["content"].strip()

    with ThreadPoolExecutor(parallel) as pool:
        return list(pool.map(one, probes))


def tally(probes: list[P.Probe], answers: list[str]) -> P.Tally:
    result = P.Tally()
    for probe, said in zip(probes, answers, strict=True):
        result.add(probe.question, said)
    return result


def table(rows: list[tuple[str, P.Tally, P.Tally | None]]) -> str:
    lines = [
        "| class | questions | exact, 100 % | per token, 100 % | exact, 0 % | per token, 0 % | fit to measure |",
        "|---|---|---|---|---|---|---|",
    ]
    for cls, full, floor in rows:
        cells = [cls, str(full.n), f"{100 * full.exact_share:.1f}", f"{100 * full.word_share:.1f}"]
        if floor is None:
            cells += ["", "", ""]
        else:
            fit = "yes" if P.fit_to_measure(full, floor) else "**unfit**"
            cells += [f"{100 * floor.exact_share:.1f}", f"{100 * floor.word_share:.1f}", fit]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO_MODEL)
    parser.add_argument("--base-url", help="ask a running OpenAI-compatible server instead of transformers")
    parser.add_argument("--per-class", type=int, default=P.PER_CLASS)
    parser.add_argument("--classes", nargs="*", default=list(P.CLASSES))
    parser.add_argument("--size", type=int, nargs=2, default=(512, 512), metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--seed", type=int, default=P.PROBE_SEED)
    parser.add_argument("--batch", type=int, default=16, help="prompts a batch, or requests in flight with --base-url")
    parser.add_argument("--no-floor", action="store_true")
    parser.add_argument("--json", type=Path, help="also write every probe's answers here")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    runner = None if args.base_url else TransformersRunner(args.model, args.device)
    rows, record = [], []
    for cls in tqdm(args.classes, unit="class"):
        asked = list(P.probes(args.per_class, args.seed, (cls,), tuple(args.size)))
        if runner is None:
            full, floor = run_server(asked, args.base_url, str(args.model), args.batch), None
        elif args.no_floor:
            (full,), floor = run_transformers(asked, runner, args.batch, (False,)), None
        else:
            full, floor = run_transformers(asked, runner, args.batch, (False, True))
        rows.append((cls, tally(asked, full), tally(asked, floor) if floor else None))
        for i, probe in enumerate(asked):
            line = {"cls": cls, "text": probe.question.text, "answer": probe.question.answer, "said": full[i]}
            record.append(line | ({"said_blind": floor[i]} if floor else {}))
    print(table(rows))
    if args.json:
        args.json.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
