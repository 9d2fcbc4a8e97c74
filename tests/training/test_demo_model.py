"""The demo model's training: its forwards against stock transformers, and its answers against the model card."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors import safe_open

from tgvkv_sglang.demo import scenes as S
from tgvkv_sglang.demo.bundle import DEMO_MODEL
from training.demo_model import build, data, engine, evaluate
from training.demo_model import probes as P


@pytest.fixture(scope="module")
def runner():
    return evaluate.TransformersRunner(DEMO_MODEL)


@pytest.mark.parametrize("size", [(512, 512), (384, 512), (256, 512)])
def test_training_forwards_equal_transformers(runner, size):
    """The lean forwards of the training code against the stock modules, all tokens kept (fp32, eager sums differ)."""
    scene = S.make_scene(5, size)
    sampler = data.Sampler(runner.processor.tokenizer, 1, data.Recipe(all_tokens=1.0), True)
    sampler.scene = lambda: scene
    batch, model = sampler.batch(1), runner.model
    pixels = runner.processor.image_processor(images=[S.render(scene)], return_tensors="pt")
    with torch.no_grad():
        seen, deep = engine.vision_forward(
            model.model.visual, batch.pixels, batch.patch_rc, batch.grids, batch.image
        )
        hidden, _ = engine.text_forward(
            model.model.language_model, batch.ids, batch.positions, batch.vision, seen, deep
        )
        logits = hidden @ model.model.language_model.embed_tokens.weight.T
        kinds = (batch.ids == model.config.image_token_id).int()
        expected = model(input_ids=batch.ids, mm_token_type_ids=kinds, **pixels).logits
    torch.testing.assert_close(logits, expected, atol=2e-3, rtol=1e-3)


def test_what_is_built_is_what_ships(tmp_path):
    """Every file but the card; of the weights, which training changes, the names and shapes."""
    tokenizer = build.make_tokenizer()
    build.save_bundle(build.make_model(0, tokenizer), tokenizer, tmp_path)
    made_names, shipped_names = ({path.name for path in folder.iterdir()} for folder in (tmp_path, DEMO_MODEL))
    assert made_names == shipped_names - {"MODEL_CARD.md"}
    for made in tmp_path.glob("*.json"):
        built, shipped = (json.loads(path.read_text()) for path in (made, DEMO_MODEL / made.name))
        for content in (built, shipped):
            content.pop("transformers_version", None)
        assert built == shipped, made.name
    assert (tmp_path / "chat_template.jinja").read_text() == (DEMO_MODEL / "chat_template.jinja").read_text()
    files = (safe_open(folder / "model.safetensors", "pt") for folder in (tmp_path, DEMO_MODEL))
    built, shipped = ({name: file.get_slice(name).get_shape() for name in file.keys()} for file in files)  # noqa: SIM118
    assert built == shipped


def scores(runner, probes: list[P.Probe]) -> tuple[P.Tally, P.Tally]:
    """(all vision, 0 % floor)"""
    full, floor = evaluate.run_transformers(probes, runner, 8, (False, True))
    return evaluate.tally(probes, full), evaluate.tally(probes, floor)


def claims() -> dict[str, float]:
    """Exact match at 100 %, class by class, from the model card's table."""
    card = (DEMO_MODEL / "MODEL_CARD.md").read_text()
    table = card[card.index("<!-- probes:begin -->") : card.index("<!-- probes:end -->")]
    rows = re.findall(r"^\| (\w+) \| \d+ \| ([\d.]+) \|", table, re.MULTILINE)
    return {cls: float(share) / 100 for cls, share in rows}


def test_the_card_has_a_figure_for_every_class():
    assert set(claims()) == set(P.CLASSES)


@pytest.mark.model
@pytest.mark.parametrize("cls", P.CLASSES)
def test_accuracy_is_what_the_card_says(runner, cls):
    """The first 12 of the card's 200 probes: three standard errors of so small a sample are allowed below the claim.

    An untrained or wrongly loaded model scores 0-20 %, far below that.
    """
    full, _ = scores(runner, list(P.probes(12, classes=(cls,))))
    claim = min(claims()[cls], 0.99)  # a claim of 100 % of 200 is no claim of no errors at all
    assert full.exact_share >= claim - 3 * (claim * (1 - claim) / full.n) ** 0.5


@pytest.mark.model
@pytest.mark.parametrize("cls", ["row", "numbers"])
def test_lists_need_the_picture_during_decode(runner, cls):
    probes = list(P.probes(12, classes=(cls,)))
    assert P.fit_to_measure(*scores(runner, probes))


@pytest.mark.model
def test_blind_decode_only_loses_what_decode_reads(runner):
    """The first token comes from prefill, so it is the same with and without vision in decode; the rest need not be."""
    probes = list(P.probes(6, classes=("describe",)))
    seen, blind = evaluate.run_transformers(probes, runner, 6, (False, True))
    assert [a.split()[0] for a in seen] == [b.split()[0] for b in blind]
    assert seen != blind
