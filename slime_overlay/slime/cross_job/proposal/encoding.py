"""What the communicators keep, as bytes and back: JSON where that is enough, else Arrow; nothing is pickled.

    J  sealed JSON               what JSON gives back equal
    A  checksum, Arrow IPC       columns: equally long, non-empty lists by name, each with numbers of one type
    T  checksum, Arrow IPC       everything else, as one value of a Batch

Values come back as they went in: arrays and tensors with dtype (bfloat16, big-endian ones), shape (0-d and empty ones)
and elements; bytes, tuples, ints as keys, NaN. What differs: NumPy scalars become Python's, a Batch its columns, a
strided array is contiguous, a tensor lies on the CPU and knows no gradient; JSON sorts the keys of dicts. NumPy arrays
are read-only: copy one to change it. torch is imported where a tensor is given back, and nowhere else.
"""

from collections.abc import Mapping
from itertools import chain
from typing import Any

from ..batch import Batch
from ..errors import BadInput, BatchError, PayloadDamaged
from ..storage.payloads import checksum, opened, sealed

_COLUMNS, _JSON, _TREE = b"A", b"J", b"T"
_HEAD = 33  # the letter, and 32 digits
_AT = "column 'value', sample 0, at ['data']"


def encode(data: Any) -> list[Any]:
    """The bytes of `data`, in pieces: a letter for the kind, and the value with its checksum.

    Args:
        data: None, bool, int, float, str, bytes, NumPy arrays, torch tensors, lists, tuples and dicts of these, up to
            100 deep; or a Batch.

    Raises:
        BadInput: it holds something else (a set, an array of objects, a sparse tensor); says where.
    """
    kind, batch = _COLUMNS, data if isinstance(data, Batch) else _columns(data)
    if batch is None:
        if text := _json(data):
            return [_JSON, text]
        try:
            kind, batch = _TREE, Batch.pack({"value": [{"data": data}]})
        except BatchError as error:
            raise BadInput(str(error).replace(_AT, "data")) from None
    return [kind, checksum(batch.ipc).encode(), batch.ipc]


def decode(stored: Any) -> Any:
    """What was encoded, from a pa.Buffer. Raises PayloadDamaged; BadInput: it holds a tensor, without torch here."""
    kind = bytes(memoryview(stored)[:1])
    if kind == _JSON:
        return opened(stored.slice(1))["value"]
    if kind not in (_COLUMNS, _TREE) or stored.size < _HEAD:
        raise PayloadDamaged("this was not written by write_data or publish_data")
    seal, ipc = bytes(memoryview(stored)[1:_HEAD]).decode(errors="replace"), stored.slice(_HEAD)
    if checksum(ipc) != seal:
        raise PayloadDamaged("it has another checksum than when it was written")
    try:
        found = Batch.from_ipc(ipc).to_pydict()
        return found if kind == _COLUMNS else found["value"][0]["data"]
    except BatchError as error:
        if isinstance(error.__cause__, ImportError):
            raise
        raise PayloadDamaged(str(error)) from None
    except (KeyError, IndexError, TypeError):
        raise PayloadDamaged("its Arrow stream holds no value") from None


def _json(data: Any) -> bytes | None:
    """Sealed JSON, where that gives `data` back equal: it changes tuples, and keys that are no texts."""
    try:
        text = sealed({"value": data})
        return text if opened(text)["value"] == data else None
    except (BadInput, PayloadDamaged, RecursionError):
        return None


def _columns(data: Any) -> Batch | None:
    """Equally long, non-empty lists by name, as a batch; None: it is something else, or no batch holds it exactly."""
    if not isinstance(data, Mapping) or not data or not all(isinstance(v, list) and v for v in data.values()):
        return None
    if any(len(_number_types(column)) > 1 for column in data.values()):
        return None  # a batch would make floats of ints, or ints of bools
    try:
        return Batch.pack(data)
    except BatchError:
        return None


def _number_types(column: list[Any]) -> set[type]:
    kinds = {*map(type, column)}
    if kinds <= {list, tuple, type(None)}:
        kinds = {*map(type, chain.from_iterable(row or () for row in column))}
    return kinds & {bool, int, float}
