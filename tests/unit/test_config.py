"""Configuration and per-request options."""

import dataclasses
import math
from fractions import Fraction

import pytest

from tgvkv_sglang.config import RequestOptions, TgvConfig
from tgvkv_sglang.errors import ConfigError, TgvkvError


@pytest.mark.parametrize(
    ("field", "bad"),
    [("retention", bad) for bad in (0, -0.1, 1.5, math.nan, math.inf, "x", "0.5", None, True)]
    + [("scope", "layer"), ("reclaim", "never"), ("policy", "kvzip"), ("budget", "vision"), ("scope", None)]
    + [("full_budget", bad) for bad in (-0.1, 1.1, math.nan, "x", True, None)]
    + [("grounding_cap", bad) for bad in (0, -1, 1.5, "x", True)],
)
def test_bad_values_name_the_flag_and_the_value(field, bad):
    with pytest.raises(ConfigError) as error:
        TgvConfig(**{field: bad})
    assert f"--tgvkv-{field.replace('_', '-')}" in str(error.value) and repr(bad) in str(error.value)
    assert isinstance(error.value, ValueError) and isinstance(error.value, TgvkvError)


@pytest.mark.parametrize("good", [1e-9, 0.1, 1, 1.0])
def test_good_retention(good):
    config = TgvConfig(retention=good)
    assert config.evicts == (good != 1)


def test_config_is_frozen_and_exact():
    config = TgvConfig(retention=0.1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.retention = 0.2
    assert config.exact_retention == Fraction(1, 10)
    assert TgvConfig(retention=1e-7).exact_retention == Fraction(1, 10**7)
    assert TgvConfig(**dataclasses.asdict(config)) == config


def test_eager_is_a_budget_of_nothing():
    assert TgvConfig(reclaim="eager", full_budget=0.7).reclaimable_share == 0.0
    assert TgvConfig(reclaim="pressure", full_budget=0.7).reclaimable_share == 0.7


@pytest.mark.parametrize("params", [None, {}, {"other": 1}, {1: 2}, "text", {"tgvkv_retention": None}])
def test_requests_without_options(params):
    assert RequestOptions.from_custom_params(params) == RequestOptions()


def test_request_options():
    server = TgvConfig(retention=0.1, scope="total")
    options = RequestOptions.from_custom_params({"tgvkv_retention": 1, "tgvkv_trace": True, "other": []})
    assert options == RequestOptions(retention=1.0, trace=True)
    assert options.apply(server) == TgvConfig(retention=1.0, scope="total")
    assert RequestOptions().apply(server) is server


@pytest.mark.parametrize("bad", [0, 1.5, "x", -1, math.nan, True, [0.1], {}])
def test_bad_request_retention(bad):
    with pytest.raises(ConfigError, match="tgvkv_retention.*got"):
        RequestOptions.from_custom_params({"tgvkv_retention": bad})


@pytest.mark.parametrize("option", ["tgvkv_policy", "tgvkv_budget"])
@pytest.mark.parametrize("bad", ["none of them", 1, [], {}, "tgv\n", True])
def test_bad_request_policy_and_budget(option, bad):
    with pytest.raises(ConfigError, match=rf"{option}'\] must be one of .*got"):
        RequestOptions.from_custom_params({option: bad})


def test_a_request_chooses_its_policy_and_budget():
    options = RequestOptions.from_custom_params({"tgvkv_policy": "tgv", "tgvkv_budget": "tvb"})
    assert options == RequestOptions(policy="tgv", budget="tvb")
    assert options.apply(TgvConfig(retention=0.3)) == TgvConfig(retention=0.3, policy="tgv", budget="tvb")


def test_the_stash_bounds_the_grounding_tokens():
    config = TgvConfig(stash_mib=1, grounding_cap=100)
    assert config.within(2**20 // 64) == TgvConfig(stash_mib=1, grounding_cap=64)
    assert config.within(8) == config
    with pytest.raises(ConfigError, match="--tgvkv-stash-mib 1 holds no token"):
        config.within(2**20 + 1)


@pytest.mark.parametrize("bad", [1, "true", None, 0.0])
def test_bad_request_trace(bad):
    with pytest.raises(ConfigError, match="tgvkv_trace.*true or false"):
        RequestOptions.from_custom_params({"tgvkv_trace": bad})


def test_unknown_request_option_is_named():
    with pytest.raises(ConfigError, match="tgvkv_retain.*tgvkv_retention, tgvkv_policy, tgvkv_budget, tgvkv_trace"):
        RequestOptions.from_custom_params({"tgvkv_retain": 0.5})


def test_the_budget_rule_is_the_policys_own_unless_another_is_named():
    assert TgvConfig().rule == "tvb" and TgvConfig(policy="pyramidkv").rule == "pyramid"
    assert TgvConfig(policy="pyramidkv", budget="uniform").rule == "uniform"
    options = RequestOptions.from_custom_params({"tgvkv_policy": "vl-cache"})
    assert options.apply(TgvConfig()).rule == "vl-cache"
