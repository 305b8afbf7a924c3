"""Where the bytes lie: views of the one buffer, one out-of-band buffer when pickled; no torch unless asked for."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from slime.cross_job.batch import Batch
from slime.cross_job.errors import BatchError


def python(code: str, given: bytes = b"") -> "subprocess.CompletedProcess[bytes]":
    """Another process with this one's import path."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run([sys.executable, "-c", code], input=given, capture_output=True, env=environment)


def whole(batch: Batch) -> np.ndarray:
    return np.frombuffer(batch.ipc, np.uint8)


def start_of(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])


def test_rows_are_read_only_views_of_the_stream() -> None:
    batch = Batch.pack(
        {
            "l": [[1, 2, 300], [4]],
            "b": [[True], [False]],
            "a": [np.ones(3), np.ones((2, 2), np.int16)],
            "n": [0.1, 0.2],
            "t": [{"x": np.ones(3)}, {"y": [np.ones(3)]}],
        }
    )
    views = [batch["l"][0], batch["b"][1], batch["a"][1], batch["a"].numpy_at(0), batch["n"].numpy()]
    views += [batch["n"][::-1].numpy(), batch["t"][0]["x"], batch["t"][1]["y"][0]]
    for view in views:
        assert np.shares_memory(view, whole(batch))
        assert not view.flags.writeable
        with pytest.raises(ValueError, match="read-only"):
            view[...] = 0
    assert not batch.ipc.is_mutable


def test_opening_a_buffer_does_not_copy_it() -> None:
    data = Batch.pack({"l": [[1, 2, 300], [4]]}).ipc.to_pybytes()
    for source in (data, memoryview(data), pa.py_buffer(data), np.frombuffer(data, np.uint8)):
        opened = Batch.from_ipc(source)
        assert np.shares_memory(opened["l"][0], np.frombuffer(data, np.uint8))
    shifted = Batch.from_ipc(memoryview(b"x" + data)[1:])
    assert shifted["l"][0].flags.aligned
    assert shifted["l"] == [[1, 2, 300], [4]]


def test_a_selection_shares_the_buffers_and_reads_only_its_rows() -> None:
    """The witness: the other rows' places in the stream are damaged, and the selection does not notice."""
    good = Batch.pack({"l": [[1] * 100, [300] * 50, [7] * 25], "t": [{"a": 1}, {"b": 2}, {"c": 3}]})
    data = np.frombuffer(bytearray(good.ipc), np.uint8)
    opened = Batch.from_ipc(data)
    view = opened.select([1])
    first, last = opened["l"][0], opened["l"][2]
    assert start_of(view["l"][0]) == start_of(first) + first.nbytes
    assert start_of(view["l"][0]) + view["l"][0].nbytes == start_of(last)
    base = start_of(data)
    for row in (first, last):
        data[start_of(row) - base :][: row.nbytes] = 0xFF
    for other in (b'{"a":1}', b'{"c":3}'):
        at = bytes(data).index(other)
        data[at : at + len(other)] = 0xFF
    with pytest.raises(BatchError, match="'t', sample 0"):
        opened["t"].tolist()
    assert view.to_pydict() == {"l": [[300] * 50], "t": [{"b": 2}]}
    assert Batch.from_ipc(view.ipc).to_pydict() == view.to_pydict()
    assert view.nbytes < good.nbytes - 400


def test_lengths_read_offsets_only() -> None:
    good = Batch.pack({"l": [[300] * 9, [], None], "a": [np.ones((4, 2)), np.ones(3), None]})
    data = np.frombuffer(bytearray(good.ipc), np.uint8)
    opened = Batch.from_ipc(data)
    for row in (opened["l"][0], opened["a"][0], opened["a"][1]):
        data[start_of(row) - start_of(data) :][: row.nbytes] = 0xFF
    assert opened["l"].lengths().tolist() == [9, 0, 0]
    assert opened["a"].lengths().tolist() == [4, 3, 0]
    assert opened["l"].lengths().dtype == np.int64


def test_pickle_5_hands_over_one_buffer_and_copies_nothing() -> None:
    batch = Batch.pack({"l": [[i] * 1000 for i in range(100)]}, {"k": 1})
    buffers: list[pickle.PickleBuffer] = []
    head = pickle.dumps(batch, 5, buffer_callback=buffers.append)
    assert (len(buffers), len(head) < 200) == (1, True)
    assert np.shares_memory(np.frombuffer(buffers[0].raw(), np.uint8), whole(batch))
    again = pickle.loads(head, buffers=buffers)
    assert np.shares_memory(again["l"][3], whole(batch))
    assert again == batch
    assert again.attrs == {"k": 1}


@pytest.mark.parametrize("protocol", range(2, 6))
def test_views_and_columns_pickle_only_their_rows(protocol: int) -> None:
    batch = Batch.pack({"l": [[i] * 1000 for i in range(100)], "s": [str(i) for i in range(100)]}, {"k": 1})
    view = pickle.loads(pickle.dumps(batch.select([3, 1]), protocol))
    assert view.to_pydict() == {"l": [[3] * 1000, [1] * 1000], "s": ["3", "1"]}
    assert view.attrs == {"k": 1}
    data = pickle.dumps(batch["l"][5:7], protocol)
    assert len(data) < 3500
    assert pickle.loads(data) == [[5] * 1000, [6] * 1000]


WITHOUT_TORCH = """
import pickle, sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "ray"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Block())
from slime.cross_job.batch import Batch
from slime.cross_job.errors import BatchError

batch = pickle.loads(sys.stdin.buffer.read())
assert batch["tokens"].tolist()[0] == [1, 2, 300]
assert batch["tensors"].numpy_at(0).tolist() == [0x3F80, 0x4000]
assert batch["tensors"][2] is None
assert Batch.from_ipc(batch.select([3]).ipc)["tensors"].numpy_at(0).tolist() == [[1, 2]]
try:
    batch["tensors"][0]
except BatchError as error:
    assert "numpy_at" in str(error), error
else:
    raise SystemExit("a tensor without torch?")
import numpy
assert Batch.pack({"a": [numpy.ones(2)], "m": [{"x": 1}]})["a"][0].tolist() == [1.0, 1.0]
assert "torch" not in sys.modules and "ray" not in sys.modules
"""


def test_works_where_torch_cannot_be_imported() -> None:
    """The golden batch has a column of tensors."""
    batch = Batch.from_ipc((Path(__file__).parent / "data" / "batch_v1.arrow").read_bytes())
    done = python(WITHOUT_TORCH, pickle.dumps(batch))
    assert done.returncode == 0, done.stderr.decode()


def test_importing_and_packing_loads_neither_torch_nor_ray() -> None:
    pack = "import sys; from slime.cross_job.batch import Batch; Batch.pack({'x': [[1]]})"
    done = python(f"{pack}; assert not {{'torch', 'ray'}} & {{*sys.modules}}")
    assert done.returncode == 0, done.stderr.decode()
