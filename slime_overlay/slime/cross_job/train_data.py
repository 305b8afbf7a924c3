"""slime's training data as a batch, and back: what slime reads is equal to what slime wrote, to the last bit.

slime hands over a dict: one list per column with one value a sample, and (from v0.3 on, where each DP rank gets a part
of its own) values of the whole rollout beside them. Lists become columns, the rest attributes of the batch.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from .batch import Batch, Column
from .errors import BatchError

_ORDER, _WHOLE = "keys", "values"


def pack(data: Mapping[str, Any]) -> Batch:
    """slime's dict as a batch with one row a sample. Raises BatchError, naming the key, for what it cannot hold."""
    if "tokens" not in data or not len(data["tokens"]):
        raise BatchError("slime's training data has no samples: the rollout function returned nothing")
    samples = len(data["tokens"])
    columns = {key: values for key, values in data.items() if isinstance(values, list) and len(values) == samples}
    whole = {key: value for key, value in data.items() if key not in columns}
    return Batch.pack(columns, {_ORDER: list(data), _WHOLE: whole})


def unpack(batch: Batch) -> dict[str, Any]:
    """The dict that was packed; tensors and arrays are copies that may be written to."""
    values = {**{name: _own(column.tolist()) for name, column in batch.items()}, **_own(batch.attrs[_WHOLE])}
    return {key: values[key] for key in batch.attrs[_ORDER]}


def open_rows(batch: Batch) -> dict[str, Any]:
    """The same dict for a reader that uses some of its samples: number lists are read when they are asked for."""
    values = {name: Samples(c) if c.kind == "list" else _own(c.tolist()) for name, c in batch.items()}
    values |= _own(batch.attrs[_WHOLE])
    return {key: values[key] for key in batch.attrs[_ORDER]}


class Samples(Sequence[Any]):
    """A column of number lists that behaves like slime's list of lists, but costs only what is asked of it.

    A sample is a read-only array where it holds integers (slime makes tensors of those, which is exact), and a Python
    list where it holds floats, so that slime rounds them itself. Iterating gives views: enough for their lengths.
    """

    def __init__(self, column: Column):
        self._column = column

    def __len__(self) -> int:
        return len(self._column)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._column)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = self._column[index]
        return row.tolist() if isinstance(row, np.ndarray) and row.dtype.kind == "f" else row


def _own(value: Any) -> Any:
    """Tensors and arrays copied out of shared memory, where writing to them would end the process."""
    if isinstance(value, Mapping):
        return {key: _own(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return value if not value or isinstance(value[0], (int, float, str)) else type(value)(map(_own, value))
    if isinstance(value, np.ndarray):
        return value.copy()
    return value.clone() if hasattr(value, "clone") and hasattr(value, "data_ptr") else value
