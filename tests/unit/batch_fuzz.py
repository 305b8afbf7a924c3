"""Damages a batch in many ways and reads everything that opens; run as a program, so that a crash is an exit code.

    python batch_fuzz.py SEED ROUNDS [torch]

Exits with 0 if every damaged buffer gave BatchError or values; prints how many of each.
"""

import collections
import random
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from slime.cross_job.batch import Batch, Column
from slime.cross_job.errors import BatchError


def sample_batch() -> Batch:
    columns: dict[str, list[Any]] = {
        "tokens": [[1, 2, 300], [], [5] * 20, None, [70000]],
        "masks": [[True, False], [True], [], [False], [True] * 9],
        "log_probs": [[None, -0.5], [0.25], [], [], [0.1]],
        "rewards": [1.0, None, 0.1, 2.0, float("nan")],
        "names": ["a", None, "ü", "", "longer"],
        "blobs": [b"x", b"", None, b"yy", b"\xff"],
        "arrays": [np.array(7, np.int16), np.arange(6.0).reshape(2, 3), None, np.zeros((0, 4)), np.array(["ab", "c"])],
        "records": [np.zeros(2, [("a", "<i4"), ("b", "<f4", (2,))]) for _ in range(5)],
        "trees": [{"a": (1, "é")}, {1: float("inf")}, [b"123"], {"$x": 1 << 70}, {"p": np.arange(5), "s": "\ud800"}],
    }
    if "torch" in sys.argv:
        import torch

        columns["tensors"] = [torch.ones(2, 3), torch.zeros(0), None, torch.tensor(True), torch.ones(4).bfloat16()]
    return Batch.pack(columns, {"layout": (1, 2), "weights": np.arange(3)})


def touch(value: Any) -> None:
    """Read every byte that a value shows."""
    if isinstance(value, np.ndarray):
        value.tobytes()
    elif type(value).__name__ == "Tensor":
        value.clone()
    elif isinstance(value, dict):
        for key, item in value.items():
            touch(key)
            touch(item)
    elif isinstance(value, (list, tuple, Column)):
        for item in value:
            touch(item)


def read_all(data: bytes) -> str:
    """What became of the buffer: refused, damaged (opened, some value refused) or read."""
    try:
        batch = Batch.from_ipc(data)
    except BatchError:
        return "refused"
    refused = False
    for name in batch:
        try:
            read_column(batch, name)
        except BatchError:
            refused = True
        except IndexError:  # fewer samples than before
            if batch.num_samples >= 4:
                raise
    return "damaged" if refused else "read"


def read_column(batch: Batch, name: str) -> None:
    """Everything that can be asked of a column; the first refusal does not keep from asking the rest."""
    column = batch[name]
    reads: list[Callable[[], object]] = [
        column.tolist,
        lambda: touch(column),
        lambda: touch(batch.select([0, -1])[name].tolist()),
        lambda: Batch.from_ipc(batch.select(range(1, 4)).ipc),
        lambda: touch(batch.attrs),
    ]
    if column.kind in ("list", "tensor"):
        reads.append(lambda: batch.select([1, 4])[name].lengths())
    if column.kind == "scalar":
        reads.append(column[1:1].numpy)
    refusals = []
    for read in reads:
        try:
            read()
        except BatchError as error:
            refusals.append(error)
    if refusals:
        raise refusals[0]


def damage(random_: random.Random, good: bytes) -> bytes:
    data = bytearray(good)
    how = random_.choice([0, 1, 2, 3, 3, 4, 4, 5, 5])
    if how == 0:
        return bytes(data[: random_.randrange(len(data))])
    if how == 1:
        return bytes(data) + random_.randbytes(random_.randrange(1, 64))
    if how == 2:
        start = random_.randrange(len(data))
        data[start : start + random_.randrange(1, 64)] = b""
        return bytes(data)
    first = random_.choice([0, len(data) * 2 // 3])  # the last third holds the columns' buffers
    for _ in range(random_.choice([1, 1, 1, 2, 8])):
        at = random_.randrange(first, len(data))
        if how == 3:
            data[at] ^= 1 << random_.randrange(8)
        elif how == 4:
            data[at] = random_.choice([0, 1, 0x7F, 0x80, 0xFF, 0x22, 0x30, 0x39, 0x5B])
        else:
            word = random_.choice([0, -1, 1, 1 << 31, (1 << 62), (1 << 63) - 1, -(1 << 63), 255])
            at -= at % 8
            data[at : at + 8] = word.to_bytes(8, "little", signed=True)
    return bytes(data[: len(good)])


def main(seed: int, rounds: int) -> None:
    good = sample_batch().ipc.to_pybytes()
    if read_all(good) != "read":
        raise SystemExit("the undamaged batch cannot be read")
    random_ = random.Random(seed)
    found: collections.Counter[str] = collections.Counter()
    for turn in range(rounds):
        state = random_.getstate()
        try:
            found[read_all(damage(random_, good))] += 1
        except BaseException:
            print(f"seed {seed}, round {turn}, state {hash(state)}", file=sys.stderr)
            raise
    print(dict(found))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
