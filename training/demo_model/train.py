"""Train the bundled demo model from scratch, on a CPU or a GPU, in three stages (each resumable and seeded).

    train="python -m training.demo_model.train"; recipes=training/demo_model/recipes
    $train vision --out runs/vision --recipe $recipes/vision.json       # tower alone: token -> sum of its words
    $train text --out runs/text --recipe $recipes/text_lookups.json     # text layers alone: told what tokens are
    $train joint --out runs/joint --recipe $recipes/joint.json --load runs/vision runs/text

The stages meet because both use the same frozen code: a vision token is the sum of the (orthonormal) initial
embeddings of its words. `vision` and `text` can run side by side on one core each.
`control.json` in the run's folder is re-read as the run goes on (lr, recipe, stop); every change goes to the log.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from tgvkv_sglang.demo import questions as Q

from . import build
from .data import Recipe, Sampler
from .engine import layer_forward, text_forward, vision_forward

NOISE = 0.02
LOOK_AT = ((2, (0, 2)),)  # in layer 2, one head of each KV group learns to look where the next word is read from

ORDINAL_AT = 0  # after layer 0 a vision token is taught to carry the name of its image ("one", "two")


class Control:
    """Settings that may change while a run goes on, read from ``control.json``."""

    def __init__(self, folder: Path, log: Path, lr: float, recipe: Recipe, recipe_file: Path | None) -> None:
        self.path, self.log, self.lr, self.recipe = folder / "control.json", log, lr, recipe
        self.stop, self._seen = False, ""
        self.decay_minutes, self.align, self.look, self.ordinal = 0.0, 1.0, 0.5, 0.0
        if recipe_file is not None and not self.path.exists():
            self.path.write_text(recipe_file.read_text())
        elif not self.path.exists():
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
        self.look, self.ordinal = new.get("look", self.look), new.get("ordinal", self.ordinal)
        for key, value in new.get("recipe", {}).items():
            setattr(self.recipe, key, tuple(value) if isinstance(value, list) else value)
        with self.log.open("a") as f:
            f.write(json.dumps({"step": step, "control": new}) + "\n")


class Meter:
    """Per-class accuracy since the last report: whole answers (teacher-forced, which equals greedy) and tokens."""

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


def optimizers(parameters, lr: float, muon: bool) -> list[torch.optim.Optimizer]:
    matrices = [p for n, p in parameters if p.ndim == 2 and "layers" in n] if muon else []
    tower = [p for n, p in parameters if n.startswith("model.visual.")]  # joint stage: it can see already, so slower
    taken = {id(p) for p in (*matrices, *tower)}
    groups = [{"params": [p for _, p in parameters if id(p) not in taken], "scale": 1.0}]
    if tower:
        groups.append({"params": tower, "scale": 0.2})
    found = [torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), weight_decay=0.02)]
    if matrices:
        found.append(torch.optim.Muon(matrices, lr=lr, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"))
    return found


def word_loss(out: torch.Tensor, targets: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
    """Squared distance of each vision token ``[N, hidden]`` to the sum of its words; empty tokens weigh less."""
    weight = torch.where(targets[:, 0] == targets[:, 1], 0.35, 1.0)  # "nothing" stands three times in an empty token
    square = ((out - code[targets].sum(1)) ** 2).sum(-1) / targets.shape[1]
    return (square * weight).sum() / weight.sum()


def word_hits(out: torch.Tensor, targets: torch.Tensor, code: torch.Tensor, groups) -> np.ndarray:
    """Share of objects whose colour, shape, digit, row and column can be read off their vision token."""
    mine = targets[:, 0] != targets[:, 1]
    out, targets = out[mine], targets[mine]
    guesses = [group[(out @ code[group].T).argmax(-1)] for group in groups]
    return np.array([(guess == targets[:, j]).float().mean().item() for j, guess in enumerate(guesses)])


def oracle_vision(targets: torch.Tensor, code: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """What a good tower would say of each token, with errors: noise, and attributes of different strength."""
    strength = 1 + 0.1 * torch.randn(*targets.shape, 1, generator=generator)
    noise = NOISE * torch.randn(len(targets), code.shape[1], generator=generator)
    return (code[targets] * strength.to(code.device)).sum(1) + noise.to(code.device)


class Run:
    """One stage of training: model, data, optimisers, and what goes to the log and the checkpoint."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.step, self.spent = args, 0, 0.0
        tokenizer = build.make_tokenizer()
        self.model = build.make_model(0, tokenizer)
        # The frozen code of words: the initial orthonormal embeddings. It is never trained.
        self.code = self.model.model.language_model.embed_tokens.weight.detach().clone().to(args.device)
        ids = tokenizer.convert_tokens_to_ids
        words = (build.COLORS, build.SHAPES, "0123456789", build.ROWS, build.COLUMNS)
        self.groups = [torch.tensor([ids("Ġ" + w) for w in group], device=args.device) for group in words]
        self.ordinals = [ids("Ġ" + w) for w in Q.IMAGE_NAMES]
        self.model.to(args.device)
        self.text, self.visual = self.model.model.language_model, self.model.model.visual
        recipe = Recipe()
        self.sampler = Sampler(tokenizer, args.seed, recipe, with_pixels=args.stage != "text")
        self.control = Control(args.out, args.out / "log.jsonl", args.lr, recipe, args.recipe)
        part = {"vision": self.visual, "text": self.text, "joint": self.model}[args.stage]
        self.parameters = [(n, p) for n, p in part.named_parameters() if p.requires_grad]
        self.optimizers = optimizers(self.parameters, args.lr, args.muon)
        self.layer_fn = torch.compile(layer_forward, dynamic=True) if args.compile else layer_forward
        self.load()
        self.generator = torch.Generator().manual_seed(args.seed + self.step)
        self.clear()

    def load(self) -> None:
        """Weights of earlier stages (``--load``), then this run's own checkpoint, if there is one."""
        for folder in self.args.load:
            saved = torch.load(folder / "state.pt", weights_only=False, map_location=self.args.device)
            own = {"vision": "model.visual.", "text": "model.language_model."}.get(saved["stage"], "")
            self.model.load_state_dict({k: v for k, v in saved["model"].items() if k.startswith(own)}, strict=False)
        if not (self.args.out / "state.pt").exists():
            return
        saved = torch.load(self.args.out / "state.pt", weights_only=False, map_location=self.args.device)
        self.model.load_state_dict(saved["model"])
        if self.args.keep_optimizer:
            for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(state)
        self.step, self.spent, self.sampler.drawn = saved["step"], saved["spent"], saved["drawn"]
        self.sampler.rng.seed(self.args.seed + 7919 * self.step)

    def save(self) -> None:
        state = {"stage": self.args.stage, "model": self.model.state_dict()}
        state |= {"optimizers": [o.state_dict() for o in self.optimizers]}
        state |= {"step": self.step, "spent": self.spent, "drawn": self.sampler.drawn}
        torch.save(state, self.args.out / "state.tmp")
        (self.args.out / "state.tmp").rename(self.args.out / "state.pt")

    def clear(self) -> None:
        self.meter, self.losses, self.looks, self.hits, self.told = Meter(), [], [], [], []

    def report(self, lr: float) -> None:
        line = {
            "step": self.step,
            "minutes": round(self.spent / 60, 1),
            "images": self.sampler.drawn,
            "lr": round(lr, 6),
        }
        line |= {"loss": round(float(np.mean(self.losses)), 4), "classes": self.meter.report()}
        if self.looks:
            line["look"] = round(float(np.mean(self.looks)), 4)
        if self.told:
            line["ordinal"] = round(float(np.mean(self.told)), 4)
        if self.hits:
            line["words"] = [round(float(x), 4) for x in np.mean(self.hits, 0)]
        with (self.args.out / "log.jsonl").open("a") as f:
            f.write(json.dumps(line) + "\n")
        self.clear()

    def loss(self) -> torch.Tensor:
        batch = self.sampler.batch(self.args.batch).to(self.args.device)
        if self.args.stage == "text":
            seen, deep = oracle_vision(batch.targets, self.code, self.generator), ()
            taught = 0.0
        else:
            seen, deep = vision_forward(self.visual, batch.pixels, batch.patch_rc, batch.grids, batch.image)
            taught = word_loss(seen, batch.targets, self.code)
            self.hits.append(word_hits(seen.detach(), batch.targets, self.code, self.groups))
        if self.args.stage == "vision":
            return taught
        taps = {ORDINAL_AT: None}
        with torch.autocast(self.args.device, torch.bfloat16, enabled=self.args.amp):
            hidden, look = text_forward(
                self.text,
                batch.ids,
                batch.positions,
                batch.vision,
                seen,
                deep,
                self.layer_fn,
                batch.looks,
                LOOK_AT,
                taps,
            )
        self.looks.append(look.item())
        loss = self.answer_loss(hidden.float(), batch) + self.control.look * look + self.control.align * taught
        if self.control.ordinal:
            named = F.normalize(taps[ORDINAL_AT].float(), dim=-1) @ self.code[self.ordinals].T
            told = F.cross_entropy(10 * named, batch.ordinal)
            self.told.append(told.item())
            loss = loss + self.control.ordinal * told
        return loss

    def answer_loss(self, hidden: torch.Tensor, batch) -> torch.Tensor:
        where = batch.labels >= 0
        logits = F.linear(hidden[where], self.text.embed_tokens.weight)
        wanted = batch.labels[where]
        picked = where.cpu().numpy()
        hits = (logits.argmax(-1) == wanted).cpu().numpy()
        self.meter.add(hits, batch.classes[picked], np.nonzero(picked)[0], batch.answers[picked])
        return F.cross_entropy(logits, wanted)

    def update(self, lr: float) -> None:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * group.get("scale", 1.0)
        loss = self.loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for _, p in self.parameters], 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.losses.append(loss.item())
        self.step += 1

    def go(self) -> None:
        began, reported, decay_from, warm = time.time() - self.spent, time.time(), None, self.step + 50
        with tqdm(total=self.args.minutes * 60, unit="s", desc=self.args.stage, mininterval=5) as bar:
            while time.time() - began < self.args.minutes * 60 and not self.control.stop:
                if self.step % 10 == 0:
                    self.control.poll(self.step)
                lr = self.control.lr * min(1, 1 - (warm - self.step - 1) / 50)
                if self.control.decay_minutes:
                    decay_from = decay_from or time.time()
                    left = 1 - (time.time() - decay_from) / (60 * self.control.decay_minutes)
                    if left <= 0:
                        break
                    lr *= 0.03 + 0.97 * left
                self.update(lr)
                self.spent = time.time() - began
                bar.n = int(self.spent)
                bar.set_postfix(step=self.step, loss=f"{np.mean(self.losses[-20:]):.3f}", refresh=False)
                bar.update(0)
                if time.time() - reported > self.args.report:
                    self.report(lr)
                    self.save()
                    reported = time.time()
        self.save()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("vision", "text", "joint"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--load", type=Path, nargs="*", default=[])
    parser.add_argument("--recipe", type=Path, help="first control.json of this run (see recipes/)")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--report", type=float, default=30, help="seconds between log lines and checkpoints")
    parser.add_argument("--muon", action="store_true", help="Muon for the layers' matrices, AdamW for the rest")
    parser.add_argument("--amp", action="store_true", help="bf16 matrix products in the text layers")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--keep-optimizer", action="store_true")
    arguments = parser.parse_args()
    if arguments.minutes <= 0 or math.isnan(arguments.minutes):
        parser.error(f"--minutes {arguments.minutes}: must be positive")
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    Run(arguments).go()
