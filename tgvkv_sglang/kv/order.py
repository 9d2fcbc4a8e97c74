"""Nodes in the order in which they go."""

from __future__ import annotations

from typing import Iterator

from sortedcontainers import SortedList

from .nodes import Node


class Order:
    """Nodes sorted by a key, each at most once; a change takes logarithmic time.

    Keys are tuples that end with the node's age, so that no two of them are equal.
    """

    def __init__(self) -> None:
        self._entries: SortedList = SortedList()  # (key, node)
        self._keys: dict[Node, tuple] = {}

    def __contains__(self, node: Node) -> bool:
        return node in self._keys

    def __iter__(self) -> Iterator[Node]:
        return (node for _, node in self._entries)

    def first(self) -> Node | None:
        return self._entries[0][1] if self._entries else None

    def put(self, node: Node, key: tuple) -> None:
        """Add ``node``, or move it to where its new key belongs."""
        if self._keys.get(node) != key:
            self.discard(node)
            self._keys[node] = key
            self._entries.add((key, node))

    def discard(self, node: Node) -> None:
        key = self._keys.pop(node, None)
        if key is not None:
            self._entries.remove((key, node))
