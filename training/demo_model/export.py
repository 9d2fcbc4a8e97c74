"""Write a training run's weights as the bundle that ships (bf16 weights, tokenizer, processor, chat template).

    python -m training.demo_model.export --load runs/vision runs/text   # later runs override earlier ones
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from tgvkv_sglang.demo.bundle import DEMO_MODEL

from . import build

STAGE_PREFIX = {"vision": "model.visual.", "text": "model.language_model.", "joint": ""}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", type=Path, nargs="+", required=True, help="folders of training runs")
    parser.add_argument("--out", type=Path, default=DEMO_MODEL)
    args = parser.parse_args()
    tokenizer = build.make_tokenizer()
    model = build.make_model(0, tokenizer)
    for folder in args.load:
        saved = torch.load(folder / "state.pt", weights_only=False, map_location="cpu")
        prefix = STAGE_PREFIX[saved["stage"]]
        own = {k: v for k, v in saved["model"].items() if k.startswith(prefix)}
        model.load_state_dict(own, strict=False)
        print(f"{folder}: {saved['stage']} stage, step {saved['step']}, {len(own)} tensors")
    model.tie_weights()
    build.save_bundle(model, tokenizer, args.out)
    for file in args.out.iterdir():
        file.chmod(0o644)


if __name__ == "__main__":
    main()
