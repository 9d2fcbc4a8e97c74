"""Every policy and budget rule by request, on one live server: its own namespace, the same number of kept units."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from tests.server.compare import assert_selection, assert_tokens, ids_of
from tests.server.test_eager import LAYERS
from tgvkv_sglang.registry import BUDGETS, POLICIES
from tgvkv_sglang.testing.images import make_image
from tgvkv_sglang.testing.prompts import about_images, chat

RETENTION, VISION = 0.2, 7 * 8
TOTAL = round(Fraction(str(RETENTION)) * LAYERS * VISION)


def check_choice(arrays: dict) -> None:
    """The best of each layer by the trace's own scores, ties to the lower position; in all as many as under any."""
    kept, budget = arrays["kept"], arrays["budget"].tolist()
    assert kept.shape == (LAYERS, VISION) and sum(budget) == TOTAL and kept.sum(1).tolist() == budget
    for row, scores, count in zip(kept, arrays["scores"], budget, strict=True):
        assert row.nonzero()[0].tolist() == sorted(np.argsort(-scores, kind="stable")[:count].tolist())


@pytest.fixture(scope="module")
def answered(eager) -> dict:
    """One question under each policy, and one for each budget rule, all at once; answers and traces by name."""
    eager.flush()
    image = make_image(90, 224, 256)
    ask = lambda words: chat(about_images(f"{words}: what is to the left of the green square?"))  # noqa: E731
    asked = [{"policy": policy} for policy in POLICIES] + [{"budget": budget} for budget in BUDGETS]
    jobs = [{"text": ask(own.get("budget", "Policy")), "images": [image], "retention": RETENTION,
             "rid": "-".join(own.values()) + str(i), "trace": True, "logprobs": True, "max_new_tokens": 12, **own}
            for i, own in enumerate(asked)]  # fmt: skip
    answers = eager.together(jobs)
    return {(*own.items(),): (answer, *eager.trace(job["rid"]))
            for own, answer, job in zip(asked, answers, jobs, strict=True)}  # fmt: skip


@pytest.mark.parametrize("policy", POLICIES)
def test_a_policy_by_request(answered, policy):
    answer, arrays, meta = answered[("policy", policy),]
    assert meta["policy"] == policy and len(answer.ids) == 12
    check_choice(arrays)


@pytest.mark.parametrize("budget", BUDGETS)
def test_a_budget_rule_by_request(answered, budget):
    answer, arrays, meta = answered[("budget", budget),]
    assert meta["budget_rule"] == ("tvb" if budget == "own" else budget) and len(answer.ids) == 12
    check_choice(arrays)
    if budget == "uniform":
        assert max(arrays["budget"]) - min(arrays["budget"]) <= 1


def test_policies_differ_and_share_nothing(answered):
    kept = {key: arrays["kept"].tobytes() for key, (_, arrays, _) in answered.items()}
    assert len(set(kept.values())) >= len(POLICIES) - 2
    assert kept[("policy", "tgv"),] == kept[("policy", "lightkv"),], "it keeps the same and merges the others into it"
    merged, plain = (answered[("policy", name),][0] for name in ("lightkv", "tgv"))
    assert not np.allclose(merged.logprobs[2:], plain.logprobs[2:], atol=1e-5)
    assert all(answer.cached == 0 for (key,), (answer, *_) in answered.items() if key[0] == "policy")


def test_the_papers_policy_among_others_is_the_oracles(eager, oracle, answered):
    image, text = make_image(91, 224, 256), chat(about_images("What is below it?"))
    jobs = [{"text": text, "images": [image], "retention": RETENTION, "rid": f"among-{policy}", "trace": True,
             "logprobs": True, "policy": policy} for policy in ("h2o", "tgv", "peak", "random")]  # fmt: skip
    answers = eager.together(jobs)
    turn = oracle.greedy(oracle.prepare_ids(ids_of(oracle, text), [image]), 16, retention=RETENTION)
    assert_selection(eager, "among-tgv", turn.selection)
    assert assert_tokens(answers[1], turn) >= 8


def test_every_slot_is_given_back(eager, answered):
    """Those of merged views too, which are more than stock would hold."""
    memory = eager.memory()
    assert memory["available"] + memory["evictable"] == eager.tokens
