"""Entry point of the ``sglang.srt.plugins`` group: register everything, or nothing and remember why.

SGLang only logs a plugin's failure and goes on as stock. A server that was asked for ``--attention-backend tgvkv``
must not do that: an unregistered backend name is refused by SGLang itself, and a half-registered plugin is refused
by ``active.require``. The ledger is checked before anything is registered: SGLang imports the hooks' modules right
afterwards anyway, so that the check costs no import of its own.
"""

from __future__ import annotations

import logging

from .. import __version__
from ..flags import BACKEND
from . import active

logger = logging.getLogger(__name__)


def _load() -> None:
    """Import our side of every hook and class but the attention backends, of which a server needs one."""
    from . import backend, batches, cpu, cuda_graphs, llava, pool, radix_cache, requests, server_args  # noqa: F401


def _register_hooks() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from .ledger import HOOKS
    from .ledger.check import REGISTERED, handler

    for hook in HOOKS:
        if hook.kind in REGISTERED:
            HookRegistry.register(hook.target, handler(hook), HookType[hook.kind])


def _register_classes() -> None:
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS, register_attention_backend
    from sglang.srt.mem_cache.registry import get_radix_cache_factory, register_radix_cache_backend
    from sglang.srt.server_args import ATTENTION_BACKEND_CHOICES, add_attention_backend_choices

    from .backend import create_backend
    from .radix_cache import create_radix_cache

    if BACKEND not in ATTENTION_BACKEND_CHOICES:
        add_attention_backend_choices([BACKEND])
    if BACKEND not in ATTENTION_BACKENDS:
        register_attention_backend(BACKEND)(create_backend)
    if get_radix_cache_factory(BACKEND) is None:
        register_radix_cache_backend(BACKEND, create_radix_cache)


def activate() -> None:
    """Called by SGLang in every process that loads plugins."""
    from .ledger.check import start_up_problems, version_problem

    try:
        found = version_problem()
        if not found:
            _load()
            found = start_up_problems()
        if found:
            active.fail(found)
            logger.error("tgvkv is not active: %s; run 'tgvkv doctor'", "; ".join(found))
            return
        _register_classes()
        _register_hooks()
    except Exception as error:
        active.fail([f"{type(error).__name__}: {error}"])
        raise
    active.succeed()
    logger.info("tgvkv %s is registered (use --attention-backend %s)", __version__, BACKEND)
