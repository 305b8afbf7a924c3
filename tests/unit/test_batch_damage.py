"""Bytes that are old, foreign, cut, flipped or hostile."""

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from slime.cross_job.batch import Batch, wire
from slime.cross_job.batch.readers import TENSOR_TYPE, TREE_TYPE
from slime.cross_job.batch.wire import Encoded, Node
from slime.cross_job.errors import BatchError

HERE = Path(__file__).parent
GOLDEN = HERE / "data" / "batch_v1.arrow"

# What the golden file holds. It was written once by `Batch.pack(GOLDEN_COLUMNS | tensors, GOLDEN_ATTRS)` with format
# version 1 and must be read for as long as that version is: never write it again.
GOLDEN_COLUMNS: dict[str, list[Any]] = {
    "tokens": [[1, 2, 300], [], None, [151_643]],
    "loss_masks": [[1, 0, 1], [], [1], [0]],
    "bools": [[True], [False, True], [], None],
    "rollout_log_probs": [[None, -0.5], [0.25], [], [0.1]],
    "pairs": [(1, 2), (), (3,), None],
    "rewards": [1.0, None, 0.1, -0.0],
    "sample_indices": [0, 1, 2, 2**40],
    "truncated": [True, None, False, True],
    "prompts": ["a", None, "grün", ""],
    "raw": [b"\x00\xff", b"", None, b"x"],
    "metadata": [{"a": (1, None)}, {2: math.inf, "$x": "\ud800"}, [1 << 70, b"\x01"], None],
}
GOLDEN_ARRAYS = [np.arange(6, dtype="<f4").reshape(2, 3), np.zeros((0, 2), ">i2"), None, np.array("ab")]
GOLDEN_ATTRS = {"rollout_id": 7, "partition": (0, 1), "bytes": b"\x80"}


def test_the_golden_file_is_read() -> None:
    batch = Batch.from_ipc(GOLDEN.read_bytes())
    assert {name: batch[name].tolist() for name in GOLDEN_COLUMNS} == GOLDEN_COLUMNS
    assert math.copysign(1, batch["rewards"][3]) == -1
    assert batch["arrays"] == GOLDEN_ARRAYS
    assert batch["arrays"][1].dtype == np.dtype(">i2")
    assert batch.attrs == GOLDEN_ATTRS
    assert batch["tensors"].numpy_at(0).tolist() == [0x3F80, 0x4000]  # bfloat16 1.0 and 2.0
    assert batch["tensors"].numpy_at(3).tolist() == [[1, 2]]
    torch = pytest.importorskip("torch")
    wanted = [torch.tensor([1, 2]).bfloat16(), torch.tensor(True), None, torch.tensor([[1, 2]])]
    assert batch["tensors"] == wanted


def test_other_tools_can_read_the_stream() -> None:
    table = pa.ipc.open_stream(GOLDEN.read_bytes()).read_all()
    table.validate(full=True)
    for name in ("tokens", "rollout_log_probs", "prompts", "raw", "sample_indices"):
        assert table[name].to_pylist() == GOLDEN_COLUMNS[name]


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"", "not a slime"),
        (b"not arrow at all", "not a slime"),
        (b"\xff" * 4096, "not a slime"),
        (b"\x80\x05cos\nsystem\n.", "not a slime"),
        ("text", "not a contiguous buffer"),
        (None, "not a contiguous buffer"),
        (memoryview(b"x" * 64)[::2], "not a"),
    ],
)
def test_foreign_bytes(data: Any, word: str) -> None:
    with pytest.raises(BatchError, match=word):
        Batch.from_ipc(data)


def stream(table: pa.Table, **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def test_foreign_arrow_streams() -> None:
    with pytest.raises(BatchError, match="not a slime cross-job batch"):
        Batch.from_ipc(stream(pa.table({"x": [1]})))
    good = pa.ipc.open_stream(Batch.pack({"x": [[7] * 5000]}).ipc).read_all()
    assert Batch.from_ipc(stream(good))["x"].lengths().tolist() == [5000]
    with pytest.raises(BatchError, match="compressed"):
        Batch.from_ipc(stream(good, compression="lz4"))
    newer = good.replace_schema_metadata({**good.schema.metadata, b"slime.cross_job.batch": b"2"})
    with pytest.raises(BatchError, match=r"format 2.*reads format 1.*upgrade"):
        Batch.from_ipc(stream(newer))
    with pytest.raises(BatchError, match="not one whole batch"):
        Batch.from_ipc(stream(pa.concat_tables([good, good])))


def test_every_cut_is_noticed() -> None:
    data = GOLDEN.read_bytes()
    for size in range(len(data)):
        with pytest.raises(BatchError):
            Batch.from_ipc(data[:size])
    with pytest.raises(BatchError, match="not one whole batch"):
        Batch.from_ipc(data + b"\0" * 8)


def forged(kind: str, meta: dict[str, Any], node: Node, attrs: bytes = b'["{}",""]') -> pa.Buffer:
    return wire.write({"x": Encoded(kind, meta, node)}, attrs)


def offsets(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def tensor_node(shape: list[int], data: bytes, which: int = 0) -> Node:
    children = (
        Node(pa.large_binary(), 1, None, (offsets(0, len(data)), np.frombuffer(data, np.uint8))),
        Node(
            TENSOR_TYPE["shape"].type,
            1,
            None,
            (offsets(0, len(shape)),),
            (Node(pa.int64(), len(shape), None, (offsets(*shape),)),),
        ),
        Node(pa.int32(), 1, None, (np.array([which], np.int32),)),
    )
    return Node(TENSOR_TYPE, 1, None, (), children)


@pytest.mark.parametrize(
    ("token", "shape", "which"),
    [
        ("<f4", [3], 0),
        ("<f4", [-1], 0),
        ("<f4", [2**62, 4], 0),
        ("<f4", [2**62, 2**62], 0),
        ("<f4", [0, 2**62, 2**62], 0),
        ("<f4", [1] * 60, 0),
        ("<f4", [2], 1),
        ("<f4", [2], -1),
        ("<U2000000000", [1], 0),
        ("|O", [1], 0),
        ("O", [1], 0),
        ("|V0", [2**40], 0),
        ("float32", [1], 0),
        ("i4,O", [1], 0),
        ([["a", "|O"]], [1], 0),
        ([["a", [["b", "|O"]]]], [1], 0),
        ([["a", "<f4", [2**40]]], [1], 0),
        ([["a", "<f4", -1]], [1], 0),
        ([["a", "|V2000000000"], ["b", "|V2000000000"]], [1], 0),
        ([["a"]], [1], 0),
        ([], [1], 0),
        (7, [1], 0),
        (None, [1], 0),
        ({"names": ["a"]}, [1], 0),
    ],
)
def test_hostile_shapes_and_dtypes(token: Any, shape: list[int], which: int) -> None:
    data = forged("tensor", {"types": [["numpy", token]]}, tensor_node(shape, b"12345678", which))
    with pytest.raises(BatchError, match="'x'"):
        Batch.from_ipc(data)["x"][0]


@pytest.mark.parametrize("cuts", [(0, 9), (0, -1), (3, 1), (-8, 3), (2**62, 2**63 - 1), (-(2**63), 2)])
def test_hostile_offsets(cuts: tuple[int, int]) -> None:
    """Arrow itself looks at the first and the last offset only."""
    child = Node(pa.uint8(), 4, None, (np.arange(4, dtype=np.uint8),))
    node = Node(pa.large_list(pa.uint8()), 3, None, (offsets(0, *cuts, 4),), (child,))
    column = Batch.from_ipc(forged("list", {"py": "int", "tuple": False}, node))["x"]
    for read in (lambda: column[1], column.tolist, column.lengths, column[[1]].lengths, column[1:].encode):
        with pytest.raises(BatchError, match="'x'"):
            read()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nope",
        "NaN",
        '{"$tuple": 1}',
        '{"$nope": 1}',
        '{"$tuple": [], "b": 1}',
        '{"$dict": [[[], 1]]}',
        '{"$dict": [[1]]}',
        '{"$int": "zz"}',
        '{"$int": 5}',
        '{"$float": "00"}',
        '{"$str": "ff"}',
        '{"$bytes": [0, 9]}',
        '{"$bytes": [-4, 2]}',
        '{"$bytes": [4, -2]}',
        '{"$bytes": [0.0, 2]}',
        '{"$bytes": null}',
        '{"$array": ["numpy", "<f4", [3], 0]}',
        '{"$array": ["numpy", "<f4", [1], 5]}',
        '{"$array": ["numpy", "<f4", 3, 0]}',
        '{"$array": ["numpy", "<f4", {"a": 1}, 0]}',
        '{"$array": ["numpy", "<f4", [true], 0]}',
        '{"$array": ["numpy", "|O", [1], 0]}',
        '{"$array": ["torch", "load", [1], 0]}',
        '{"$array": ["os", "system", [1], 0]}',
        "[" * 200_000,
        "1" * 10_000,
        '{"a":' * 5000,
    ],
)
def test_hostile_trees(text: str) -> None:
    data = text.encode()
    children = (
        Node(pa.large_utf8(), 1, None, (offsets(0, len(data)), np.frombuffer(data, np.uint8))),
        Node(pa.large_binary(), 1, None, (offsets(0, 8), np.zeros(8, np.uint8))),
    )
    column = Batch.from_ipc(forged("tree", {}, Node(TREE_TYPE, 1, None, (), children)))["x"]
    with pytest.raises(BatchError, match="'x', sample 0"):
        column[0]


@pytest.mark.parametrize("attrs", [b"", b"[]", b'["{}"]', b'["[]", ""]', b'["{}", "*"]', b"[1, 2]", b"[" * 10_000])
def test_hostile_attrs(attrs: bytes) -> None:
    number = Node(pa.int32(), 1, None, (np.zeros(1, np.int32),))
    batch = Batch.from_ipc(forged("scalar", {"py": "int"}, number, attrs))
    assert batch["x"].tolist() == [0]
    if attrs != b'["{}", "*"]':  # base64 skips what is not in its alphabet
        with pytest.raises(BatchError, match="attrs"):
            batch.attrs  # noqa: B018


def test_kinds_that_do_not_fit_their_type() -> None:
    number = Node(pa.int32(), 1, None, (np.zeros(1, np.int32),))
    metas: dict[str, dict[str, Any]] = {
        "text": {"py": "str"},
        "list": {},
        "tensor": {"types": []},
        "tree": {},
        "pickle": {},
    }
    for kind, meta in metas.items():
        with pytest.raises(BatchError, match="'x'"):
            Batch.from_ipc(forged(kind, meta, number))


@pytest.mark.parametrize("seed", [1, 2])
def test_random_damage_never_crashes(seed: int) -> None:
    """In a process of its own: a segmentation fault is an exit code. CROSS_JOB_FUZZ_ROUNDS asks for more rounds."""
    rounds = os.environ.get("CROSS_JOB_FUZZ_ROUNDS", "1500")
    command = [sys.executable, "-X", "faulthandler", str(HERE / "batch_fuzz.py"), str(seed), rounds]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    assert all(word in done.stdout for word in ("refused", "damaged", "read"))  # every outcome was met
