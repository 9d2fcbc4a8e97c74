"""Options and Hypothesis profiles for the whole suite."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tgvkv_sglang.demo.tiny_model import make_tiny_model

# Deterministic and without a deadline: the machine may be busy, and a failure must come back on the next run.
settings.register_profile(
    "tgvkv", derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("tgvkv")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="also run the long profiles (marker `long`), minutes each")


@pytest.hookimpl(trylast=True)  # the folders have marked their tests
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Long profiles are not part of the suite unless --long (or -m long) asks for them.

    Live servers go first: of two workers, neither is left alone with minutes of them in the end.
    """
    items.sort(key=lambda item: item.get_closest_marker("server") is None)
    if config.getoption("--long") or config.getoption("-m"):
        return
    long = [item for item in items if item.get_closest_marker("long")]
    if long:
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in long]


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory) -> Path:
    """A randomly initialised Qwen3-VL."""
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny", seed=0)
