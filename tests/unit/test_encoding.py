"""What the communicators keep, as bytes: types come back as they went in, old bytes are read, damage is said."""

import base64
import itertools
import math
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from slime.cross_job.batch import Batch
from slime.cross_job.errors import BadInput, PayloadDamaged
from slime.cross_job.proposal.encoding import decode, encode
from slime.cross_job.storage.payloads import checksum
from tests.support.patience import patient

OVERLAY = Path(__file__).parents[2] / "slime_overlay"
OLD_JSON = (
    b'J{"format": 1, "xxh3_128": "17d3aa86e8b9e62adfe14c527be32879", "body": '
    b'{"value":{"lr":1e-06,"nested":{"deep":[1,null,"\\u00e9"]}}}}'
)
OLD_COLUMNS = zlib.decompress(
    base64.b64decode(
        "eNp9Us1OwkAQnpZaG9IYQsRwMIbsiQMhFBGEC/ocxuhSllgpLekWf4IkPoAHH8LH8IF8AM/i7HZLagPOZjqzszP9vp2dS+awcd9x+pPOqXvGem3a"
        "7rUc2up23HHX7bb6a5SWDlACIUU4ABP2wEIPRTM2cRu/hoq/SB8Ay+BC+Z8/63VV+SLniixXpFEj5BqggnvuezPWdKOQ85v7cNSkcRxxjH9jXUnV"
        "aagObM8f0di9U5gfKv8BuWNV4RD9J1QL9RAS2UeN2CONxlz+V+TfYn5D+SeoSzL1gjEZEO5Sn0akQebPuJv4IY3JCuBoCw839BezQCCYuAxUwbsM"
        "VUQ3EVX0qYQsypKFVhE9eVPcquqO77IaIA6nLOBJzJY5tuyxyD1XPOtZnr7H45SlFwg3Xsx9RgYT6nO2Eoj/cTbkSvhl2SZvrOnCHitcUNaL2Uyw"
        "tdRdLXUm5uYr028bkZPJseVfoWDI+9YhlSLu7T8zVFLvmYoJu6Was/l4Qdla7jzdW5lYIYebrU9F38FDz+Vr+qZyCPA6XMuZBPgFvHxxdA=="
    )
)
"""As versions wrote them that knew JSON and columns only."""


def written(value: Any) -> bytes:
    return b"".join(bytes(memoryview(piece)) for piece in encode(value))


def there_and_back(value: Any) -> Any:
    return decode(pa.py_buffer(written(value)))


def bits(array: Any) -> bytes:
    if not isinstance(array, np.ndarray):
        array = array.detach().cpu().contiguous().reshape(-1).view(sys.modules["torch"].uint8).numpy()
    return np.ascontiguousarray(array).tobytes()


def same(mine: Any, found: Any) -> bool:
    """In types, dtypes, shapes, and bits."""
    if type(mine) is not type(found):
        return False
    if isinstance(mine, dict):
        return same([*mine.items()], [*found.items()])
    if isinstance(mine, (list, tuple)):
        return len(mine) == len(found) and all(map(same, mine, found))
    if hasattr(mine, "dtype"):
        return (mine.dtype, mine.shape, bits(mine)) == (found.dtype, found.shape, bits(found))
    return repr(mine) == repr(found)


VALUES = [
    {1: "a", (2, "b"): 3, None: 4, False: 5},
    (1, (2, [3, ()])),
    b"",
    b"\0\xff",
    {"raw": [b"a", {"deep": b"b" * 1000}]},
    [math.nan, math.inf, -0.0, 2**70, "\ud800", "é"],
    {"a": [1, 2.5], "b": [True, 1]},
    {"a": [[1, 2.5], [True]], "b": [1, 2]},
    {"a": [[1, 2], None], "b": [None, 0.5]},
    {"a": [(1, 2), (3,)], "b": [b"x", b""]},
    {"$array": 1, "$tuple": (1,)},
    [],
    np.zeros((2, 0, 3), np.float16),
    np.array(7, "<u8"),
    np.arange(24).reshape(2, 3, 4)[::-1, :, ::2].transpose(2, 0, 1),
    np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    {"big": np.arange(5, dtype=">i4"), "complex": np.ones(2, complex), "text": np.array(["é", "abc"])},
    {"bools": np.array([True, False]), "when": np.array(["2026-01-01"], "datetime64[s]")},
    {"x": [np.arange(2), np.ones((1, 1), np.float32)], "y": [1, 2]},
    [{"step": 3, "grads": [np.ones(3, np.float32), (np.zeros(()), None)]}],
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: repr(value)[:40])
def test_types_come_back_as_they_went_in(value):
    assert same(value, there_and_back(value))


def test_tensors_come_back_as_they_went_in():
    torch = pytest.importorskip("torch")
    names = "uint8 int8 int16 int32 int64 bool float16 float32 float64 bfloat16 complex64 float8_e4m3fn"
    ones = {name: torch.arange(6).reshape(2, 3).to(getattr(torch, name)) for name in names.split()}
    value = {
        **ones,
        "strided": torch.arange(12.0).reshape(3, 4).to(torch.bfloat16).T[::2],
        "empty": torch.empty(0, 4, dtype=torch.bfloat16),
        "scalar": torch.tensor(1.5, dtype=torch.bfloat16),
        "beside": [np.arange(3), torch.arange(3), b"x", (torch.ones(1),)],
    }
    found = there_and_back(value)
    assert same(value, found)
    assert same(value["scalar"], there_and_back(value["scalar"]))
    found["float32"].add_(1)  # memory of its own, that may be written
    assert found["float32"].tolist() == [[1, 2, 3], [4, 5, 6]]
    learned = there_and_back(torch.nn.Parameter(torch.ones(2)))
    assert (type(learned), learned.requires_grad) == (torch.Tensor, False)


def test_what_is_turned_into_something_equal_is_what_the_docstring_says():
    found = there_and_back([np.float32(0.5), np.int64(3), np.bool_(True)])
    assert same([0.5, 3, True], found)
    assert same({"a": [1, 2]}, there_and_back(Batch.pack({"a": [1, 2]})))
    array = there_and_back(np.arange(3))
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (object(), "data: builtins.object cannot be stored: use None"),
        ({"x": [1, {"y": {3, 4}}]}, r"data\['x'\]\[1\]\['y'\]: builtins.set cannot"),
        ({"x": [np.array([object()])]}, r"data\['x'\]\[0\]: an array of dtype object"),
        ([np.ma.masked_array([1])], r"data\[0\]: array subclass"),
        (np.longdouble(1), "has no equal Python value"),
        (bytearray(b"x"), "bytearray cannot be stored"),
    ],
)
def test_what_cannot_be_kept_is_said_with_where_it_is(value, said):
    with pytest.raises(BadInput, match=said):
        encode(value)


def test_what_has_no_end_is_refused():
    endless: list[Any] = []
    endless.append(endless)
    deep: Any = b""
    for _ in range(5000):
        deep = [deep]
    for value in (endless, deep):
        with pytest.raises(BadInput, match=r"contains itself|nested deeper|nested too deep"):
            encode(value)


def test_what_json_can_hold_and_columns_are_written_as_they_were():
    assert written(decode(pa.py_buffer(OLD_JSON))) == OLD_JSON
    assert decode(pa.py_buffer(OLD_JSON)) == {"lr": 1e-6, "nested": {"deep": [1, None, "é"]}}
    columns = {"tokens": [[1, 2], [3]], "rewards": [0.5, 1.0]}
    assert decode(pa.py_buffer(OLD_COLUMNS)) == columns
    assert written(columns)[:1] == OLD_COLUMNS[:1] == b"A"


@pytest.mark.parametrize("value", [{"a": b"x"}, {"a": [1, 2]}, {"a": 1}], ids=["tree", "columns", "json"])
def test_every_flipped_bit_and_every_cut_is_damage(value):
    whole = written(value)
    harmed = [whole[:at] for at in range(0, len(whole), 7)] + [whole + b"\0"]
    for at, bit in itertools.product(range(0, len(whole), 5), (1, 32)):
        harmed.append(whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :])
    for data in harmed:
        try:
            found = decode(pa.py_buffer(data))
        except PayloadDamaged:
            continue
        assert found == value, data  # a space of JSON that is another space


@pytest.mark.parametrize("columns", [{"value": [1]}, {"value": [[]]}, {"other": [{"data": 1}]}, {"value": [{"x": 1}]}])
def test_a_sealed_stream_that_is_no_value_is_damage(columns):
    ipc = Batch.pack(columns).ipc.to_pybytes()
    with pytest.raises(PayloadDamaged, match="holds no value"):
        decode(pa.py_buffer(b"T" + checksum(ipc).encode() + ipc))


@pytest.mark.parametrize("deep", [True, False], ids=["tree", "columns"])
def test_without_torch_only_a_tensor_is_missed_and_it_is_no_damage(tmp_path, deep):
    torch = pytest.importorskip("torch")
    tensor = torch.ones(2, dtype=torch.bfloat16)
    (tmp_path / "tensor").write_bytes(written({"x": tensor} if deep else {"x": [tensor]}))
    (tmp_path / "array").write_bytes(written({"x": np.arange(3), "y": b"z"}))
    code = f"""
import sys
sys.modules["torch"] = None
import pyarrow as pa
from pathlib import Path
from slime.cross_job.errors import BadInput
from slime.cross_job.proposal.encoding import decode
folder = Path({str(tmp_path)!r})
print(decode(pa.py_buffer((folder / "array").read_bytes())))
try:
    decode(pa.py_buffer((folder / "tensor").read_bytes()))
except BadInput as error:
    print(error)
assert "ray" not in sys.modules
"""
    words = [sys.executable, "-c", code]
    env = {"PYTHONPATH": str(OVERLAY)}
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=patient(120))
    assert done.returncode == 0, done.stderr
    assert "{'x': array([0, 1, 2]), 'y': b'z'}" in done.stdout
    assert "a tensor needs torch" in done.stdout
