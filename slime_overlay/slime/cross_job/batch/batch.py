"""The batch: named columns of equal length over one Arrow IPC stream."""

import base64
import copyreg
import json
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from pickle import PickleBuffer  # the buffer type of PEP 574 only; nothing here is pickled
from types import MappingProxyType
from typing import Any, SupportsIndex

import numpy as np
import pyarrow as pa

from ..errors import BatchError
from . import arrays, tree, wire
from .arrays import Unsupported
from .columns import Column, Selection, select
from .pack import encode_column
from .ragged import Rows
from .readers import reader_of
from .wire import Encoded

_MAX_ATTRS_BYTES = 256 << 20


class Batch(Mapping[str, Column]):
    """One rollout's columns, or some samples of them. Immutable; its memory is read-only.

    Pickles (protocol 5) as one out-of-band buffer, so that Ray stores it with one memcpy and reads it without one.
    """

    def __init__(self, columns: dict[str, Column], rows: Rows, attrs: bytes, ipc: pa.Buffer | None) -> None:
        """Not for callers: use `pack` or `from_ipc`. `ipc` is None for a view, which writes its own when asked."""
        self._columns = columns
        self._rows = rows
        self._attrs_json = attrs
        self._attrs: Mapping[str, Any] | None = None
        self._ipc = ipc

    @classmethod
    def pack(cls, columns: Mapping[str, Sequence[Any]], attrs: Mapping[str, Any] | None = None) -> "Batch":
        """Copy columns (one value per sample each) and attrs (values of the whole batch) into one buffer.

        Column values: numbers, bools, str, bytes; lists or tuples of numbers; NumPy arrays; torch tensors (copied from
        their device); any nesting of those with dicts; None everywhere. Mixed columns are stored as trees.
        Raises BatchError, naming column and sample, for anything else, no columns, or columns of different length.
        """
        if not isinstance(columns, Mapping) or not columns:
            raise BatchError("a batch needs at least one column: {name: values, one per sample}")
        encoded: dict[str, Encoded] = {}
        for name, values in columns.items():
            if type(name) is not str:
                raise BatchError(f"column name {name!r} is a {arrays.type_name(name)}: names are str")
            try:
                name.encode()
            except UnicodeEncodeError:
                raise BatchError(f"column name {name!r} cannot be written as UTF-8") from None
            encoded[name] = encode_column(name, values)
        return cls._write(encoded, _encode_attrs(attrs or {}))

    @classmethod
    def from_ipc(cls, buffer: Any) -> "Batch":
        """Open the bytes of a batch (any contiguous buffer) without copying them; they must not change afterwards.

        Raises BatchError if they are not exactly one batch of a format version that this code reads. Checks structure,
        not content: the cost does not depend on the size. A buffer that is not 8-byte aligned is copied once.
        """
        try:
            source = pa.py_buffer(buffer)
        except (TypeError, ValueError, BufferError, pa.ArrowException) as error:
            raise BatchError(f"a {arrays.type_name(buffer)} is not a contiguous buffer of bytes: {error}") from None
        if source.address % arrays.ALIGNMENT:
            source = pa.py_buffer(source.to_pybytes())
        stored, num_samples, attrs = wire.read(source)
        rows = range(num_samples)
        return cls({column.name: Column(reader_of(column), rows) for column in stored}, rows, attrs, source)

    @property
    def ipc(self) -> pa.Buffer:
        """The Arrow IPC stream of exactly these samples, read-only. A view writes it when first asked and keeps it."""
        if self._ipc is None:
            encoded = {name: column.encode() for name, column in self._columns.items()}
            self._ipc = self._write(encoded, self._attrs_json)._ipc
        return self._ipc

    @property
    def nbytes(self) -> int:
        """Size of `ipc`."""
        return int(self.ipc.size)

    @property
    def num_samples(self) -> int:
        return len(self._rows)

    @property
    def attrs(self) -> Mapping[str, Any]:
        """The values of the whole batch as they were packed, decoded when first asked for."""
        if self._attrs is None:
            self._attrs = MappingProxyType(_decode_attrs(self._attrs_json))
        return self._attrs

    def select(self, rows: Selection) -> "Batch":
        """A view of some samples (slice, range, list or array of ints, negative ones count from the end).

        Shares the buffers and reads only what is asked of it. Raises IndexError for a sample that does not exist.
        """
        chosen = select(self._rows, rows)
        columns = {name: column.with_rows(chosen) for name, column in self._columns.items()}
        return Batch(columns, chosen, self._attrs_json, None)

    def to_pydict(self) -> dict[str, list[Any]]:
        """Every column's values, equal to what was packed."""
        return {name: column.tolist() for name, column in self._columns.items()}

    def __getitem__(self, name: str) -> Column:
        return self._columns[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)

    def __repr__(self) -> str:
        return f"<Batch: {self.num_samples} samples of {', '.join(self._columns)}>"

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Batch.from_ipc, (PickleBuffer(self.ipc) if int(protocol) >= 5 else self.ipc.to_pybytes(),)

    @classmethod
    def _write(cls, encoded: dict[str, Encoded], attrs: bytes) -> "Batch":
        lengths = {name: column.node.length for name, column in encoded.items()}
        first, count = next(iter(lengths.items()))
        for name, length in lengths.items():
            if length != count:
                raise BatchError(f"column {first!r} has {count} samples, column {name!r} has {length}")
        return cls.from_ipc(wire.write(encoded, attrs))


def _encode_attrs(attrs: Mapping[str, Any]) -> bytes:
    if not isinstance(attrs, Mapping) or any(type(name) is not str for name in attrs):
        raise BatchError("attrs are a mapping from str to values")
    writer = tree.TreeWriter()
    try:
        text = writer.encode(dict(attrs))
    except Unsupported as error:
        raise BatchError(f"attrs{''.join(reversed(error.path))}: {error.reason}") from None
    if len(text) + writer.size > _MAX_ATTRS_BYTES:
        raise BatchError(f"attrs of {len(text) + writer.size} bytes: put large values into columns")
    blob = np.empty(writer.size, np.uint8)
    tree.write_parts(writer.parts, blob)
    # Arrow's metadata are strings: the binary row goes in as base64, behind the JSON text.
    return json.dumps([text.decode(), base64.b64encode(blob.tobytes()).decode()], ensure_ascii=False).encode()


def _decode_attrs(stored: bytes) -> dict[str, Any]:
    try:
        text, blob = json.loads(stored)
        value = tree.decode(text.encode(), np.frombuffer(base64.b64decode(blob), np.uint8))
    except BatchError as error:
        raise BatchError(f"attrs: {error}") from None
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise BatchError(f"the attrs of this batch are damaged: {error}") from None
    if not isinstance(value, dict):
        raise BatchError("the attrs of this batch are damaged: not a mapping")
    return value


def _reduce_column(column: Column) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    return operator.getitem, (Batch.pack({column.name: column}), column.name)


copyreg.pickle(Column, _reduce_column)  # as a batch of its own; Column itself need not know of batches
