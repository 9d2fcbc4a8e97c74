"""Radix namespaces: values made from validated options; what a client writes is never taken for one."""

import pickle
from itertools import product

import pytest

from tgvkv_sglang.config import TgvConfig
from tgvkv_sglang.errors import ConfigError
from tgvkv_sglang.namespace import Namespace, SaltedKey, client_key


def test_each_combination_is_a_namespace_of_its_own():
    options = product((0.1, 0.2, 1.0), ("vision", "total"), ("tgv", "peak"), ("tvb", "uniform"))
    configs = [TgvConfig(retention=r, scope=s, policy=p, budget=b) for r, s, p, b in options]
    keys, adapters = (None, "a", "b", client_key(SaltedKey("a", None))), (None, "adapter")
    namespaces = {Namespace.of(*parts) for parts in product(configs, keys, adapters)}
    assert len(namespaces) == len(configs) * len(keys) * len(adapters)
    assert Namespace.of(TgvConfig(retention=0.1), "a") == Namespace.of(TgvConfig(retention=0.1, grounding_cap=7), "a")
    assert Namespace.of(TgvConfig(), "") == Namespace.of(TgvConfig(), None)
    assert Namespace.of(TgvConfig(budget="own")) == Namespace.of(TgvConfig(budget="tvb"))


def test_only_retention_one_keeps_a_plain_tree():
    assert Namespace.of(TgvConfig(retention=0.99)).evicts and not Namespace.of(TgvConfig(retention=1.0)).evicts


def test_an_adapter_is_not_part_of_the_clients_key():
    """SGLang appends the adapter's id to the key; the id alone as a key must not be that adapter's namespace."""
    assert Namespace.of(TgvConfig(), "adapter") != Namespace.of(TgvConfig(), "adapter", "adapter")


def test_salt_and_key_stay_apart():
    pairs = [("a", "bc"), ("ab", "c"), ("abc", None), ("abc", ""), ("", "abc"), ('a", "b', "c"), ("a", 'b", "c')]
    keys = [client_key(SaltedKey(*pair)) for pair in pairs]
    assert len(set(keys)) == len(pairs) - 1 and keys[2] == keys[3]
    assert client_key("abc") not in keys
    assert all(type(key) is str for key in keys)


def test_a_salted_key_survives_the_way_to_the_scheduler():
    key = client_key(SaltedKey("salt", "key"))
    assert pickle.loads(pickle.dumps(key)) == key


@pytest.mark.parametrize("key", ["\x1f", "\x1ftgvkv-retention=nan", str(SaltedKey("a", "b"))])
def test_a_clients_key_cannot_pose_as_a_salted_one(key):
    with pytest.raises(ConfigError, match="extra_key.*U\\+001F"):
        client_key(str.__str__(key))


@pytest.mark.parametrize("key", [None, "", "tenant", "tgvkv-retention=1.0", "a\x1fb", "\x1e"])
def test_other_keys_are_left_alone(key):
    assert client_key(key) == key


@pytest.mark.parametrize("key", ([], ["a"], 5))
def test_a_key_that_is_no_text_is_refused_by_value(key):
    with pytest.raises(ConfigError, match="extra_key must be a string") as error:
        client_key(key)
    assert repr(key) in str(error.value)
