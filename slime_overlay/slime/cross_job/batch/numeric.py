"""Lists of Python numbers into one typed array, exactly and fast.

The element type is found while packing: it starts as uint8, or float32 where the first row is of floats, and widens
(int32, int64, uint64, or float64) when a row does not fit, keeping what was packed so far. Exact means that every
element comes back equal; what no type holds exactly (integers over 64 bits, 2**60 beside 0.5) is refused with
`NotNumbers`, and the column becomes a tree.
"""

import array
import itertools
import marshal
import operator
import struct
from typing import Any

import numpy as np
import numpy.typing as npt

_INTS = ("B", "i", "q", "Q")
_DTYPES = {"B": np.uint8, "i": np.int32, "q": np.int64, "Q": np.uint64, "f": np.float32, "d": np.float64}
_EXACT_FLOAT = 2**53  # every integer up to here has a float64 of its own
_FLOAT_CELL = np.dtype([("code", np.uint8), ("value", "<f8")])  # of marshal's format 2, packed
_NARROW_BLOCK = 1 << 15  # elements; keeps the round trip through float32 inside the cache


class NotNumbers(Exception):
    """The rows hold something other than numbers, or numbers that no common type holds exactly."""


class NumberRows:
    """`values`: the elements of all rows, in order. `valid`: False where an element is None; None if none is."""

    def __init__(self, total: int) -> None:
        self._buffer: npt.NDArray[Any] = np.empty(total, np.uint8)
        self._used = 0
        self._code = "B"
        self._all_bool = True
        self.valid: npt.NDArray[np.bool_] | None = None

    @property
    def values(self) -> npt.NDArray[Any]:
        return self._buffer

    @property
    def python_type(self) -> str:
        if self._code in ("f", "d"):
            return "float"
        return "bool" if self._all_bool and self._used else "int"

    def add(self, row: "list[Any] | tuple[Any, ...] | array.array[Any]") -> None:
        """Append one row. Raises NotNumbers."""
        if isinstance(row, array.array):
            self._add_typed(row)
        elif len(row) and not self._add_fast(row):
            self._add_any(list(row))

    def _add_fast(self, row: list[Any] | tuple[Any, ...]) -> bool:
        """The common rows, at C speed: whatever is not certain to be exact is left to `_add_any`.

        `bytes` and `struct` accept anything that has `__index__`, which is exact by definition; the first element's
        type keeps out lists of tensors. Their opposite for floats, `__float__`, may round (a Fraction, a longdouble),
        so that only rows of nothing but floats go this way, and those with ints through np.array, which finds out
        whether all elements are numbers.
        """
        kind = type(row[0])
        start, end = self._used, self._used + len(row)
        if kind is float and (floats := _all_floats(row)) is not None:
            return self._add_floats(floats)
        if self._code == "f":
            self._retype("d")
        if self._code == "d":
            if kind is not float and kind is not int:
                return False
            try:
                chunk = np.array(row)
            except Exception:  # whatever an element's own conversion raises
                return False
            if chunk.dtype != np.float64 or chunk.ndim != 1 or (np.abs(chunk) >= _EXACT_FLOAT).any():
                return False
            self._buffer[start:end] = chunk
        else:
            if kind is bool:
                if self._all_bool and set(map(type, row)) != {bool}:
                    return False
            elif kind is not int:
                return False
            try:
                if self._code == "B":
                    self._buffer[start:end] = np.frombuffer(bytes(row), np.uint8)
                else:
                    dtype = self._buffer.dtype
                    struct.pack_into(f"{len(row)}{self._code}", self._buffer.data, start * dtype.itemsize, *row)
            except (struct.error, TypeError, ValueError, OverflowError):
                return False
            self._all_bool = self._all_bool and kind is bool
        self._used = end
        return True

    def _add_floats(self, floats: npt.NDArray[np.float64]) -> bool:
        """Append floats, as float32 as long as that holds all of them bit for bit."""
        if not self._used:
            self._retype("f")
        if self._code not in ("f", "d"):
            return False
        end = self._used + len(floats)
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            self._buffer[self._used : end] = floats
            if self._code == "f" and not _same_bits(self._buffer[self._used : end].astype(np.float64), floats):
                self._retype("d")
                self._buffer[self._used : end] = floats
        self._used = end
        return True

    def _retype(self, code: str) -> None:
        buffer = np.empty(len(self._buffer), _DTYPES[code])
        buffer[: self._used] = self._buffer[: self._used]
        self._buffer, self._code = buffer, code

    def _add_any(self, row: list[Any]) -> None:
        """The other rows: with Nones or NumPy scalars, mixed, or too wide for the present type."""
        start, end = self._used, self._used + len(row)
        types = set(map(type, row))
        if type(None) in types:
            valid = np.fromiter(map(operator.is_not, row, itertools.repeat(None)), np.bool_, len(row))
            for place in np.flatnonzero(~valid):
                row[place] = False  # a placeholder that every type holds and that does not make bools into ints
            if self.valid is None:
                self.valid = np.ones(len(self._buffer), np.bool_)
            self.valid[start:end] = valid
            types = types - {type(None)} | {bool}
        if any(issubclass(kind, np.generic) for kind in types):
            row = [value.item() if isinstance(value, np.generic) else value for value in row]
            types = set(map(type, row))
        if not types <= {int, float, bool}:
            raise NotNumbers
        self._all_bool = self._all_bool and types == {bool}
        self._store(_floats(row) if float in types else _ints(row))

    def _add_typed(self, row: "array.array[Any]") -> None:
        if row.typecode not in "bBhHiIlLqQfd":
            raise NotNumbers
        if len(row):
            chunk = np.frombuffer(row, row.typecode)
            self._all_bool = False
            self._store(chunk.astype(np.float64) if row.typecode in "fd" else _narrow(chunk))

    def _store(self, chunk: npt.NDArray[Any]) -> None:
        if self._code == "f":
            self._retype("d")
        chunk = self._widen(chunk)
        end = self._used + len(chunk)
        self._buffer[self._used : end] = chunk
        self._used = end

    def _widen(self, chunk: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Make the type of the buffer hold the chunk's as well; the chunk in that type."""
        code = next(code for code, dtype in _DTYPES.items() if dtype == chunk.dtype)
        used = self._buffer[: self._used]
        if "d" in (code, self._code):
            wide = "d"
            ints = [part for part in (chunk, used) if part.dtype.kind != "f" and part.size]
            if any(int(part.max()) > _EXACT_FLOAT or int(part.min()) < -_EXACT_FLOAT for part in ints):
                raise NotNumbers
        else:
            wide = max(code, self._code, key=_INTS.index)
            if wide == "Q" and any(part.size and int(part.min()) < 0 for part in (chunk, used)):
                raise NotNumbers
        if wide != self._code:
            self._retype(wide)
        return chunk.astype(_DTYPES[wide], copy=False)


def _all_floats(row: "list[Any] | tuple[Any, ...]") -> npt.NDArray[np.float64] | None:
    """The elements of a row of nothing but floats; None for any other row.

    marshal's format 2 writes such a row as 5 bytes and then, for each element, b"g" and its 8 bytes: the fastest
    conversion there is that also tells whether an element is anything else (its code would stand in a cell's place).
    """
    try:
        data = marshal.dumps(row, 2)
    except ValueError:
        return None
    if len(data) != 5 + _FLOAT_CELL.itemsize * len(row):
        return None
    cells = np.frombuffer(data, _FLOAT_CELL, offset=5)
    return np.ascontiguousarray(cells["value"]) if (cells["code"] == ord("g")).all() else None


def fits_float32(values: npt.NDArray[np.float64]) -> bool:
    """Whether float32 holds every value bit for bit: NaN payloads, signed zeros and infinities included."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        for start in range(0, len(values), _NARROW_BLOCK):
            block = values[start : start + _NARROW_BLOCK]
            if not _same_bits(block.astype(np.float32).astype(np.float64), block):
                return False
    return True


def _same_bits(one: npt.NDArray[np.float64], other: npt.NDArray[np.float64]) -> bool:
    return np.array_equal(one.view(np.uint64), other.view(np.uint64))


def _narrow(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return values.astype(_int_dtype(int(values.min()), int(values.max())), copy=False)


def _ints(row: list[int]) -> npt.NDArray[Any]:
    try:
        return _narrow(np.array(row, np.int64))
    except OverflowError:
        return np.array(row, _int_dtype(min(row), max(row)))


def _int_dtype(low: int, high: int) -> type[np.integer[Any]]:
    for dtype in (np.uint8, np.int32, np.int64, np.uint64):
        if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
            return dtype
    raise NotNumbers


def _floats(row: list[Any]) -> npt.NDArray[np.float64]:
    try:
        values = np.array(row, np.float64)
    except OverflowError:
        raise NotNumbers from None
    for index in np.flatnonzero(np.abs(values) >= _EXACT_FLOAT):
        if float(values[index]) != row[index]:  # Python compares int and float exactly: an int that float64 rounds
            raise NotNumbers
    return values
