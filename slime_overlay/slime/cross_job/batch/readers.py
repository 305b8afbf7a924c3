"""What lies behind a column: one reader per kind, over the buffers of an opened stream.

A reader checks, where it reads a row, that offsets and shapes stay inside the buffers: a damaged batch raises
BatchError there and reads nothing else. Values are views of the stream wherever that is possible, and read-only.
`encode(rows)` writes some rows into a new stream without going through Python values.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ..errors import BatchError
from . import arrays, tree
from .arrays import LeafType
from .ragged import Ragged, Rows, bits, index_of
from .wire import Encoded, Node, Stored

NUMBER_TYPES: dict[pa.DataType, np.dtype[Any]] = {  # spelt out: arrow.to_pandas_dtype() imports pandas
    pa.uint8(): np.dtype(np.uint8),
    pa.int32(): np.dtype(np.int32),
    pa.int64(): np.dtype(np.int64),
    pa.uint64(): np.dtype(np.uint64),
    pa.float32(): np.dtype(np.float32),
    pa.float64(): np.dtype(np.float64),
}
TEXT_TYPES = {"str": pa.large_utf8(), "bytes": pa.large_binary()}
TENSOR_TYPE = pa.struct(
    [("data", pa.large_binary()), ("shape", pa.large_list(pa.int64())), ("dtype", pa.int32())],
)
TREE_TYPE = pa.struct([("json", pa.large_utf8()), ("blob", pa.large_binary())])


class Reader(ABC):
    """One column of an opened stream. Rows are numbered as in the stream; callers pass valid ones only."""

    def __init__(self, stored: Stored) -> None:
        self.stored = stored

    @abstractmethod
    def item(self, row: int) -> Any:
        """The value as `Column[row]` gives it: without a copy where there is a choice."""

    def python(self, row: int) -> Any:
        """The value that was packed."""
        return self.item(row)

    def tolist(self, rows: Rows) -> list[Any]:
        return [self.python(int(row)) for row in rows]

    def numpy(self, rows: Rows) -> npt.NDArray[Any]:
        raise self._not_for("numpy() is for columns of numbers or bools")

    def numpy_at(self, row: int) -> npt.NDArray[Any]:
        raise self._not_for("numpy_at() is for columns of arrays, tensors or number lists")

    def lengths(self, rows: Rows) -> npt.NDArray[np.int64]:
        raise self._not_for("lengths() is for columns of lists, arrays or tensors")

    @abstractmethod
    def encode(self, rows: Rows) -> Encoded:
        """Those rows as a column to be written."""

    def _not_for(self, what: str) -> BatchError:
        return BatchError(f"column {self.stored.name!r} holds {self.stored.kind} values: {what}")

    @cached_property
    def _valid(self) -> npt.NDArray[np.bool_] | None:
        """False where the row is None; None if no row is."""
        return bits(self.stored, 0, 0, self.stored.length)

    def _is_none(self, row: int) -> bool:
        return self._valid is not None and not self._valid[row]

    def _some_valid(self, rows: Rows) -> npt.NDArray[np.bool_] | None:
        return None if self._valid is None else self._valid[index_of(rows)]


class ScalarReader(Reader):
    """Numbers and bools: Python scalars, and one array of them all."""

    def __init__(self, stored: Stored) -> None:
        super().__init__(stored)
        if stored.type not in NUMBER_TYPES:
            raise stored.corrupt(f"scalars cannot be of type {stored.type}")
        self._values = _as_bool(stored, stored.typed(1, NUMBER_TYPES[stored.type], stored.length))

    def item(self, row: int) -> Any:
        return None if self._is_none(row) else self._values[row].item()

    def tolist(self, rows: Rows) -> list[Any]:
        values, valid = self._values[index_of(rows)].tolist(), self._some_valid(rows)
        return values if valid is None else [value if ok else None for value, ok in zip(values, valid)]

    def numpy(self, rows: Rows) -> npt.NDArray[Any]:
        valid = self._some_valid(rows)
        if valid is not None and not valid.all():
            at = int(np.flatnonzero(~valid)[0])
            raise BatchError(f"column {self.stored.name!r}, sample {at}: None has no number; use tolist()")
        return self._values[index_of(rows)]

    def encode(self, rows: Rows) -> Encoded:
        values = self._values[index_of(rows)]
        node = Node(self.stored.type, len(rows), self._some_valid(rows), (values.view(_stored_dtype(values)),))
        return Encoded("scalar", self.stored.meta, node)


class TextReader(Reader):
    """Strings or bytes."""

    def __init__(self, stored: Stored) -> None:
        super().__init__(stored)
        if TEXT_TYPES.get(stored.meta.get("py", "")) != stored.type:
            raise stored.corrupt(f"text cannot be of type {stored.type}")
        self._ragged = Ragged(stored, 1, 2)

    def item(self, row: int) -> Any:
        if self._is_none(row):
            return None
        data = self._ragged.row(row).tobytes()
        if self.stored.meta["py"] == "bytes":
            return data
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise self.stored.corrupt(str(error), row) from None

    def encode(self, rows: Rows) -> Encoded:
        node = Node(self.stored.type, len(rows), self._some_valid(rows), self._ragged.take(rows))
        return Encoded("text", self.stored.meta, node)


class Row(np.ndarray[Any, Any]):
    """A row as a read-only NumPy view whose elements, one by one, are Python numbers, as they are in a list: Python's
    `sum(row)` of a uint8 mask must not wrap at 255.
    """

    def __iter__(self) -> Iterator[Any]:
        return iter(self.tolist())

    def __getitem__(self, index: Any) -> Any:
        value = super().__getitem__(index)
        return value.item() if isinstance(value, np.generic) else value


class ListReader(Reader):
    """Number lists: read-only views of the rows. A row that holds None comes as a Python list."""

    def __init__(self, stored: Stored) -> None:
        super().__init__(stored)
        kind = stored.type
        if not pa.types.is_large_list(kind) or kind.value_type not in NUMBER_TYPES:
            raise stored.corrupt(f"number lists cannot be of type {kind}")
        self._ragged = Ragged(stored, 1, 3, NUMBER_TYPES[kind.value_type])
        self._values = _as_bool(stored, self._ragged.values)

    def item(self, row: int) -> Any:
        if self._is_none(row):
            return None
        start, end = self._ragged.bounds(row)
        valid = bits(self.stored, 2, start, end)
        return self._values[start:end].view(Row) if valid is None or valid.all() else self.python(row)

    def python(self, row: int) -> Any:
        if self._is_none(row):
            return None
        start, end = self._ragged.bounds(row)
        values, valid = self._values[start:end].tolist(), bits(self.stored, 2, start, end)
        if valid is not None and not valid.all():
            values = [value if ok else None for value, ok in zip(values, valid)]
        return tuple(values) if self.stored.meta.get("tuple") else values

    def numpy_at(self, row: int) -> npt.NDArray[Any]:
        value = self.item(row)
        if not isinstance(value, np.ndarray):
            raise BatchError(f"column {self.stored.name!r}, sample {row}: None has no number; use [index]")
        return value

    def lengths(self, rows: Rows) -> npt.NDArray[np.int64]:
        return self._ragged.lengths(rows)

    def encode(self, rows: Rows) -> Encoded:
        offsets, data = self._ragged.take(rows)
        valid = None
        if self.stored.buffers[2] is not None:
            parts = [bits(self.stored, 2, *self._ragged.bounds(int(row))) for row in rows]
            valid = np.concatenate([part for part in parts if part is not None] or [np.empty(0, np.bool_)])
        child = Node(self.stored.type.value_type, int(offsets[-1]), valid, (data,))
        node = Node(self.stored.type, len(rows), self._some_valid(rows), (offsets,), (child,))
        return Encoded("list", self.stored.meta, node)


class TensorReader(Reader):
    """Arrays and tensors: read-only views (of tensors: tensors over the same memory, which must not be written to)."""

    def __init__(self, stored: Stored) -> None:
        super().__init__(stored)
        if stored.type != TENSOR_TYPE:
            raise stored.corrupt(f"tensors cannot be of type {stored.type}")
        types = stored.meta.get("types")
        if not isinstance(types, list):
            raise stored.corrupt("its array types are missing")
        try:
            self._types = [LeafType.from_json(kind) for kind in types]
        except BatchError as error:
            raise stored.corrupt(str(error)) from None
        self._data = Ragged(stored, 2, 3)
        self._shapes = Ragged(stored, 5, 7, np.int64)
        self._which: npt.NDArray[np.int32] = stored.typed(9, np.int32, stored.length)

    def _type(self, row: int) -> LeafType:
        which = int(self._which[row])
        if not 0 <= which < len(self._types):
            raise self.stored.corrupt("unknown array type", row)
        return self._types[which]

    def item(self, row: int) -> Any:
        return None if self._is_none(row) else arrays.restore(self._type(row), self.numpy_at(row))

    def numpy_at(self, row: int) -> npt.NDArray[Any]:
        if self._is_none(row):
            raise BatchError(f"column {self.stored.name!r}, sample {row}: None is no array; use [index]")
        try:
            return arrays.view(self._type(row), self._shapes.row(row).tolist(), self._data.row(row))
        except BatchError as error:
            raise self.stored.corrupt(str(error), row) from None

    def lengths(self, rows: Rows) -> npt.NDArray[np.int64]:
        """The size of the first dimension; 0 for None. From the shapes alone."""
        dims = self._shapes.lengths(rows)
        found = np.zeros(len(rows), np.int64)
        for place, row in enumerate(rows):
            if dims[place]:
                found[place] = self._shapes.row(int(row))[0]
            elif not self._is_none(int(row)):
                raise BatchError(f"column {self.stored.name!r}, sample {row}: a 0-d array has no length")
        return found

    def encode(self, rows: Rows) -> Encoded:
        count = len(rows)
        shape_offsets, sizes = self._shapes.take(rows)
        dims = Node(pa.int64(), int(shape_offsets[-1]), None, (sizes,))
        children = (
            Node(pa.large_binary(), count, None, self._data.take(rows)),
            Node(TENSOR_TYPE["shape"].type, count, None, (shape_offsets,), (dims,)),
            Node(pa.int32(), count, None, (self._which[index_of(rows)],)),
        )
        return Encoded("tensor", self.stored.meta, Node(TENSOR_TYPE, count, self._some_valid(rows), (), children))


class TreeReader(Reader):
    """Nested Python values; arrays inside them are views."""

    def __init__(self, stored: Stored) -> None:
        super().__init__(stored)
        if stored.type != TREE_TYPE:
            raise stored.corrupt(f"trees cannot be of type {stored.type}")
        self._json = Ragged(stored, 2, 3)
        self._blob = Ragged(stored, 5, 6)

    def item(self, row: int) -> Any:
        try:
            return tree.decode(self._json.row(row).tobytes(), self._blob.row(row))
        except BatchError as error:
            if isinstance(error.__cause__, ImportError):  # a tensor, and no torch: nothing is wrong with the batch
                raise
            raise self.stored.corrupt(str(error), row) from None

    def encode(self, rows: Rows) -> Encoded:
        children = (
            Node(pa.large_utf8(), len(rows), None, self._json.take(rows)),
            Node(pa.large_binary(), len(rows), None, self._blob.take(rows)),
        )
        return Encoded("tree", self.stored.meta, Node(TREE_TYPE, len(rows), None, (), children))


_READERS: dict[str, type[Reader]] = {
    "scalar": ScalarReader,
    "text": TextReader,
    "list": ListReader,
    "tensor": TensorReader,
    "tree": TreeReader,
}


def reader_of(stored: Stored) -> Reader:
    """Checks type and buffer sizes of a column. Raises BatchError."""
    if stored.kind not in _READERS:
        raise stored.corrupt(f"unknown kind {stored.kind[:40]!r}")
    return _READERS[stored.kind](stored)


def _as_bool(stored: Stored, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return values.view(np.bool_) if stored.meta.get("py") == "bool" and values.dtype == np.uint8 else values


def _stored_dtype(values: npt.NDArray[Any]) -> np.dtype[Any]:
    return np.dtype(np.uint8) if values.dtype == np.bool_ else values.dtype
