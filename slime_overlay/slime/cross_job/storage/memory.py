"""A store in this process's memory: the contract in its shortest form, and nothing durable. For tests."""

import threading
from collections.abc import Iterable
from typing import ClassVar

import pyarrow as pa

from ..errors import NotStored
from .base import Data, Store, check_key, pieces


class MemoryStore(Store):
    """Stores of the same URI are the same store."""

    _named: ClassVar[dict[str, "MemoryStore"]] = {}

    def __init__(self, uri: str):
        super().__init__(uri)
        self._values: dict[str, bytes] = {}
        self._lock = threading.Lock()

    @classmethod
    def of(cls, uri: str) -> "MemoryStore":
        return cls._named.setdefault(uri, cls(uri))

    def put(self, key: str, data: Data) -> None:
        value = b"".join(pieces(data))
        with self._lock:
            self._values[check_key(key)] = value

    def create(self, key: str, data: Data) -> bool:
        value = b"".join(pieces(data))
        with self._lock:
            return self._values.setdefault(check_key(key), value) is value

    def get(self, key: str) -> pa.Buffer:
        try:
            return pa.py_buffer(self._values[check_key(key)])
        except KeyError:
            raise NotStored(f"{self.shown} has no {key}") from None

    def delete(self, keys: Iterable[str]) -> None:
        with self._lock:
            for key in keys:
                self._values.pop(check_key(key), None)

    def keys(self, prefix: str) -> list[str]:
        with self._lock:
            return sorted(key for key in self._values if key.startswith(check_key(prefix) + "/"))
