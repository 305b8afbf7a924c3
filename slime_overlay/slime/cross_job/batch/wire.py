"""The bytes of a batch: one Arrow IPC stream (schema, one record batch, end mark), written and opened.

Writing: an encoder hands over a tree of `Node`s whose large buffers may be `Deferred`: their size is known, their
content is not written yet. The stream is laid out around them, and each is then filled in at its final place, so that
bulk data is written once, not once into a column and once more into the stream.

Opening: the stream must be exactly what this module writes (format version, no compression, every buffer inside the
given bytes, nothing behind the end mark). The cost depends on the number of columns only; what the offsets, shapes and
texts inside the buffers say is checked where a row is read.
"""

import json
import mmap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ..errors import BatchError

FORMAT_VERSION = 1

_VERSION_KEY = b"slime.cross_job.batch"
_ATTRS_KEY = b"slime.cross_job.attrs"
_COLUMN_KEY = b"slime.cross_job.column"
_END_MARK = b"\xff\xff\xff\xff\x00\x00\x00\x00"

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Deferred:
    """A buffer of `nbytes` whose content `fill(out)` writes, once its place in the stream is known."""

    nbytes: int
    fill: Callable[[Bytes], None]


@dataclass(frozen=True)
class Node:
    """One Arrow array to be written: `valid` is False where a value is null; `data` are its buffers after validity."""

    type: pa.DataType
    length: int
    valid: npt.NDArray[np.bool_] | None = None
    data: tuple[npt.NDArray[Any] | Deferred, ...] = ()
    children: tuple["Node", ...] = ()


@dataclass(frozen=True)
class Encoded:
    """One column to be written: its kind, what else a reader must know (as JSON), its data."""

    kind: str
    meta: dict[str, Any]
    node: Node


@dataclass(frozen=True)
class Stored:
    """One column as found in a stream: its kind and meta, its Arrow type, length and buffers (depth first)."""

    name: str
    kind: str
    meta: dict[str, Any]
    type: pa.DataType
    length: int
    buffers: list[Bytes | None]

    def corrupt(self, what: str, row: int | None = None) -> BatchError:
        where = f"column {self.name!r}" if row is None else f"column {self.name!r}, sample {row}"
        return BatchError(f"{where}: {what}; the batch is damaged, publish or fetch it again")

    def typed(self, index: int, dtype: npt.DTypeLike, count: int | None = None) -> npt.NDArray[Any]:
        """Buffer `index` as `count` items (default: as many as it holds); BatchError if it is too short."""
        raw, itemsize = self.buffers[index], np.dtype(dtype).itemsize
        size = 0 if raw is None else raw.size
        count = size // itemsize if count is None else count
        if raw is None or not count:
            if count:
                raise self.corrupt("a buffer is missing")
            return np.empty(0, dtype)
        if count * itemsize > size:
            raise self.corrupt(f"a buffer of {size} bytes should hold {count} items of {itemsize}")
        return raw[: count * itemsize].view(dtype)


def write(columns: dict[str, Encoded], attrs: bytes) -> pa.Buffer:
    """The finished, read-only stream."""
    room = _Placeholder(max((part.nbytes for c in columns.values() for part in _deferred(c.node)), default=0))
    fields, data = [], []
    for name, column in columns.items():
        meta = json.dumps({"kind": column.kind, **column.meta}, sort_keys=True, separators=(",", ":"))
        fields.append(pa.field(name, column.node.type, metadata={_COLUMN_KEY: meta.encode()}))
        data.append(_array(column.node, room))
    schema = pa.schema(fields, metadata={_VERSION_KEY: str(FORMAT_VERSION).encode(), _ATTRS_KEY: attrs})
    sink = _Sink(room)
    with pa.PythonFile(sink, mode="w") as file, pa.ipc.new_stream(file, schema) as stream:
        stream.write_batch(pa.RecordBatch.from_arrays(data, schema=schema))
    out = pa.allocate_buffer(sink.position)
    memory = np.frombuffer(out, np.uint8)
    for offset, chunk in sink.chunks:
        memory[offset : offset + len(chunk)] = np.frombuffer(chunk, np.uint8)
    _fill(columns, out, memory)
    return pa.py_buffer(memoryview(out).toreadonly())


def read(buffer: pa.Buffer) -> tuple[list[Stored], int, bytes]:
    """Columns, number of samples and attrs of a stream. Raises BatchError; reads no bulk data."""
    try:
        source = pa.BufferReader(buffer)
        with pa.ipc.open_stream(source) as stream:
            kinds = _check_schema(stream.schema)
            batch = stream.read_next_batch()
            end = source.tell()
        batch.validate()
        if end + len(_END_MARK) != buffer.size or buffer.slice(end).to_pybytes() != _END_MARK:
            raise BatchError(f"{buffer.size} bytes are not one whole batch: cut off, or followed by something else")
        columns = [
            Stored(field.name, meta.pop("kind"), meta, field.type, batch.num_rows, _buffers(array, buffer))
            for field, meta, array in zip(batch.schema, kinds, batch.columns)
        ]
        return columns, batch.num_rows, batch.schema.metadata[_ATTRS_KEY]
    except BatchError:
        raise
    except (pa.ArrowException, OSError, ValueError, LookupError, TypeError, EOFError, MemoryError, StopIteration) as e:
        raise BatchError(f"{buffer.size} bytes are not a slime cross-job batch: {type(e).__name__}: {e}") from None


def _check_schema(schema: pa.Schema) -> list[dict[str, Any]]:
    version = (schema.metadata or {}).get(_VERSION_KEY)
    if version is None:
        raise BatchError("an Arrow stream, but not a slime cross-job batch")
    if version != str(FORMAT_VERSION).encode():
        found = version[:20].decode(errors="replace")
        raise BatchError(f"batch format {found}; this version reads format {FORMAT_VERSION}: upgrade the older job")
    if not schema.names or len(set(schema.names)) != len(schema.names) or _ATTRS_KEY not in schema.metadata:
        raise BatchError("a batch without columns or attrs, or with two columns of one name")
    metas = []
    for field in schema:
        meta = _parsed((field.metadata or {}).get(_COLUMN_KEY, b"null"))
        if not isinstance(meta, dict) or not isinstance(meta.get("kind"), str):
            raise BatchError(f"column {field.name!r} does not say what kind it is")
        metas.append(dict(meta))
    return metas


@lru_cache(maxsize=1024)
def _parsed(text: bytes) -> Any:
    """The rollouts of a run say the same of their columns, each time."""
    return json.loads(text)


def _buffers(array: pa.Array, source: pa.Buffer) -> list[Bytes | None]:
    """All buffers of an array, read-only. Whatever lies outside the source was decompressed or byte-swapped into fresh
    memory: our streams never need that, so it is a foreign one."""
    found: list[Bytes | None] = []
    for buffer in array.buffers():
        if buffer is None or not buffer.size:
            found.append(None)
            continue
        if not source.address <= buffer.address <= buffer.address + buffer.size <= source.address + source.size:
            raise BatchError("a compressed or big-endian Arrow stream is not a slime cross-job batch")
        view = np.frombuffer(buffer, np.uint8)
        view.flags.writeable = False
        found.append(view)
    return found


class _Placeholder:
    """Readable memory that takes no memory: an untouched private mapping stands for data that is not written yet."""

    def __init__(self, nbytes: int) -> None:
        self._buffer = pa.py_buffer(b"")
        if nbytes:
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            self._buffer = pa.py_buffer(mmap.mmap(-1, nbytes, flags=flags, prot=mmap.PROT_READ))

    def of(self, nbytes: int) -> pa.Buffer:
        return self._buffer.slice(0, nbytes)

    def holds(self, chunk: pa.Buffer) -> bool:
        return bool(chunk.size) and 0 <= chunk.address - self._buffer.address < self._buffer.size


class _Sink:
    """Takes the stream from Arrow's writer as chunks with their offsets, and drops what is a placeholder."""

    closed = False

    def __init__(self, room: _Placeholder) -> None:
        self.chunks: list[tuple[int, Any]] = []
        self.position = 0
        self._room = room

    def write(self, chunk: Any) -> int:
        # A pyarrow that passed bytes instead of a Buffer would copy the placeholder's zeros: slower, not wrong.
        if not (isinstance(chunk, pa.Buffer) and self._room.holds(chunk)):
            self.chunks.append((self.position, chunk))
        size = chunk.size if isinstance(chunk, pa.Buffer) else len(chunk)
        self.position += size
        return size

    def tell(self) -> int:
        return self.position

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True


def _array(node: Node, room: _Placeholder) -> pa.Array:
    validity = None if node.valid is None else pa.py_buffer(np.packbits(node.valid, bitorder="little"))
    nulls = 0 if node.valid is None else int(node.length - np.count_nonzero(node.valid))
    data = [
        room.of(part.nbytes) if isinstance(part, Deferred) else pa.py_buffer(np.ascontiguousarray(part))
        for part in node.data
    ]
    children = [_array(child, room) for child in node.children]
    return pa.Array.from_buffers(node.type, node.length, [validity, *data], nulls, children=children or None)


def _parts(node: Node) -> Iterator[npt.NDArray[Any] | Deferred | None]:
    """Every buffer of a node in the order of pa.Array.buffers(); None stands for validity."""
    yield None
    yield from node.data
    for child in node.children:
        yield from _parts(child)


def _deferred(node: Node) -> Iterator[Deferred]:
    return (part for part in _parts(node) if isinstance(part, Deferred))


def _fill(columns: dict[str, Encoded], out: pa.Buffer, memory: Bytes) -> None:
    """Arrow's own reader tells where each deferred buffer lies: no assumption about the layout is made here."""
    with pa.ipc.open_stream(out) as stream:
        batch = stream.read_next_batch()
    for column, array in zip(columns.values(), batch.columns):
        found: Sequence[pa.Buffer | None] = array.buffers()
        for part, buffer in zip(_parts(column.node), found, strict=True):
            if isinstance(part, Deferred) and part.nbytes and buffer is not None:
                start = buffer.address - out.address
                part.fill(memory[start : start + part.nbytes])
