"""What small checkpoints made offline share, whatever the model: a tokenizer, generation defaults, a whole directory.

A checkpoint is a directory in Hugging Face layout, which stock transformers and SGLang load. Its tokenizer is
byte-level without merges, so no vocabulary has to be fetched and prompts have lengths that can be counted by hand.

transformers, tokenizers and torch are imported inside the functions only, so importing this module costs nothing.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Iterable, Iterator, Mapping

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase, Qwen2Tokenizer

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
EOS_TOKEN = "<|im_end|>"
PAD_TOKEN = "<|endoftext|>"

# Qwen3-VL's turn format without tools and without a default system prompt. The loop over message['content'] is also
# what SGLang looks for to tell that image parts may stay where the client put them.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for content in message['content'] -%}
{%- if content['type'] == 'image' or content['type'] == 'image_url' or 'image' in content -%}
{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif content['type'] == 'video' or content['type'] == 'video_url' or 'video' in content -%}
{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
{%- elif 'text' in content -%}
{{- content['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def byte_tokenizer(
    more: Iterable[str] = (),
    *,
    special: Iterable[str] = (),
    named: Mapping[str, str] | None = None,
    max_length: int = 32768,
) -> Qwen2Tokenizer:
    """Byte-level BPE with no merges: every byte is one token, so decode then encode is exact for any valid UTF-8.

    Ids 0-255 are the bytes, then come ``SPECIAL_TOKENS``, then those of another family (``special``), then ``more`` (in
    the byte-level vocabulary's spelling, "Ġ" for a space): tokens no prompt is encoded to, but a model may generate.

    Args:
        named: special tokens that processors ask the tokenizer for by a name (``image_token``).
    """
    from transformers import Qwen2Tokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    vocab = {char: byte for byte, char in bytes_to_unicode().items()}
    special = (*SPECIAL_TOKENS, *special)
    for token in (*special, *more):
        vocab[token] = len(vocab)
    return Qwen2Tokenizer(
        vocab=vocab,
        merges=[],
        unk_token=PAD_TOKEN,
        eos_token=EOS_TOKEN,
        pad_token=PAD_TOKEN,
        additional_special_tokens=list(special),
        chat_template=CHAT_TEMPLATE,
        model_specific_special_tokens=dict(named or {}),
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def greedy(tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """``generation_config.json``: greedy, until the tokenizer's end-of-turn token."""
    from transformers import GenerationConfig

    return GenerationConfig(do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)


@contextmanager
def new_directory(directory: str | os.PathLike[str]) -> Iterator[Path]:
    """A directory that appears whole or not at all: the block fills another one beside it, which is then renamed.

    Raises:
        FileExistsError: ``directory`` exists and is not an empty directory.
    """
    target = Path(directory).resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} exists and is not empty; remove it or choose another directory")
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield staging
        staging.chmod(0o755)
        if target.exists():
            target.rmdir()
        staging.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
