"""Trees: nested Python values as JSON text plus a binary row for what JSON has no words for.

Plain JSON values stand for themselves. Everything else is an object with exactly one key that starts with "$":

    {"$tuple": [...]}        {"$dict": [[key, value], ...]}   keys that are not str, or that look like a tag
    {"$int": "0x..."}        beyond 64 bits                   {"$float": "7ff8..."}  NaN and infinities, by their bits
    {"$str": "eda080"}       text with lone surrogates        {"$bytes": [offset, length]}  into the binary row
    {"$array": [library, dtype, shape, offset]}               NumPy array or torch tensor, in the binary row

Lossless, dict order included; sharing of one object in two places is not kept. Decoding builds only the types above.
"""

import json
import math
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import BatchError
from . import arrays
from .arrays import ALIGNMENT, Leaf, LeafType, Unsupported

MAX_DEPTH = 100  # levels of containers; leaves room for the JSON codec under Python's recursion limit of 1000

_INT64 = 1 << 63
_NUMPY_SCALARS = (np.bool_, np.integer, np.floating, np.str_, np.bytes_)
_ADVICE = "use None, bool, int, float, str, bytes, list, tuple, dict, NumPy arrays or torch tensors"


class TreeWriter:
    """Encodes values one after the other; `parts` and `size` are the binary row of those since `reset`."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.parts: list[tuple[int, bytes | Leaf]] = []
        self.size = 0
        self._open: set[int] = set()

    def encode(self, value: Any) -> bytes:
        """JSON text (UTF-8) of one value. Raises Unsupported, with the path to the culprit."""
        try:
            return json.dumps(self._encode(value), ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
        except RecursionError:
            raise Unsupported("nested too deep for this Python's recursion limit") from None

    def _encode(self, value: Any) -> Any:
        kind = type(value)
        if value is None or kind is bool:
            return value
        if kind is str:
            return value if _is_text(value) else {"$str": value.encode("utf-8", "surrogatepass").hex()}
        if kind is int:
            return value if -_INT64 <= value < _INT64 else {"$int": hex(value)}
        if kind is float:
            return value if math.isfinite(value) else {"$float": struct.pack(">d", value).hex()}
        if kind is list or kind is tuple or kind is dict:
            return self._container(value)
        if kind is bytes:
            return {"$bytes": [self._append(value, len(value)), len(value)]}
        if isinstance(value, np.generic):
            return self._encode(numpy_scalar(value))
        if arrays.is_leaf(value):
            leaf = arrays.describe(value)
            return {"$array": [*leaf.type.to_json(), list(leaf.shape), self._append(leaf, leaf.nbytes)]}
        raise Unsupported(f"{arrays.type_name(value)} cannot be stored: {_ADVICE}")

    def _container(self, value: Any) -> Any:
        if id(value) in self._open:
            raise Unsupported("the value contains itself")
        if len(self._open) >= MAX_DEPTH:
            raise Unsupported(f"nested deeper than {MAX_DEPTH} levels")
        self._open.add(id(value))
        key: Any = None
        try:
            if type(value) is dict:
                plain = all(type(key) is str and not key.startswith("$") and _is_text(key) for key in value)
                if plain:
                    encoded: Any = {}
                    for key, item in value.items():
                        encoded[key] = self._encode(item)
                    return encoded
                pairs = []
                for key, item in value.items():
                    pairs.append([self._encode(key), self._encode(item)])
                return {"$dict": pairs}
            items: list[Any] = []
            for item in value:
                key = len(items)
                items.append(self._encode(item))
            return items if type(value) is list else {"$tuple": items}
        except Unsupported as error:
            error.path.append(f"[{arrays.short(key)}]")
            raise
        finally:
            self._open.discard(id(value))

    def _append(self, part: bytes | Leaf, nbytes: int) -> int:
        offset = self.size
        if nbytes:
            self.parts.append((offset, part))
            self.size += -(-nbytes // ALIGNMENT) * ALIGNMENT
        return offset


def write_parts(parts: list[tuple[int, bytes | Leaf]], out: npt.NDArray[np.uint8]) -> None:
    """Fill a binary row of `TreeWriter.size` bytes."""
    end = 0
    for offset, part in parts:
        out[end:offset] = 0
        if isinstance(part, bytes):
            end = offset + len(part)
            out[offset:end] = np.frombuffer(part, np.uint8)
        else:
            end = offset + part.nbytes
            part.write(out[offset:end])
    out[end:] = 0


def decode(text: bytes, blob: npt.NDArray[np.uint8]) -> Any:
    """The value again; arrays are read-only views of `blob`. Raises BatchError for text that `encode` cannot write."""

    def restore(node: dict[str, Any]) -> Any:
        if len(node) == 1:
            ((tag, payload),) = node.items()
            if tag.startswith("$"):
                if tag not in _RESTORE:
                    raise BatchError(f"unknown tag {arrays.short(tag)}")
                return _RESTORE[tag](payload, blob)
        elif any(key.startswith("$") for key in node):
            raise BatchError("a tag beside other keys")
        return node

    try:
        return json.loads(text, object_hook=restore, parse_constant=_refuse_constant)
    except BatchError:
        raise
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError, MemoryError, struct.error) as error:
        raise BatchError(f"the stored value cannot be read: {arrays.short(str(error))}") from None


def numpy_scalar(value: Any) -> Any:
    """The equal Python value of a NumPy scalar. Raises Unsupported where there is none (longdouble, dates)."""
    python = value.item()
    if isinstance(value, _NUMPY_SCALARS) and not isinstance(python, np.generic):
        return python
    raise Unsupported(f"the NumPy scalar {arrays.type_name(value)} has no equal Python value: use np.asarray(x)")


def _is_text(value: str) -> bool:
    """Whether UTF-8 can hold it: lone surrogates cannot be encoded."""
    if value.isascii():
        return True
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _refuse_constant(name: str) -> Any:
    raise BatchError(f"{name} is not JSON")


def _restore_bytes(payload: Any, blob: npt.NDArray[np.uint8]) -> bytes:
    offset, length = payload
    return _cut(blob, offset, length).tobytes()


def _restore_array(payload: Any, blob: npt.NDArray[np.uint8]) -> Any:
    library, token, shape, offset = payload
    leaf_type = LeafType.from_json([library, token])
    return arrays.restore(leaf_type, arrays.view(leaf_type, shape, _cut(blob, offset, None)))


def _cut(blob: npt.NDArray[np.uint8], offset: Any, length: Any) -> npt.NDArray[np.uint8]:
    end = blob.size if length is None else offset + length
    if type(offset) is not int or type(end) is not int or not 0 <= offset <= end <= blob.size:
        raise BatchError("a stored value points outside its binary row")
    return blob[offset:end]


_RESTORE: dict[str, Callable[[Any, npt.NDArray[np.uint8]], Any]] = {
    "$tuple": lambda items, blob: tuple(items),
    "$dict": lambda pairs, blob: dict(pairs),
    "$int": lambda digits, blob: int(digits, 16),
    "$float": lambda bits, blob: struct.unpack(">d", bytes.fromhex(bits))[0],
    "$str": lambda data, blob: bytes.fromhex(data).decode("utf-8", "surrogatepass"),
    "$bytes": _restore_bytes,
    "$array": _restore_array,
}
