"""Dicts that can tell what changed in them, so that whoever keeps a copy is told only that (replicas.py)."""

from collections import UserDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

V = TypeVar("V")

_LOGGED = 1000  # changes that are remembered, besides as many as there are entries


class Table(UserDict[int, V]):
    """A dict from whole numbers that remembers which of its keys changed; what was set last comes last."""

    def __init__(self, entries: Mapping[int, V] | Iterable[tuple[int, V]] = ()):
        self._log: list[int] = []  # keys, in the order of their changes
        self._forgotten = 0  # changes before those
        self.data = dict(entries)  # with these it begins: they are no changes

    def beginning(self) -> "Mark":
        """The moment when it was made, to be given to `since` later."""
        return self, 0

    def __setitem__(self, key: int, value: V) -> None:
        self.data.pop(key, None)
        self.data[key] = value
        self._note(key)

    def __delitem__(self, key: int) -> None:
        super().__delitem__(key)
        self._note(key)

    def clear(self) -> None:
        for key in [*self]:
            del self[key]

    def mark(self) -> "Mark":
        """This moment, to be given to `since` later."""
        return self, self._forgotten + len(self._log)

    def since(self, mark: "Mark | None") -> "Change[V]":
        """What makes a copy of that moment equal to this table; None: an empty one, or any."""
        table, at = mark or (None, 0)
        if table is not self or at < self._forgotten:
            return Change(True, [], dict(self.data))
        touched = dict.fromkeys(reversed(self._log[at - self._forgotten :]))  # each once, where it changed last
        keys = [*reversed(touched)]
        return Change(False, keys, {key: self.data[key] for key in keys if key in self.data})

    def _note(self, key: int) -> None:
        self._log.append(key)
        if len(self._log) > 2 * (len(self.data) + _LOGGED):
            half = len(self._log) // 2
            self._forgotten += half
            del self._log[:half]


Mark = tuple[Table[Any], int]


@dataclass(frozen=True, slots=True)
class Change(Generic[V]):
    """What happened to a table."""

    whole: bool  # `new` is all of it
    over: list[int]  # keys to be taken out first
    new: dict[int, V]  # then put in, in this order

    def apply(self, copy: dict[int, V]) -> None:
        """Make `copy` what the table is."""
        if self.whole:
            copy.clear()
        for key in self.over:
            copy.pop(key, None)
        copy.update(self.new)
