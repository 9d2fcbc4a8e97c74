"""Train the bundled demo model from scratch, on a CPU or a GPU, in three stages (each resumable and seeded).

    python examples/demo_model/train.py vision --out runs/vision     # tower alone: token -> sum of its words
    python examples/demo_model/train.py text   --out runs/text       # text layers alone: told what the tokens are
    python examples/demo_model/train.py joint  --out runs/joint --load runs/text runs/vision

The stages meet because both use the same frozen code: a vision token is the sum of the (orthonormal) initial
embeddings of its words. `vision` and `text` can run side by side on one core each.
`control.json` in the run's folder is re-read as the run goes on (lr, recipe, stop); every change goes to the log.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

import build  # noqa: E402
from data import Recipe, Sampler  # noqa: E402
from engine import layer_forward, text_forward, vision_forward  # noqa: E402

from tgvkv_sglang.demo import questions as Q  # noqa: E402

NOISE = 0.06
LOOK_AT = ((2, (0, 2)),)  # in layer 2, one head of each KV group learns to look where the next word is read from


class Control:
    """Settings that may change while a run goes on, read from ``control.json``."""

    def __init__(self, folder: Path, log: Path, lr: float, recipe: Recipe) -> None:
        self.path, self.log, self.lr, self.recipe, self.stop, self._seen = folder / "control.json", log, lr, recipe, False, ""
        self.decay_minutes, self.align, self.look = 0.0, 1.0, 0.5
        if not self.path.exists():
            self.path.write_text(json.dumps({"lr": lr, "recipe": dataclasses.asdict(recipe)}, indent=1))

    def poll(self, step: int) -> None:
        raw = self.path.read_text()
        if raw == self._seen:
            return
        try:
            new = json.loads(raw)
        except json.JSONDecodeError as error:
            tqdm.write(f"{self.path}: {error}; keeping the old settings")
            return
        self._seen = raw
        self.lr, self.stop = new.get("lr", self.lr), new.get("stop", False)
        self.decay_minutes, self.align = new.get("decay_minutes", 0.0), new.get("align", self.align)
        self.look = new.get("look", self.look)
        for key, value in new.get("recipe", {}).items():
            setattr(self.recipe, key, tuple(value) if isinstance(value, list) else value)
        with self.log.open("a") as f:
            f.write(json.dumps({"step": step, "control": new}) + "\n")


class Meter:
    """Running per-class accuracy (whole answers, teacher-forced, which equals greedy exact match) since the last report."""

    def __init__(self) -> None:
        self.right, self.n = np.zeros(len(Q.CLASSES)), np.zeros(len(Q.CLASSES))
        self.token_right, self.token_n = np.zeros(len(Q.CLASSES)), np.zeros(len(Q.CLASSES))

    def add(self, hits: np.ndarray, classes: np.ndarray, rows: np.ndarray, answers: np.ndarray) -> None:
        np.add.at(self.token_right, classes, hits)
        np.add.at(self.token_n, classes, 1)
        key, first = np.unique(rows * 1000 + answers, return_index=True)
        whole = np.ones(len(key), dtype=bool)
        np.logical_and.at(whole, np.searchsorted(key, rows * 1000 + answers), hits)
        np.add.at(self.right, classes[first], whole)
        np.add.at(self.n, classes[first], 1)

    def report(self) -> dict:
        out = {
            c: [round(100 * self.right[i] / self.n[i], 1), round(100 * self.token_right[i] / self.token_n[i], 1)]
            for i, c in enumerate(Q.CLASSES)
            if self.n[i]
        }
        self.__init__()
        return out


def optimizers(parameters, lr: float, muon: bool):
    matrices = [p for n, p in parameters if p.ndim == 2 and "layers" in n] if muon else []
    ids = {id(p) for p in matrices}
    rest = [p for _, p in parameters if id(p) not in ids]
    found = [torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.02)]
    if matrices:
        found.append(torch.optim.Muon(matrices, lr=lr, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"))
    return found


def code_table(model) -> torch.Tensor:
    """The frozen code of words: the initial orthonormal embeddings (never trained)."""
    return model.model.language_model.embed_tokens.weight.detach().clone()


def vision_loss(out: torch.Tensor, targets: torch.Tensor, code: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Regression to the sum of words plus classification of every word; objects weigh as much as all empties."""
    wanted = code[targets].sum(1)
    empty = targets[:, 0] == targets[:, 1]
    weight = torch.where(empty, 0.35, 1.0)
    square = ((out - wanted) ** 2).sum(-1) / 5
    logits = out @ code[: len(build.SPECIAL) + len(build.WORDS)].T * 6
    guess = torch.stack([F.cross_entropy(logits, targets[:, j], reduction="none") for j in range(5)], 1)
    # Several words are right at once, so cross-entropy over all words would fight itself: it is taken per group.
    del guess
    return ((square * weight).sum() / weight.sum()), square


def group_hits(out: torch.Tensor, targets: torch.Tensor, code: torch.Tensor, groups) -> np.ndarray:
    empty = (targets[:, 0] == targets[:, 1]).numpy()
    hits = []
    for j, group in enumerate(groups):
        guess = group[(out @ code[group].T).argmax(-1)]
        hit = (guess == targets[:, j]).numpy()
        hits.append(hit[~empty].mean())
    return np.array(hits)


def oracle_vision(targets: torch.Tensor, code: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """What a good tower would say of each token, with errors: noise, and attributes of different strength."""
    strength = 1 + 0.1 * torch.randn(*targets.shape, 1, generator=generator)
    noise = NOISE * torch.randn(len(targets), code.shape[1], generator=generator)
    return (code[targets] * strength).sum(1) + noise


def answer_loss(text, hidden, batch, meter):
    where = batch.labels >= 0
    logits = F.linear(hidden[where], text.embed_tokens.weight)
    wanted = batch.labels[where]
    hits = (logits.argmax(-1) == wanted).numpy()
    picked = where.numpy()
    meter.add(hits, batch.classes[picked], np.nonzero(picked)[0], batch.answers[picked])
    return F.cross_entropy(logits, wanted)


def train(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = build.make_tokenizer()
    model = build.make_model(0, tokenizer)
    text, visual = model.model.language_model, model.model.visual
    code = code_table(model)
    recipe = Recipe()
    sampler = Sampler(tokenizer, args.seed, recipe, with_pixels=args.stage != "text")
    control = Control(args.out, args.out / "log.jsonl", args.lr, recipe)
    part = {"vision": visual, "text": text, "joint": model}[args.stage]
    parameters = [(n, p) for n, p in part.named_parameters() if p.requires_grad]
    opts = optimizers(parameters, args.lr, args.muon)
    step, spent = 0, 0.0
    for folder in args.load:
        saved = torch.load(folder / "state.pt", weights_only=False)
        own = {"vision": "model.visual.", "text": "model.language_model."}.get(saved["stage"], "")
        model.load_state_dict({k: v for k, v in saved["model"].items() if k.startswith(own)}, strict=False)
    if (args.out / "state.pt").exists():
        saved = torch.load(args.out / "state.pt", weights_only=False)
        model.load_state_dict(saved["model"])
        if args.keep_optimizer:
            [o.load_state_dict(s) for o, s in zip(opts, saved["optimizers"])]
        step, spent, sampler.drawn = saved["step"], saved["spent"], saved["drawn"]
        sampler.rng.seed(args.seed + 7919 * step)
    layer_fn = torch.compile(layer_forward, dynamic=True) if args.compile else layer_forward
    words = tokenizer.convert_tokens_to_ids
    groups = [
        torch.tensor([words("Ġ" + w) for w in group])
        for group in (build.COLORS, build.SHAPES, "0123456789", build.ROWS, build.COLUMNS)
    ]
    meter, generator = Meter(), torch.Generator().manual_seed(args.seed + step)
    bar = tqdm(total=args.minutes * 60, initial=int(spent), unit="s", desc=args.stage, mininterval=5)
    began, reported, losses, extra, looked = time.time() - spent, time.time(), [], [], []
    decay_from = None
    while time.time() - began < args.minutes * 60 and not control.stop:
        if step % 10 == 0:
            control.poll(step)
        lr = control.lr * min(1, (step + 1) / 50)
        if control.decay_minutes:
            decay_from = decay_from or time.time()
            left = 1 - (time.time() - decay_from) / (60 * control.decay_minutes)
            if left <= 0:
                break
            lr *= 0.03 + 0.97 * left
        for o in opts:
            for group in o.param_groups:
                group["lr"] = lr
        batch = sampler.batch(args.batch)
        if args.stage == "vision":
            out, _ = vision_forward(visual, batch.pixels, batch.patch_rc, batch.grids, batch.image)
            loss, _ = vision_loss(out, batch.targets, code)
            extra.append(group_hits(out.detach(), batch.targets, code, groups))
        else:
            if args.stage == "text":
                seen, deep = oracle_vision(batch.targets, code, generator), ()
            else:
                seen, deep = vision_forward(visual, batch.pixels, batch.patch_rc, batch.grids, batch.image)
            with torch.autocast("cpu", torch.bfloat16, enabled=args.amp):
                hidden, look = text_forward(
                    text, batch.ids, batch.positions, batch.vision, seen, deep, layer_fn, batch.looks, LOOK_AT
                )
            loss = answer_loss(text, hidden.float(), batch, meter)
            looked.append(look.item())
            loss = loss + control.look * look
            if args.stage == "joint":
                extra.append(group_hits(seen.detach(), batch.targets, code, groups))
                loss = loss + control.align * vision_loss(seen, batch.targets, code)[0]
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for _, p in parameters], 1.0)
        for o in opts:
            o.step()
            o.zero_grad(set_to_none=True)
        losses.append(loss.item())
        step += 1
        bar.n = int(time.time() - began)
        bar.set_postfix(step=step, loss=f"{np.mean(losses[-20:]):.3f}", refresh=False)
        bar.update(0)
        if time.time() - reported > args.report:
            line = {"step": step, "minutes": round((time.time() - began) / 60, 1), "images": sampler.drawn, "lr": round(lr, 6)}
            line |= {"loss": round(float(np.mean(losses)), 4), "classes": meter.report()}
            if looked:
                line["look"] = round(float(np.mean(looked)), 4)
            if extra:
                line["words"] = [round(float(x), 4) for x in np.mean(extra, 0)]
            with (args.out / "log.jsonl").open("a") as f:
                f.write(json.dumps(line) + "\n")
            reported, losses, extra, looked = time.time(), [], [], []
            save(args, model, opts, step, time.time() - began, sampler.drawn)
    save(args, model, opts, step, time.time() - began, sampler.drawn)


def save(args, model, opts, step, spent, drawn) -> None:
    state = {"stage": args.stage, "model": model.state_dict(), "optimizers": [o.state_dict() for o in opts]}
    state |= {"step": step, "spent": spent, "drawn": drawn}
    torch.save(state, args.out / "state.tmp")
    (args.out / "state.tmp").rename(args.out / "state.pt")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("vision", "text", "joint"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--load", type=Path, nargs="*", default=[])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--report", type=float, default=30, help="seconds between log lines and checkpoints")
    parser.add_argument("--muon", action="store_true", help="Muon for the layers' matrices, AdamW for the rest")
    parser.add_argument("--amp", action="store_true", help="bf16 matrix products in the text layers")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--keep-optimizer", action="store_true")
    arguments = parser.parse_args()
    if arguments.minutes <= 0 or math.isnan(arguments.minutes):
        parser.error(f"--minutes {arguments.minutes}: must be positive")
    train(arguments)
