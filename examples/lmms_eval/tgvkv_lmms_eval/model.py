"""lmms-eval's own client for OpenAI servers, with this project's request options and without its silent failures."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from lmms_eval.models.chat.async_openai import AsyncOpenAIChat

from tgvkv_sglang.errors import ConfigError

from . import extra_body

OURS = {"retention", "policy", "budget"}
OF_THE_COMMAND_LINE = {"batch_size", "max_batch_size", "device"}
"""What lmms-eval hands to every model; a server at the other end of a connection has no use for it."""
FAILED = "[LMMS_EVAL_"
"""How lmms-eval begins the answer that it puts in the place of one that it did not get."""


class TgvkvChat(AsyncOpenAIChat):
    """``--model tgvkv``. ``model_args`` are ``retention``, ``policy``, ``budget`` and those of ``async_openai``.

    Requests leave in the order of the documents unless ``prefix_aware_queue=True``: a chat's turns must stay in order.

    Raises:
        ConfigError: an option that the server would refuse, or a name that nobody knows, which ``async_openai`` would
            ignore and so measure something else than was asked for.
    """

    def __init__(
        self,
        retention: float | None = None,
        policy: str | None = None,
        budget: str | None = None,
        base_url: str = "http://127.0.0.1:30000/v1",
        api_key: str = "none",
        model_version: str = "default",
        prefix_aware_queue: bool = False,
        **settings: Any,
    ) -> None:
        own = extra_body(retention=retention, policy=policy, budget=budget)
        settings = {name: value for name, value in settings.items() if name not in OF_THE_COMMAND_LINE}
        known = set(inspect.signature(AsyncOpenAIChat.__init__).parameters) - {"self", "kwargs"}
        unknown = sorted(set(settings) - known)
        if unknown:
            raise ConfigError(f"model_args has no {unknown[0]!r}; use one of {', '.join(sorted(known | OURS))}")
        super().__init__(
            base_url=base_url,
            api_key=api_key,
            model_version=model_version,
            prefix_aware_queue=prefix_aware_queue,
            **settings,
        )
        completions = self.client.chat.completions
        completions.create = functools.partial(completions.create, extra_body=own)

    def generate_until(self, requests) -> list:
        """Answers in the order of ``requests``.

        Raises:
            RuntimeError: the server did not answer one of them; lmms-eval alone would score that as a wrong answer.
        """
        answers = super().generate_until(requests)
        failed = [answer.text for answer in answers if answer.text.startswith(FAILED)]
        if failed:
            raise RuntimeError(f"{len(failed)} of {len(answers)} requests got no answer; the first: {failed[0]}")
        return answers
