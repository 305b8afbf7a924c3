"""What goes into a batch comes out: every column kind, exactly, whole or in part."""

import array
import math
import struct
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from slime.cross_job.batch import Batch, Column

STEADY = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # other work shares the cores

INTS = st.one_of(
    st.integers(0, 255),
    st.integers(-(2**31), 2**31 - 1),
    st.integers(-(2**63), 2**63 - 1),
    st.integers(0, 2**64 - 1),
    st.integers(),
)
FLOATS = st.one_of(st.floats(width=32), st.floats())
NUMBERS = st.one_of(INTS, FLOATS, st.booleans(), st.none())
TEXT = st.text(st.characters(exclude_categories=()))  # lone surrogates too


def exact(value: Any) -> Any:
    """A value that equals another one only if they are the same: NaN bits, -0.0, types of containers, array dtypes."""
    if isinstance(value, float):
        return "float", struct.pack("<d", value)
    if isinstance(value, (list, tuple)):
        return type(value), [exact(item) for item in value]
    if isinstance(value, dict):
        return dict, [(exact(key), exact(item)) for key, item in value.items()]
    if isinstance(value, np.ndarray):
        return value.dtype, value.shape, value.tobytes()
    return type(value), value


def round_trip(values: list[Any]) -> Column:
    return Batch.pack({"x": values})["x"]


@pytest.mark.parametrize(
    "row",
    [
        st.one_of(st.lists(INTS), st.none()),
        st.lists(st.one_of(FLOATS, st.none())),
        st.one_of(st.tuples(), st.tuples(INTS), st.tuples(INTS, INTS), st.none()),
    ],
    ids=["integers", "floats", "tuples"],
)
def test_lists_are_exact(row: st.SearchStrategy[Any]) -> None:
    @STEADY
    @given(st.lists(row))
    def check(rows: list[Any]) -> None:
        assert exact(round_trip(rows).tolist()) == exact(rows)

    check()


@STEADY
@given(st.lists(st.lists(NUMBERS)))
def test_lists_of_mixed_numbers_are_equal(rows: list[list[Any]]) -> None:
    found = round_trip(rows).tolist()
    assert [len(row) for row in found] == [len(row) for row in rows]
    for mine, theirs in zip(found, rows):
        for a, b in zip(mine, theirs):
            assert a == b or (a != a and b != b)


@STEADY
@given(st.lists(st.lists(st.booleans(), min_size=1), min_size=1))
def test_lists_of_bools_come_out_as_bools(rows: list[list[bool]]) -> None:
    column = round_trip(rows)
    assert exact(column.tolist()) == exact(rows)
    assert column[0].dtype == np.bool_


@pytest.mark.parametrize("values", [INTS, FLOATS, st.booleans(), TEXT, st.binary()], ids=str)
def test_scalars_are_exact(values: st.SearchStrategy[Any]) -> None:
    @STEADY
    @given(st.lists(st.one_of(values, st.none())))
    def check(column: list[Any]) -> None:
        found = round_trip(column)
        assert exact(found.tolist()) == exact(column)
        assert exact([found[i] for i in range(-len(column), 0)]) == exact(column)
        assert exact(list(found)) == exact(column)

    check()


@STEADY
@given(st.lists(NUMBERS))
def test_mixed_scalars_are_equal(column: list[Any]) -> None:
    for a, b in zip(round_trip(column).tolist(), column):
        assert a == b or (a != a and b != b)


LEAVES = st.one_of(st.none(), st.booleans(), INTS, FLOATS, TEXT, st.binary(), st.sampled_from(["$tuple", "$", "$int"]))
KEYS = st.one_of(TEXT, INTS, st.none(), st.binary(), st.sampled_from(["$dict", "$x"]), st.tuples(TEXT, INTS))
ARRAYS = hnp.arrays(
    st.one_of(
        hnp.integer_dtypes(), hnp.floating_dtypes(sizes=(16, 32, 64)), hnp.complex_number_dtypes(sizes=(64, 128))
    ),
    hnp.array_shapes(min_dims=0, min_side=0, max_dims=3, max_side=4),
)
TREES = st.recursive(
    st.one_of(LEAVES, ARRAYS),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.lists(inner, max_size=4).map(tuple), st.dictionaries(KEYS, inner, max_size=4)
    ),
    max_leaves=12,
)


@STEADY
@given(st.lists(TREES))
def test_trees_are_exact(values: list[Any]) -> None:
    # The wrapping dict keeps columns of plain numbers from being found, whose bools may come out as equal integers.
    column = [{"value": value} for value in values]
    assert exact(round_trip(column).tolist()) == exact(column)


@STEADY
@given(st.dictionaries(st.text(), TREES, max_size=4))
def test_attrs_are_exact(attrs: dict[str, Any]) -> None:
    assert exact(dict(Batch.pack({"x": [1]}, attrs).select([0]).attrs)) == exact(attrs)


DTYPES = st.one_of(
    hnp.scalar_dtypes(),
    hnp.byte_string_dtypes(min_len=1),
    hnp.unicode_string_dtypes(min_len=1),
    hnp.array_dtypes(allow_subarrays=True, min_size=1),
).filter(lambda dtype: dtype.itemsize > 0)


ANY_ARRAY = DTYPES.flatmap(lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, min_side=0)))


@STEADY
@given(st.lists(st.one_of(st.none(), ANY_ARRAY)))
def test_arrays_of_any_dtype_and_shape_are_exact(values: list[Any]) -> None:
    found = round_trip(values)
    assert exact(found.tolist()) == exact(values)
    assert exact(Batch.pack({"x": found[::-1]})["x"].tolist()) == exact(values[::-1])


def test_arrays_that_are_not_in_c_order() -> None:
    base = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    padded = np.zeros(4, np.dtype({"names": ["a", "b"], "formats": ["u1", "<f8"], "offsets": [0, 8], "itemsize": 16}))
    padded["b"] = [1, 2, 3, 4]
    values = [base.T, base[:, ::2], np.asfortranarray(base[0]), base[::-1], np.broadcast_to(np.int8(3), (2, 2))]
    assert exact([np.ascontiguousarray(v) for v in values]) == exact(round_trip(values).tolist())
    assert round_trip([padded[::2]])[0].tolist() == padded[::2].tolist()


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([0, 255], np.uint8),
        ([0, 256], np.int32),
        ([-1], np.int32),
        ([2**31], np.int64),
        ([-(2**31) - 1], np.int64),
        ([2**63], np.uint64),
        ([0.5, math.inf, -math.inf, -0.0, math.nan], np.float32),
        ([0.1], np.float64),
        ([1e-46], np.float64),
        ([3.5e38], np.float64),
        ([struct.unpack("<d", b"\1\0\0\0\0\0\xf8\x7f")[0]], np.float64),  # a NaN with a payload
        ([1, 0.5], np.float32),
        ([2**53, 0.1], np.float64),
    ],
)
def test_numbers_take_the_smallest_exact_type(values: list[Any], dtype: type) -> None:
    scalars, rows = round_trip(values), round_trip([values, []])
    assert scalars.numpy().dtype == dtype
    assert rows[0].dtype == dtype
    assert [struct.pack("<d", float(v)) for v in rows.tolist()[0]] == [struct.pack("<d", float(v)) for v in values]


@pytest.mark.parametrize("values", [[2**64], [2**63, -1], [2**53 + 1, 0.5], [10**400, 1], [1, 10**400, 0.5]])
def test_numbers_that_no_type_holds_become_trees(values: list[Any]) -> None:
    for column in (values, [values], [[v] for v in values]):
        found = round_trip(column)
        assert (found.kind, exact(found.tolist())) == ("tree", exact(column))


def test_types_widen_while_rows_are_added() -> None:
    rows = [[1, 2], [300], [-1], [2**40], [True], [None, 5], []]
    assert round_trip(rows).tolist() == rows
    assert round_trip([*rows, [0.5]]).tolist() == [*rows, [0.5]]
    assert round_trip([[1], [2**63], [3]])[1].dtype == np.uint64


def test_an_integer_that_float64_rounds_is_not_lost_among_floats() -> None:
    rows = [[0.5, 1.5], [math.nan, 2**53 + 1]]
    found = round_trip(rows)
    assert (found.kind, found.tolist()[1][1]) == ("tree", 2**53 + 1)
    with pytest.raises(ValueError, match="Fraction"):
        round_trip([[0.5], [0.25, Fraction(1, 3)]])


def test_typed_arrays_and_numpy_scalars_are_taken_as_numbers() -> None:
    rows = [
        array.array("H", [1, 70]),
        array.array("d", [0.5]),
        array.array("b"),
        [np.float32(0.25), np.int64(3), True],
    ]
    assert round_trip(rows).tolist() == [[1, 70], [0.5], [], [0.25, 3, True]]
    assert round_trip([np.int64(1), None, np.bool_(True)]).tolist() == [1, None, True]
    assert round_trip([np.str_("a"), "b"]).tolist() == ["a", "b"]
    assert round_trip(np.arange(3)).tolist() == [0, 1, 2]  # type: ignore[arg-type]
    assert round_trip(range(3)).tolist() == [0, 1, 2]  # type: ignore[arg-type]


def slime_columns(samples: int = 16) -> dict[str, list[Any]]:
    random = np.random.default_rng(0)
    total = random.integers(5, 60, samples).tolist()
    response = [n // 2 for n in total]
    return {
        "tokens": [random.integers(0, 152_000, n).tolist() for n in total],
        "response_lengths": response,
        "rewards": random.random(samples).tolist(),
        "raw_reward": [float(i % 2) for i in range(samples)],
        "truncated": [i % 2 for i in range(samples)],
        "loss_masks": [[1] * n for n in response],
        "sample_indices": list(range(samples)),
        "rollout_log_probs": [random.random(n).astype(np.float32).tolist() for n in response],
        "round_number": [i // 4 for i in range(samples)],
        "multimodal_train_inputs": [None, {"pixel_values": np.ones((2, 3), np.float32), "grid": (1, 2)}]
        * (samples // 2),
        "metadata": [{"source": "gsm8k", "id": i} for i in range(samples)],
    }


def test_the_columns_of_slime() -> None:
    columns = slime_columns()
    batch = Batch.pack(columns)
    assert list(batch) == list(columns)
    assert exact(batch.to_pydict()) == exact(columns)
    assert {name: column.kind for name, column in batch.items() if column.kind == "tree"} == {
        "multimodal_train_inputs": "tree",
        "metadata": "tree",
    }
    assert batch["tokens"].lengths().tolist() == [len(row) for row in columns["tokens"]]
    # What slime does with a column: strides for each DP rank, picking rows one by one, lengths.
    assert batch["tokens"][1::4] == columns["tokens"][1::4]
    assert [batch["rewards"][i] for i in [3, 1]] == [columns["rewards"][i] for i in [3, 1]]
    assert [len(row) for row in batch["tokens"]] == batch["tokens"].lengths().tolist()
    assert sum(batch["response_lengths"]) == sum(columns["response_lengths"])


SELECTIONS = st.one_of(
    st.slices(16),
    st.lists(st.integers(-16, 15)),
    st.lists(st.integers(-16, 15)).map(lambda rows: np.array(rows, np.int64)),
    st.builds(range, st.integers(0, 16), st.integers(0, 16), st.integers(1, 5)),
    st.builds(range, st.integers(0, 15), st.integers(-1, 15), st.integers(-5, -1)),
    st.lists(st.booleans(), min_size=16, max_size=16).map(np.array),
)


@STEADY
@given(SELECTIONS, st.data())
def test_selections_compose_and_can_be_written(first: Any, data: st.DataObject) -> None:
    columns, batch = slime_columns(), Batch.pack(slime_columns(), {"k": (1,)})

    def expected(selection: Any, rows: list[int]) -> list[int]:
        return rows[selection] if isinstance(selection, slice) else np.array(rows, np.int64)[list(selection)].tolist()

    rows, view = list(range(16)), batch
    if isinstance(first, np.ndarray) and first.dtype == np.bool_:
        rows, view = np.flatnonzero(first).tolist(), view.select(first)
    else:
        rows, view = expected(first, rows), view.select(first)
    if rows:
        second = data.draw(st.one_of(st.slices(len(rows)), st.lists(st.integers(-len(rows), len(rows) - 1))))
        rows, view = expected(second, rows), view.select(second)
    wanted = {name: [values[row] for row in rows] for name, values in columns.items()}
    assert view.num_samples == len(rows)
    assert exact(view.to_pydict()) == exact(wanted)
    assert exact({name: column[:].tolist() for name, column in view.items()}) == exact(wanted)
    assert view["tokens"].lengths().tolist() == [len(row) for row in wanted["tokens"]]
    assert view["rewards"].numpy().tolist() == wanted["rewards"]
    again = Batch.from_ipc(view.ipc)
    assert exact(again.to_pydict()) == exact(wanted)
    assert again.attrs == {"k": (1,)}
    assert again.nbytes == view.nbytes
    assert len(set(rows)) < len(rows) or view.nbytes <= batch.nbytes + 1024


def test_columns_can_be_packed_again() -> None:
    batch = Batch.pack({"x": [[None, 1], [2], None], "y": [np.ones(2), np.ones(3, ">i2"), None]})
    again = Batch.pack({"x": batch["x"][::-1], "y": batch["y"][::-1], "z": [1, 2, 3]})
    assert again["x"] == [None, [2], [None, 1]]
    assert exact(again["y"].tolist()) == exact(batch["y"].tolist()[::-1])


def test_equal_columns_give_equal_bytes() -> None:
    assert Batch.pack(slime_columns(), {"a": 1}).ipc.equals(Batch.pack(slime_columns(), {"a": 1}).ipc)


def test_empty_columns_and_columns_of_none() -> None:
    assert Batch.pack({"x": [], "y": []}).to_pydict() == {"x": [], "y": []}
    assert Batch.pack({"x": [None, None]})["x"].tolist() == [None, None]
    assert Batch.pack({"x": [[], []]})["x"].lengths().tolist() == [0, 0]
    assert Batch.pack({"x": [[], None]}).select([]).ipc.size


def test_a_column_is_a_sequence() -> None:
    column = Batch.pack({"x": [[1, 2], [3], []]})["x"]
    assert column[-1].tolist() == []
    assert column[np.int64(1)].tolist() == [3]
    assert column == [[1, 2], [3], []] == column.tolist()
    assert column == ([1, 2], [3], [])
    assert column != [[1, 2], [3]]
    assert column != [[1, 2], [3], [4]]
    assert column != "abc"
    assert column[1:] != column[:2]
    assert [len(row) for row in reversed(column)] == [0, 1, 2]
    assert column[[2, 0]][1].tolist() == [1, 2]
    assert repr(column) == "<Column 'x': 3 x list>"
    assert Batch.pack({"x": [{"a": np.ones(2)}]})["x"] == [{"a": np.ones(2)}]
    assert Batch.pack({"x": [{"a": np.ones(2)}]})["x"] != [{"a": np.zeros(2)}]
    for outside in (3, -4, [0, 3], [-4], np.array([True, False])):
        with pytest.raises(IndexError):
            column[outside]
    with pytest.raises(TypeError):
        column[[0.5]]  # type: ignore[list-item]


def test_elements_of_a_row_are_python_numbers_so_that_sums_of_masks_do_not_wrap() -> None:
    batch = Batch.pack({"loss_masks": [[1] * 1000], "bytes": [[200, 100]], "log_probs": [[-0.5, -1.5]]})
    row = batch["loss_masks"][0]
    assert isinstance(row, np.ndarray)
    assert row.dtype == np.uint8
    assert sum(row) == row.sum() == 1000
    assert batch["bytes"][0][0] + batch["bytes"][0][1] == 300
    assert [type(x) for x in batch["bytes"][0]] == [int, int]
    assert type(batch["log_probs"][0][1]) is float
    assert sum(batch["bytes"][0][:1]) == 200
    assert (batch["bytes"][0] > 150).tolist() == [True, False]
