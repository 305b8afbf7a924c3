"""From Python columns to encoded ones: finds the kind of a column, then packs its values.

A column is packed as the first kind that holds all its values exactly: scalars of numbers, text, number lists,
arrays and tensors, and otherwise trees, which take a JSON text per sample and are the slow, general case.
"""

import array
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from ..errors import BatchError
from . import arrays
from .arrays import ALIGNMENT, Leaf, LeafType, Unsupported
from .columns import Column
from .numeric import NotNumbers, NumberRows, fits_float32
from .readers import TENSOR_TYPE, TEXT_TYPES, TREE_TYPE
from .tree import TreeWriter, write_parts
from .wire import Bytes, Deferred, Encoded, Node

_ARROW = {
    np.dtype(np.uint8): pa.uint8(),
    np.dtype(np.int32): pa.int32(),
    np.dtype(np.int64): pa.int64(),
    np.dtype(np.uint64): pa.uint64(),
    np.dtype(np.float32): pa.float32(),
    np.dtype(np.float64): pa.float64(),
}
_NUMBERS = (int, float, np.integer, np.floating, np.bool_)  # int covers bool
_ONE_VALUE = (str, bytes, bytearray, memoryview)  # sequences to Python, not columns
_ROW_TYPES = {list, tuple, array.array}


def encode_column(name: str, column: object) -> Encoded:
    """Raises BatchError, naming the column and the sample, for a value that cannot be stored."""
    if isinstance(column, Column):
        return column.encode()
    values = _values(name, column)
    kinds = set(map(type, values)) - {type(None)}
    try:
        if kinds <= _ROW_TYPES and kinds and not {list, tuple} <= kinds:
            return _lists(values, tuple in kinds)
        if all(issubclass(kind, _NUMBERS) for kind in kinds):
            return _scalars(values)
        if kinds == {bytes}:
            return _text("bytes", values)
        if kinds == {str}:
            return _text("str", [None if value is None else value.encode() for value in values])
    except (NotNumbers, UnicodeEncodeError):
        return _trees(name, values)
    if all(value is None or arrays.is_leaf(value) for value in values):
        return _tensors(name, values)
    return _trees(name, values)


def _values(name: str, column: object) -> list[Any]:
    if isinstance(column, list):
        return column
    is_rows = isinstance(column, (Sequence, array.array)) and not isinstance(column, _ONE_VALUE)
    if is_rows or (isinstance(column, np.ndarray) and column.ndim):
        return list(column)  # type: ignore[call-overload]
    raise BatchError(
        f"column {name!r} is a {arrays.type_name(column)}: a column is a sequence with one value per sample "
        "(what belongs to the whole batch goes into attrs)"
    )


def _validity(values: Sequence[Any]) -> Any:
    valid = np.fromiter((value is not None for value in values), np.bool_, len(values))
    return None if valid.all() else valid


def _offsets(lengths: list[int]) -> Any:
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def _number_data(rows: NumberRows) -> tuple[pa.DataType, Any]:
    """Arrow type and buffer; floats are narrowed on the way to their final place if that loses nothing."""
    values = rows.values
    if values.dtype != np.float64 or not len(values) or not fits_float32(values):
        return _ARROW[values.dtype], Deferred(values.nbytes, lambda out: np.copyto(out.view(values.dtype), values))

    def fill(out: Bytes) -> None:
        with np.errstate(invalid="ignore"):
            np.copyto(out.view(np.float32), values, casting="same_kind")

    return pa.float32(), Deferred(values.nbytes // 2, fill)


def _scalars(values: list[Any]) -> Encoded:
    rows = NumberRows(len(values))
    rows.add(values)
    kind, data = _number_data(rows)
    return Encoded("scalar", {"py": rows.python_type}, Node(kind, len(values), rows.valid, (data,)))


def _lists(values: list[Any], is_tuple: bool) -> Encoded:
    lengths = [0 if value is None else len(value) for value in values]
    rows = NumberRows(sum(lengths))
    for value in values:
        if value is not None:
            rows.add(value)
    kind, data = _number_data(rows)
    child = Node(kind, len(rows.values), rows.valid, (data,))
    node = Node(pa.large_list(kind), len(values), _validity(values), (_offsets(lengths),), (child,))
    return Encoded("list", {"py": rows.python_type, "tuple": is_tuple}, node)


def _text(py: str, values: list[bytes | None]) -> Encoded:
    joined = b"".join([value or b"" for value in values])
    data = (_offsets([len(value or b"") for value in values]), np.frombuffer(joined, np.uint8))
    return Encoded("text", {"py": py}, Node(TEXT_TYPES[py], len(values), _validity(values), data))


def _tensors(name: str, values: list[Any]) -> Encoded:
    leaves: list[Leaf | None] = []
    for sample, value in enumerate(values):
        try:
            leaves.append(None if value is None else arrays.describe(value))
        except Unsupported as error:
            raise BatchError(f"column {name!r}, sample {sample}: {error.reason}") from None
    types: dict[LeafType, int] = {}
    which = np.array([0 if leaf is None else types.setdefault(leaf.type, len(types)) for leaf in leaves], np.int32)
    # Rows of one type follow each other without gaps: each starts at a multiple of the item size.
    unit = ALIGNMENT if len(types) > 1 else 1
    offsets = _offsets([0 if leaf is None else -(-leaf.nbytes // unit) * unit for leaf in leaves])
    sizes = np.array([size for leaf in leaves if leaf is not None for size in leaf.shape], np.int64)
    dims = _offsets([0 if leaf is None else len(leaf.shape) for leaf in leaves])

    def fill(out: Bytes) -> None:
        for sample, leaf in enumerate(leaves):
            if leaf is not None:
                start, end = int(offsets[sample]), int(offsets[sample + 1])
                leaf.write(out[start : start + leaf.nbytes])
                out[start + leaf.nbytes : end] = 0

    children = (
        Node(pa.large_binary(), len(leaves), None, (offsets, Deferred(int(offsets[-1]), fill))),
        Node(TENSOR_TYPE["shape"].type, len(leaves), None, (dims,), (Node(pa.int64(), len(sizes), None, (sizes,)),)),
        Node(pa.int32(), len(leaves), None, (which,)),
    )
    meta = {"types": [kind.to_json() for kind in types]}
    return Encoded("tensor", meta, Node(TENSOR_TYPE, len(leaves), _validity(values), (), children))


def _trees(name: str, values: list[Any]) -> Encoded:
    writer = TreeWriter()
    texts: list[bytes] = []
    rows = []
    for sample, value in enumerate(values):
        writer.reset()
        try:
            texts.append(writer.encode(value.tolist() if isinstance(value, array.array) else value))
        except Unsupported as error:
            at = f", at {''.join(reversed(error.path))}" if error.path else ""
            raise BatchError(f"column {name!r}, sample {sample}{at}: {error.reason}") from None
        rows.append((writer.parts, writer.size))
    offsets = _offsets([size for _, size in rows])

    def fill(out: Bytes) -> None:
        for sample, (parts, _) in enumerate(rows):
            write_parts(parts, out[offsets[sample] : offsets[sample + 1]])

    text = (_offsets([len(text) for text in texts]), np.frombuffer(b"".join(texts), np.uint8))
    children = (
        Node(pa.large_utf8(), len(values), None, text),
        Node(pa.large_binary(), len(values), None, (offsets, Deferred(int(offsets[-1]), fill))),
    )
    return Encoded("tree", {}, Node(TREE_TYPE, len(values), None, (), children))
