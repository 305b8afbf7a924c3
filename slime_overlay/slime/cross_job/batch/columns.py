"""A column of a batch: a read-only sequence with one value per sample, or a view of some of its samples."""

import operator
from collections.abc import Iterator, Sequence
from typing import Any, SupportsIndex, overload

import numpy as np
import numpy.typing as npt

from . import arrays
from .ragged import Rows
from .readers import Reader
from .wire import Encoded

Selection = slice | Sequence[int] | npt.NDArray[Any]


class Column(Sequence[Any]):
    """Values by sample. Indexing with an int gives one value, with a slice, a list of ints or an array a view.

    What an int gives, by kind: a Python scalar, str or bytes; for number lists a read-only NumPy view of the row
    (a Python list where the row holds None) whose elements are Python numbers; for arrays and tensors one that shares
    the batch's memory and must not be written to; for anything else the Python value. Rows of 0 .. 255 are uint8:
    NumPy's arithmetic between them wraps there (its `sum` and Python's do not). `tolist()` gives the packed values.
    """

    __slots__ = ("_reader", "_rows")
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, reader: Reader, rows: Rows) -> None:
        self._reader = reader
        self._rows = rows

    @property
    def name(self) -> str:
        return self._reader.stored.name

    @property
    def kind(self) -> str:
        """scalar, text, list, tensor or tree."""
        return self._reader.stored.kind

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: SupportsIndex) -> Any: ...
    @overload
    def __getitem__(self, index: Selection) -> "Column": ...
    def __getitem__(self, index: SupportsIndex | Selection) -> Any:
        if isinstance(index, (slice, Sequence)) or (isinstance(index, np.ndarray) and index.ndim):
            return Column(self._reader, select(self._rows, index))
        return self._reader.item(self._row(index))

    def __iter__(self) -> Iterator[Any]:
        return (self._reader.item(int(row)) for row in self._rows)

    def __eq__(self, other: object) -> bool:
        """Equal values in equal order; arrays and tensors are equal if type, shape and elements are."""
        if not isinstance(other, (Sequence, np.ndarray)) or isinstance(other, (str, bytes)):
            return NotImplemented
        return len(self) == len(other) and _same(self.tolist(), list(_python(other)))

    def __repr__(self) -> str:
        return f"<Column {self.name!r}: {len(self)} x {self.kind}>"

    def tolist(self) -> list[Any]:
        """The values as they were packed: Python numbers, lists, tuples, strings, arrays, tensors, trees."""
        return self._reader.tolist(self._rows)

    def numpy(self) -> npt.NDArray[Any]:
        """Scalars as one read-only array, without copying unless the samples were picked by a list.

        Raises BatchError if a value is None, or if the column does not hold numbers or bools.
        """
        values = self._reader.numpy(self._rows)
        values.flags.writeable = False
        return values

    def numpy_at(self, index: SupportsIndex) -> npt.NDArray[Any]:
        """One array, tensor or number list as a read-only view, without torch: bf16 as uint16, fp8 as uint8.

        Raises BatchError for None and for other kinds of columns.
        """
        return self._reader.numpy_at(self._row(index))

    def lengths(self) -> npt.NDArray[np.int64]:
        """Per sample: the length of its list, or the first dimension of its array; 0 for None. Reads no data.

        Raises BatchError for other kinds of columns.
        """
        return self._reader.lengths(self._rows)

    def with_rows(self, rows: Rows) -> "Column":
        """The same column over other rows of the stream (not of this view)."""
        return Column(self._reader, rows)

    def encode(self) -> Encoded:
        """These samples as a column to be written into another batch, without going through Python values."""
        return self._reader.encode(self._rows)

    def _row(self, index: SupportsIndex) -> int:
        place = operator.index(index)
        if not -len(self) <= place < len(self):
            raise IndexError(f"sample {place} of column {self.name!r}, which has {len(self)}")
        return int(self._rows[place])


def select(rows: Rows, selection: Selection) -> Rows:
    """Rows of rows. Regular selections stay ranges. Raises IndexError if one is outside, TypeError if not integers."""
    if isinstance(selection, slice):
        return rows[selection]
    if isinstance(selection, range) and isinstance(rows, range):
        if not len(selection):
            return range(0)
        if min(selection) >= 0 and max(selection) < len(rows):
            step = rows.step * selection.step
            first = rows[selection[0]]
            return range(first, first + step * len(selection), step)
    picked = np.asarray(selection)
    if picked.ndim != 1 or (picked.size and picked.dtype.kind not in "iub"):
        raise TypeError(f"samples are selected by integers, not by {arrays.short(selection)}")
    if picked.dtype == np.bool_:
        if len(picked) != len(rows):
            raise IndexError(f"a mask of {len(picked)} for {len(rows)} samples")
        picked = np.flatnonzero(picked)
    picked = picked.astype(np.intp)
    outside = picked[(picked < -len(rows)) | (picked >= len(rows))]
    if outside.size:
        raise IndexError(f"sample {outside[0]} of {len(rows)}")
    return np.asarray(rows, np.intp)[picked]


def _python(value: Any) -> Any:
    return value.tolist() if isinstance(value, (Column, np.ndarray)) else value


def _same(mine: Any, other: Any) -> bool:
    if arrays.is_leaf(mine):
        if type(mine) is not type(other):
            return False
        leaf, theirs = arrays.describe(mine), arrays.describe(other)
        if (leaf.type, leaf.shape) != (theirs.type, theirs.shape):
            return False
        return bool((mine == other).all())
    if isinstance(mine, (list, tuple)):
        other = _python(other)
        same_kind = isinstance(other, type(mine)) or (isinstance(mine, list) and not isinstance(other, tuple))
        return same_kind and isinstance(other, Sequence) and len(mine) == len(other) and all(map(_same, mine, other))
    if isinstance(mine, dict):
        return isinstance(other, dict) and mine.keys() == other.keys() and all(_same(mine[k], other[k]) for k in mine)
    return bool(mine == other) and not arrays.is_leaf(other)
