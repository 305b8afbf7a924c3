"""slime's training data as a batch, and back: what slime reads is equal to what slime wrote, to the last bit.

slime hands over a dict: one list per column with one value a sample, and (from v0.3 on, where each DP rank gets a part
of its own) values of the whole rollout beside them. Lists become columns, the rest attributes of the batch.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from pathlib import PurePath
from typing import Any

import numpy as np

from ..batch import Batch, Column
from ..errors import BatchError

logger = logging.getLogger(__name__)

_ORDER, _WHOLE = "keys", "values"
_PLAIN = {int, float, bool, str, type(None)}
_told: set[tuple[str, type]] = set()  # what was said


def pack(data: Mapping[str, Any]) -> Batch:
    """slime's dict as a batch with one row a sample. Where something is in it that no batch holds, a path goes in as
    its text, a member of an enum as its value, and a set as a list.

    Raises:
        BatchError: it holds anything else (a dataclass, an object); names the key and the sample.
    """
    if "tokens" not in data or not len(data["tokens"]):
        raise BatchError("slime's training data has no samples: the rollout function returned nothing")
    samples = len(data["tokens"])
    columns = {key: values for key, values in data.items() if isinstance(values, list) and len(values) == samples}
    whole = {key: value for key, value in data.items() if key not in columns}
    try:
        return Batch.pack(columns, {_ORDER: list(data), _WHOLE: whole})
    except BatchError:
        columns = {key: _plain(value, key) for key, value in columns.items()}
        return Batch.pack(columns, {_ORDER: list(data), _WHOLE: {key: _plain(v, key) for key, v in whole.items()}})


def unpack(batch: Batch) -> dict[str, Any]:
    """The dict that was packed; tensors and arrays are copies that may be written to."""
    values = {**{name: own(column.tolist()) for name, column in batch.items()}, **own(batch.attrs[_WHOLE])}
    return {key: values[key] for key in batch.attrs[_ORDER]}


def open_rows(batch: Batch) -> dict[str, Any]:
    """The same dict for a reader that uses some of its samples: number lists are read when they are asked for."""
    values = {name: Samples(c) if c.kind == "list" else own(c.tolist()) for name, c in batch.items()}
    values |= own(batch.attrs[_WHOLE])
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


def _plain(value: Any, key: str) -> Any:
    """With paths, members of enums and sets replaced by what they stand for; said once for each key."""
    if isinstance(value, list) and {*map(type, value)} <= _PLAIN:
        return value
    if type(value) is dict:
        replaced = {_plain(name, key): _plain(item, key) for name, item in value.items()}
        return replaced if len(replaced) == len(value) else value  # else two keys stand for the same
    if type(value) in (list, tuple):
        return type(value)(_plain(item, key) for item in value)
    if isinstance(value, Enum):
        found, made = _plain(value.value, key), "its value"
    elif isinstance(value, PurePath):
        found, made = str(value), "its text"
    elif isinstance(value, (set, frozenset)):
        found, made = sorted((_plain(item, key) for item in value), key=repr), "a list"
    else:
        return value
    if (key, type(value)) not in _told:
        _told.add((key, type(value)))
        logger.warning("%s of the training data holds a %s: training gets %s", key, type(value).__qualname__, made)
    return found


def own(value: Any) -> Any:
    """Tensors and arrays copied out of shared memory, where writing to them would end the process."""
    if isinstance(value, Mapping):
        return {key: own(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return value if not value or isinstance(value[0], (int, float, str)) else type(value)(map(own, value))
    if isinstance(value, np.ndarray):
        return value.copy()
    return value.clone() if hasattr(value, "clone") and hasattr(value, "data_ptr") else value
