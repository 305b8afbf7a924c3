"""What cannot be stored is refused with the column, the sample, the place in it and what to do."""

import enum
from collections import OrderedDict, UserDict
from decimal import Decimal
from typing import Any

import numpy as np
import pytest

from slime.cross_job.batch import Batch
from slime.cross_job.errors import BatchError


class Thing:
    pass


class Level(enum.IntEnum):
    LOW = 1


CYCLE: list[Any] = []
CYCLE.append({"again": CYCLE})
DEEP: Any = []
for _ in range(100_000):
    DEEP = [DEEP]


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({}, ["at least one column"]),
        ([1, 2], ["at least one column"]),
        ({1: [1]}, ["column name 1", "int"]),
        ({"\ud800": [1]}, ["UTF-8"]),
        ({"x": "abc"}, ["'x'", "str", "attrs"]),
        ({"x": 3}, ["'x'", "int"]),
        ({"x": {"a": 1}}, ["'x'", "dict"]),
        ({"x": {1, 2}}, ["'x'", "set"]),
        ({"x": np.array(3)}, ["'x'", "ndarray"]),
        ({"x": [1, 2], "y": [1]}, ["'x' has 2", "'y' has 1"]),
        ({"x": [None, Thing()]}, ["'x'", "sample 1", "Thing", "use None"]),
        ({"x": [{"a": [0, {"b": (1, {2})}]}]}, ["'x'", "sample 0", "['a'][1]['b'][1]", "set"]),
        ({"x": ["a", {1: lambda: 0}]}, ["sample 1", "[1]", "function"]),
        ({"x": [[1], [1, Decimal("0.1")]]}, ["sample 1", "[1]", "Decimal"]),
        ({"x": [[0.5, Decimal("0.1")]]}, ["sample 0", "[1]", "Decimal"]),
        ({"x": [Level.LOW]}, ["sample 0", "Level"]),
        ({"x": [OrderedDict()]}, ["sample 0", "OrderedDict"]),
        ({"x": [UserDict()]}, ["sample 0", "UserDict"]),
        ({"x": [1 + 2j]}, ["sample 0", "complex"]),
        ({"x": [bytearray(b"x")]}, ["sample 0", "bytearray"]),
        ({"x": [np.longdouble(1)]}, ["sample 0", "longdouble"]),
        ({"x": [np.datetime64("2020-01-01")]}, ["sample 0", "datetime64"]),
        ({"x": [np.zeros(1), np.array([{}])]}, ["sample 1", "dtype object"]),
        ({"x": [{"a": np.array([{}])}]}, ["sample 0", "['a']", "dtype object"]),
        ({"x": [np.zeros(2, np.dtype([]))]}, ["sample 0", "dtype"]),
        ({"x": [np.ma.masked_array([1], [True])]}, ["sample 0", "MaskedArray", "np.array"]),
        ({"x": [0, CYCLE]}, ["sample 1", "contains itself"]),
        ({"x": [{"a": DEEP}]}, ["sample 0", "nested deeper than 100"]),
    ],
)
def test_errors_name_the_place(columns: Any, words: list[str]) -> None:
    with pytest.raises(BatchError) as caught:
        Batch.pack(columns)
    assert [word for word in words if word not in str(caught.value)] == []
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize(
    ("attrs", "words"),
    [
        ({"a": {"b": {1}}}, ["attrs", "['a']['b']", "set"]),
        ({1: 2}, ["attrs", "str"]),
        (7, ["attrs", "mapping"]),
    ],
)
def test_errors_in_attrs(attrs: Any, words: list[str]) -> None:
    with pytest.raises(BatchError) as caught:
        Batch.pack({"x": [1]}, attrs)
    assert [word for word in words if word not in str(caught.value)] == []


def test_nesting_up_to_the_limit_is_kept() -> None:
    value: Any = 7
    for level in range(100):
        value = (value,) if level % 2 else {level: value}
    assert Batch.pack({"x": [value]})["x"][0] == value


def test_what_a_kind_of_column_cannot_do() -> None:
    batch = Batch.pack({"n": [1, None], "l": [[1], [None]], "a": [np.array(3), None], "t": [{}, {}]})
    for read, words in [
        (batch["n"].numpy, ["'n'", "sample 1", "None"]),
        (batch["n"].lengths, ["'n'", "scalar"]),
        (batch["l"].numpy, ["'l'", "list"]),
        (lambda: batch["l"].numpy_at(1), ["'l'", "sample 1", "None"]),
        (lambda: batch["a"].numpy_at(1), ["'a'", "sample 1", "None"]),
        (lambda: batch["t"].numpy_at(1), ["'t'", "tree"]),
        (batch["a"].lengths, ["'a'", "sample 0", "0-d"]),
    ]:
        with pytest.raises(BatchError) as caught:
            read()
        assert [word for word in words if word not in str(caught.value)] == []
    with pytest.raises(KeyError):
        batch["absent"]
