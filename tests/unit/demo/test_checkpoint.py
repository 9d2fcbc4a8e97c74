"""The parts that checkpoints are put together from, without any weights."""

import pytest
from transformers import AutoConfig, AutoProcessor, AutoTokenizer, GenerationConfig

from tgvkv_sglang.demo.checkpoint import SPECIAL_TOKENS, byte_tokenizer, new_directory
from tgvkv_sglang.demo.qwen3_vl import make_config, mrope_section, write_checkpoint


def test_tokens_beyond_the_bytes_are_said_but_never_read():
    tokenizer = byte_tokenizer(("Ġred", "Ġblue"))
    first = 256 + len(SPECIAL_TOKENS)
    assert len(tokenizer) == first + 2
    assert tokenizer.encode("a red") == list(b"a red")
    assert tokenizer.decode([first, first + 1]) == " red blue"


@pytest.mark.parametrize("head_dim, section", [(32, [6, 5, 5]), (64, [12, 10, 10]), (128, [24, 20, 20])])
def test_rotary_sections_fill_half_a_head(head_dim, section):
    assert mrope_section(head_dim) == section and sum(section) == head_dim // 2


def test_a_shape_without_weights_is_a_whole_checkpoint(tmp_path):
    tokenizer = byte_tokenizer(max_length=512)
    text = {"hidden_size": 64, "head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 263}
    config = make_config(tokenizer, text=text, vision={"hidden_size": 32}, rope_theta=5e6, dtype="bfloat16")
    write_checkpoint(tmp_path, tokenizer, config, image_tokens=(4, 16))
    read = AutoConfig.from_pretrained(tmp_path)
    assert read.architectures == ["Qwen3VLForConditionalGeneration"]
    assert read.text_config.rope_parameters["rope_theta"] == 5e6
    assert read.vision_config.out_hidden_size == 64
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == read.text_config.eos_token_id == 258
    assert AutoTokenizer.from_pretrained(tmp_path).model_max_length == 512
    assert dict(AutoProcessor.from_pretrained(tmp_path).image_processor.size) == {
        "shortest_edge": 4096, "longest_edge": 16384,
    }  # fmt: skip
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_directory_that_fails_to_be_filled_is_not_there(tmp_path):
    with pytest.raises(OSError, match="disk full"), new_directory(tmp_path / "model") as staging:
        (staging / "config.json").write_text("{}")
        raise OSError("disk full")
    assert not list(tmp_path.iterdir())
    with new_directory(tmp_path / "model") as staging:
        (staging / "config.json").write_text("{}")
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "config.json"]
