"""Selections of rows, and rows of different length in one buffer: offsets are checked where they are used."""

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from .wire import Bytes, Deferred, Stored

Rows: TypeAlias = range | npt.NDArray[np.intp]


class Ragged:
    """Rows of different length in one buffer of `dtype` items, cut by `length + 1` offsets."""

    def __init__(self, stored: Stored, offsets: int, values: int, dtype: npt.DTypeLike = np.uint8) -> None:
        """`offsets` and `values` are the indexes of the two buffers."""
        self._stored = stored
        count = stored.length + 1 if stored.length else 0
        self._offsets: npt.NDArray[np.int64] = stored.typed(offsets, np.int64, count)
        self.values = stored.typed(values, dtype)

    def bounds(self, row: int) -> tuple[int, int]:
        start, end = int(self._offsets[row]), int(self._offsets[row + 1])
        if not 0 <= start <= end <= self.values.size:
            raise self._stored.corrupt("its offsets point outside the data", row)
        return start, end

    def row(self, row: int) -> npt.NDArray[Any]:
        start, end = self.bounds(row)
        return self.values[start:end]

    def lengths(self, rows: Rows) -> npt.NDArray[np.int64]:
        """Items per row, from the offsets alone."""
        index = index_of(rows)
        starts, ends = self._offsets[:-1][index], self._offsets[1:][index]
        if len(starts) and ((ends < starts).any() or starts.min() < 0 or ends.max() > self.values.size):
            raise self._stored.corrupt("its offsets point outside the data")
        return ends - starts

    def take(self, rows: Rows) -> tuple[npt.NDArray[np.int64], Deferred]:
        """Offsets and data of some rows, packed together."""
        offsets = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(self.lengths(rows), out=offsets[1:])

        def fill(out: Bytes) -> None:
            data = out.view(self.values.dtype)
            if isinstance(rows, range) and rows.step == 1:
                data[:] = self.values[self.bounds(rows[0])[0] : self.bounds(rows[-1])[1]]
            else:
                for place, row in enumerate(rows):
                    data[offsets[place] : offsets[place + 1]] = self.row(int(row))

        return offsets, Deferred(int(offsets[-1]) * self.values.dtype.itemsize, fill)


def index_of(rows: Rows) -> slice | npt.NDArray[np.intp]:
    """Rows as an index that does not copy where they are regular."""
    if not isinstance(rows, range):
        return rows
    if not len(rows):
        return slice(0, 0)
    return slice(rows.start, rows.stop if rows.stop >= 0 else None, rows.step)


def bits(stored: Stored, buffer: int, start: int, end: int) -> npt.NDArray[np.bool_] | None:
    """Bits start:end of a validity bitmap; None if there is no bitmap: all valid."""
    if stored.buffers[buffer] is None:
        return None
    bitmap = stored.typed(buffer, np.uint8, (end + 7) // 8)[start // 8 :]
    return np.unpackbits(bitmap, bitorder="little")[start % 8 : start % 8 + end - start].view(np.bool_)
