"""SGLang plugin for tests: the pad id of a picture has no bit of its hash, so that every two pictures collide."""

from __future__ import annotations


def _one_pad_value(picture_hash: int) -> int:
    from sglang.srt.managers.schedule_batch import MM_PAD_SHIFT_VALUE

    return MM_PAD_SHIFT_VALUE


def activate() -> None:
    from sglang.srt.managers import schedule_batch

    assert callable(schedule_batch._compute_pad_value)
    schedule_batch._compute_pad_value = _one_pad_value
