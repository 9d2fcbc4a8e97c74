"""lmms-eval's model ``tgvkv``: a running ``tgvkv serve``, with retention, policy and budget given with each request.

    lmms-eval --model tgvkv --model_args base_url=http://127.0.0.1:30000/v1,retention=0.05 --tasks chartqa

``docs/evaluation.md`` has the commands.
"""

from __future__ import annotations

from typing import Any

from tgvkv_sglang.config import RequestOptions


def manifest():
    """What lmms-eval registers; it looks for this in the entry-point group ``lmms_eval.models``."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="tgvkv", chat_class_path="tgvkv_lmms_eval.model.TgvkvChat")


def extra_body(**options: Any) -> dict[str, Any]:
    """What each request carries beside the chat.

    Args:
        options: ``retention``, ``policy``, ``budget``; None is the server's.

    Raises:
        ConfigError: the server would refuse the value.
    """
    custom = {f"tgvkv_{name}": value for name, value in options.items() if value is not None}
    RequestOptions.from_custom_params(custom)
    return {"custom_params": custom} if custom else {}
