"""What a row of the ledger is."""

from __future__ import annotations

from dataclasses import dataclass

SGLANG_VERSION = "0.5.17"


@dataclass(frozen=True)
class Hook:
    """One function of SGLang that we wrap, replace or call although it is private.

    Attributes:
        target: dotted name of the function.
        kind: AFTER or AROUND (registered with SGLang's HookRegistry), PATCH (replaced on one instance at run time) or
            CALL (a private method that we call).
        handler: ``module:name`` of ours, relative to ``sglang_seam``.
        parameters: the target's parameters, in order, without ``cls``; empty where any will do.
        how: what our side does.
        why: what it is for.
        remove_when: what SGLang would have to offer for the row to go.
    """

    target: str
    kind: str
    handler: str
    parameters: tuple[str, ...]
    how: str
    why: str
    remove_when: str

    @property
    def users(self) -> tuple[str, ...]:
        return (self.handler.split(":")[0],)


@dataclass(frozen=True)
class Members:
    """Names of one class or object (of SGLang's or FlashInfer's) that we lean on.

    Attributes:
        target: dotted name of the class or object.
        kind: ATTRIBUTE (we read or assign it, or call a public method), OVERRIDE (methods that our subclass replaces;
            ``handler`` is that class and its signatures must fit) or OPTIONAL (asked for with a default: a missing
            name is a case of its own, so that nothing can be checked).
        names: the names.
        handler: ``module`` or ``module:class`` of ours, relative to ``sglang_seam``; several modules apart by commas.
        how: read or assigned, and what is assumed beyond the name.
        why: what it is for.
        remove_when: what SGLang would have to offer for the row to go.
    """

    target: str
    kind: str
    names: tuple[str, ...]
    handler: str
    how: str
    why: str
    remove_when: str

    @property
    def users(self) -> tuple[str, ...]:
        return tuple(user.split(":")[0] for user in self.handler.split(","))


Row = Hook | Members
SRT = "sglang.srt."
