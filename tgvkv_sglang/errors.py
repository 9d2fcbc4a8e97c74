"""Named exceptions. Each message gives the value received and the way out."""


class TgvkvError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(TgvkvError, ValueError):
    """A flag or a per-request option has a value that cannot be used."""


class UnsupportedServerError(TgvkvError, ValueError):
    """The server is configured with a feature that tgvkv cannot run beside."""


class NotActiveError(TgvkvError, RuntimeError):
    """The plugin is only half installed in this process (a hook or a class of ours is missing)."""


class SelectionError(TgvkvError, RuntimeError):
    """One request's scores cannot be selected on. It costs that request its view, never the server."""


class NeverScoredError(SelectionError):
    """A prefill that selects ended with layers that were never scored: a bug, not bad numbers."""


class IntegrityError(TgvkvError, RuntimeError):
    """A slot has no owner or two owners. The message carries the numbers."""
