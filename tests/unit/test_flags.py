"""Launch flags: one table, and every route through TgvConfig's own checks."""

import argparse
import dataclasses

import pytest

from tgvkv_sglang.config import TgvConfig
from tgvkv_sglang.errors import ConfigError
from tgvkv_sglang.flags import FLAGS, add_flags, config_from


def parse(*arguments: str) -> dict:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return vars(parser.parse_args(arguments))


def test_every_field_has_a_flag_and_every_flag_a_field():
    assert [flag.field for flag in FLAGS] == [field.name for field in dataclasses.fields(TgvConfig)]


def test_no_flag_is_the_default_configuration():
    assert config_from(parse()) == TgvConfig()


def test_command_line_and_keywords_agree():
    config = config_from(
        parse("--tgvkv-retention", "0.05", "--tgvkv-scope", "total", "--tgvkv-reclaim", "eager",
              "--tgvkv-full-budget", "0.5", "--tgvkv-grounding-cap", "64", "--tgvkv-stash-mib", "7",
              "--tgvkv-trace-dir", "traces")
    )  # fmt: skip
    assert config == TgvConfig(0.05, "total", "eager", "tgv", "own", 0.5, 64, 7, "traces")
    assert config == config_from({f"tgvkv_{name}": value for name, value in dataclasses.asdict(config).items()})


@pytest.mark.parametrize("arguments", [("--tgvkv-retention", "x"), ("--tgvkv-scope", "all")])
def test_the_parser_refuses(arguments, capsys):
    with pytest.raises(SystemExit):
        parse(*arguments)
    assert arguments[0] in capsys.readouterr().err


def test_values_the_parser_reads_are_still_checked():
    with pytest.raises(ConfigError, match="--tgvkv-retention"):
        config_from(parse("--tgvkv-retention", "1.5"))


def test_unknown_keyword_is_named():
    with pytest.raises(ConfigError, match="tgvkv_rention.*tgvkv_retention"):
        config_from({"tgvkv_rention": 0.5})


def test_help_states_the_defaults(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    text = capsys.readouterr().out
    for flag in FLAGS:
        assert flag.option in text
        assert f"Default: {getattr(TgvConfig(), flag.field)}" in " ".join(text.split())
