"""Named exceptions. Each message gives the value received and the way out."""


class TgvkvError(Exception):
    """Base of every error this package raises on purpose, the demo's picture and question makers aside.

    Each one also derives from the built-in exception that fits it.
    """


class ConfigError(TgvkvError, ValueError):
    """A flag or a per-request option has a value that cannot be used."""


class UnsupportedServerError(TgvkvError, ValueError):
    """The server is configured with a feature that tgvkv cannot run beside."""


class NotActiveError(TgvkvError, RuntimeError):
    """The plugin is only half installed in this process (a hook, a class or a name that we lean on is missing)."""


class LedgerError(TgvkvError, ImportError):
    """Something that the ledger names is not in the installed SGLang."""


class NotSelfAttentionError(TgvkvError, NotImplementedError):
    """A layer of the model is no decoder self-attention.

    Args:
        layer: the layer's number in the model.
    """

    def __init__(self, layer: int):
        super().__init__(
            f"layer {layer} is cross-attention or an encoder's, tgvkv serves decoder self-attention only: serve this "
            "model without --attention-backend tgvkv"
        )


class KVLayoutError(TgvkvError, ValueError):
    """K and V do not lie in memory as units need them."""


class WrongBatchError(TgvkvError, RuntimeError):
    """A backend was given another batch than the one whose requests were noted."""


class SpanError(TgvkvError, ValueError):
    """A span has bounds that cannot be."""


class SelectionError(TgvkvError, RuntimeError):
    """One request's scores cannot be selected on. It costs that request its view, never the server."""


class NeverScoredError(SelectionError):
    """A prefill that selects ended with layers that were never scored: a bug, not bad numbers."""


class IntegrityError(TgvkvError, RuntimeError):
    """A slot has no owner or two owners, or a lock is let go twice. The message carries the numbers."""
