"""The ledger's records as JSON, for a durable store: nothing that is read back can execute anything.

Plain values stay what they are; everything else is an object with its kind under "~". Clients are written once and
named by their id elsewhere, because the ledger shares them. What ends with the process that said it (`facts`) is left
out, and so are a job's tables, which are written apart (wal.py).
"""

import json
from dataclasses import fields, is_dataclass
from typing import Any

from ..errors import BadInput
from ..types import ClientInfo, Ids, Located, LocatedValue, Payload
from .gate import Gate
from .state import TABLES, Client, Event, Group, Job, Progress

_KINDS: dict[str, type] = {
    kind.__name__: kind
    for kind in (Job, Group, Client, Gate, ClientInfo, Payload, Located, LocatedValue, Progress, Event)
}
_LEFT_OUT = {"Client": ("facts",), "Job": TABLES}
_GONE = {"ClientInfo": {"cluster", "one_cluster"}, "Client": {"last_beat_wall"}}  # fields that earlier versions wrote
_KIND = "~"


def encode(value: Any) -> bytes:
    """JSON text of records and plain values. Raises BadInput for anything else."""
    return json.dumps(_plain(value), separators=(",", ":"), sort_keys=True).encode()


def decode(text: bytes) -> Any:
    """The value again. Raises BadInput for what `encode` never wrote."""
    try:
        return _Reader().record(json.loads(text))
    except BadInput:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError) as error:
        raise BadInput(f"these are no records of the ledger: {type(error).__name__}: {error}") from None


def _plain(value: Any, inside: bool = False) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    kind = type(value).__name__
    if isinstance(value, Ids):
        return {_KIND: "Ids", "ranges": value.ranges()}
    if isinstance(value, Client) and inside:
        return {_KIND: "client", "id": value.info.client_id}
    if _KINDS.get(kind) is type(value) and is_dataclass(value):
        left_out = _LEFT_OUT.get(kind, ())
        named = {f.name: getattr(value, f.name) for f in fields(value) if f.name not in left_out}
        return {_KIND: kind, **{name: _plain(item, True) for name, item in named.items()}}
    if isinstance(value, dict):
        if all(isinstance(key, str) for key in value) and _KIND not in value:
            return {key: _plain(item, inside) for key, item in value.items()}
        return {_KIND: "map", "items": [[_plain(k, inside), _plain(v, inside)] for k, v in value.items()]}
    if isinstance(value, list):
        return [_plain(item, inside) for item in value]
    if isinstance(value, (tuple, set, frozenset)):
        name = "tuple" if isinstance(value, tuple) else "set"
        return {_KIND: name, "items": [_plain(item, inside) for item in value]}
    raise BadInput(
        f"a {kind} cannot be kept in a durable store: `meta` and `source` may hold what JSON can: numbers, texts, "
        "lists, dicts"
    )


class _Reader:
    def __init__(self) -> None:
        self._clients: dict[str, Client] = {}

    def record(self, found: Any) -> Any:
        self._read_clients(found)
        return self._value(found)

    def _read_clients(self, found: Any) -> None:
        """Clients first: others name them."""
        if isinstance(found, dict):
            if found.get(_KIND) == "Client":
                client = self._made(Client, found)
                self._clients[client.info.client_id] = client
                return
            found = [*found.values()]
        if isinstance(found, list):
            for item in found:
                self._read_clients(item)

    def _value(self, found: Any) -> Any:
        if isinstance(found, list):
            return [self._value(item) for item in found]
        if not isinstance(found, dict):
            return found
        kind = found.get(_KIND)
        if kind is None:
            return {key: self._value(item) for key, item in found.items()}
        if kind == "client":
            return self._clients.get(found["id"])
        if kind == "Client":
            return self._clients[found["info"]["client_id"]]
        if kind == "Ids":
            return Ids.of_ranges(found["ranges"])
        if kind == "map":
            return {self._value(key): self._value(item) for key, item in found["items"]}
        if kind in ("tuple", "set"):
            items = [self._value(item) for item in found["items"]]
            return tuple(items) if kind == "tuple" else set(items)
        if kind not in _KINDS:
            raise BadInput(f"records of a kind that this version does not know: {kind!r:.50}")
        return self._made(_KINDS[kind], found)

    def _made(self, kind: type, found: dict[str, Any]) -> Any:
        given = {name: self._value(item) for name, item in found.items() if name != _KIND}
        for name in _GONE.get(kind.__name__, ()):
            given.pop(name, None)
        if unknown := set(given) - {f.name for f in fields(kind)}:
            raise BadInput(
                f"{kind.__name__} records with {', '.join(sorted(unknown))}, which this version does not know"
            )
        return kind(**given)
