"""Methods that take the arguments of the installed FlashInfer's, by its own signatures."""

from __future__ import annotations

import functools
import inspect
from typing import Any, Callable


class Arguments:
    """The arguments of one call as attributes, defaults filled in; remembers which were read."""

    def __init__(self, values: dict[str, Any]) -> None:
        self._values, self._read = values, set()

    def __getattr__(self, name: str) -> Any:
        self._read.add(name)
        return self._values[name]

    def unread(self) -> set[str]:
        return self._values.keys() - self._read


def bound(real: Callable, *ignored: str) -> Callable:
    """Decorator of ``method(self, a)``: callers call it as they call ``real``, ``a`` are the :class:`Arguments`.

    An argument that the method does not read must be ``real``'s default or one of ``ignored``, which change how a GPU
    computes and not what; any other raises NotImplementedError, so nothing that is asked for is passed over.
    """
    signature = inspect.signature(real)
    unknown = set(ignored) - signature.parameters.keys()
    if unknown:
        raise TypeError(f"{real.__qualname__} takes no {', '.join(sorted(unknown))}")

    def decorate(method: Callable) -> Callable:
        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs)
            given.apply_defaults()
            me = given.arguments.pop("self")
            a = Arguments(given.arguments)
            result = method(me, a)
            passed_over = {name: given.arguments[name] for name in a.unread() - {*ignored} if _asked(given, name)}
            if passed_over:
                raise NotImplementedError(f"the fake FlashInfer has no {', '.join(passed_over)} (got {passed_over})")
            return result

        call.__signature__ = signature
        return call

    return decorate


def _asked(given: inspect.BoundArguments, name: str) -> bool:
    """Whether an argument is anything but its default (for ``*args``: anything at all)."""
    value, parameter = given.arguments[name], given.signature.parameters[name]
    default = () if parameter.kind is parameter.VAR_POSITIONAL else parameter.default
    return type(value) is not type(default) or value != default
