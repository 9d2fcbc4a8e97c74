"""A short soak (bench/soak.py says what it does): nothing is lost, nobody gets another's answer, no slot leaks."""

from __future__ import annotations

from bench.soak import FLAGS, RETRACT, Plan, soak
from tgvkv_sglang.testing.server import launch

REQUESTS = 120


def test_soak(model_dir, tmp_path):
    flags = ("--attention-backend", "tgvkv", "--tgvkv-retention", "0.1", *FLAGS)
    with launch(model_dir, tmp_path, *flags, tokens=1000, env=RETRACT) as server:
        outcome = soak(server, Plan(requests=REQUESTS, flush_every=REQUESTS // 2, replays=25))
    assert not outcome.failures, "\n".join(outcome.failures[:5])
    assert len(outcome.memory) >= 3 and len({tuple(m.items()) for m in outcome.memory}) == 1
    counts = outcome.counts
    # The soak did what it is for: otherwise its silence means nothing.
    assert counts["answered"] >= REQUESTS // 2 and counts["answered, follow-up turns"]
    assert counts["prompt tokens from the cache"]
    assert counts["aborted mid-stream"] + counts["connections closed mid-stream"]
    assert any(name.startswith("refused") for name in counts)
    assert any(name.startswith("malformed") for name in counts)
    compared = outcome.verdicts["equal"]
    assert compared >= 5 and compared >= 9 * outcome.verdicts["toss-up"]
    assert counts["different answers among those compared"] >= 0.8 * sum(outcome.verdicts.values())
