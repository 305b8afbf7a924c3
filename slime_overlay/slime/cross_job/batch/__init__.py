"""Packed columns: the batch of a rollout as one Arrow IPC stream, written once and read without copying.

`Batch.pack` turns the columns that slime produces (lists of lists of numbers, scalars, strings, arrays, tensors,
metadata dicts) into one contiguous buffer; `Batch.from_ipc` opens such a buffer wherever it lies (shared memory, a
mapped file, bytes from a socket) in time that does not depend on its size. Guarantees: what comes out equals what
went in; nothing is pickled, and opening or reading a buffer executes nothing in it; a damaged or hostile buffer gives
`BatchError`, or wrong values, but never a read outside it. It does not checksum (stores do) and does not compress.

Imports neither ray nor torch; torch is used only where the caller gives or asks for tensors.

batch.py, columns.py   what callers hold              pack.py      from Python values to columns
wire.py                the Arrow stream               readers.py   from columns to values
arrays.py, numeric.py, ragged.py, tree.py   arrays and tensors; numbers; rows of any length; nested values as JSON
"""

from .batch import Batch
from .columns import Column

__all__ = ["Batch", "Column"]
