"""Columns of torch tensors: every dtype, over the batch's memory, and what is refused."""

import warnings
from typing import Any

import numpy as np
import pytest

from slime.cross_job.batch import Batch
from slime.cross_job.errors import BatchError

torch: Any = pytest.importorskip("torch")


def start_of(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])


NAMES = (
    "uint8 int8 int16 int32 int64 bool float16 float32 float64 complex64 complex128 bfloat16 float8_e4m3fn float8_e5m2"
)


@pytest.mark.parametrize("name", NAMES.split())
def test_tensors_come_out_as_tensors_over_the_stream(name: str) -> None:
    dtype = getattr(torch, name)
    rows = [torch.arange(24).reshape(2, 3, 4).to(torch.float32).to(dtype)]
    rows += [rows[0][:, ::2], rows[0].permute(2, 0, 1), rows[0][:0], rows[0][1, 1, 1], None]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batch = Batch.pack({"x": rows})
        found = batch["x"].tolist()
    for a, b in zip(found[:-1], rows[:-1]):
        assert (type(a), a.dtype, a.shape) == (torch.Tensor, b.dtype, b.shape)
        assert torch.equal(a.float() if not a.is_complex() else a, b.float() if not b.is_complex() else b)
    assert found[-1] is None
    assert batch["x"] == rows
    assert np.shares_memory(batch["x"].numpy_at(0), np.frombuffer(batch.ipc, np.uint8))
    assert found[0].data_ptr() == start_of(batch["x"].numpy_at(0))
    assert batch["x"].numpy_at(1).itemsize == rows[0].element_size()
    # A tensor is a storage of its own: pickling it must not drag the whole column along.
    assert found[4].untyped_storage().nbytes() == rows[0].element_size()


def test_mixed_rows_of_arrays_and_tensors_keep_library_and_dtype() -> None:
    rows = [
        torch.ones(3, dtype=torch.bool),
        np.ones(2),
        torch.ones(5).half(),
        np.zeros(3, "S3"),
        None,
        np.zeros(2, ">f8"),
    ]
    batch = Batch.pack({"x": rows, "y": [{"t": row} for row in rows]})
    assert batch["x"] == rows
    assert batch["y"] == [{"t": row} for row in rows]
    assert all(start_of(batch["x"].numpy_at(i)) % 8 == 0 for i in (0, 1, 2, 3, 5))
    assert Batch.from_ipc(batch.select([2, 4, 1]).ipc)["x"] == [rows[2], None, rows[1]]


def test_tensors_come_out_on_the_cpu_whatever_the_default_device() -> None:
    rows = [torch.ones(2), torch.ones(0), torch.ones(2, 3).T]
    with torch.device("meta"):
        found = Batch.pack({"x": rows})["x"].tolist()
        assert torch.ones(1).device.type == "meta", "witness: the default device is another"
    assert [row.device.type for row in found] == ["cpu"] * 3
    assert all(torch.equal(a, b) for a, b in zip(found, rows))


def test_tensors_are_detached_and_some_are_refused() -> None:
    found = Batch.pack({"x": [torch.ones(2, requires_grad=True), torch.nn.Parameter(torch.ones(2, 2)).T]})["x"]
    assert [row.requires_grad for row in found] == [False, False]
    assert Batch.pack({"x": [torch.tensor([1 + 2j]).conj()]})["x"][0].tolist() == [1 - 2j]
    assert Batch.pack({"x": [torch.tensor(3), 4]})["x"].tolist() == [torch.tensor(3), 4]
    with pytest.raises(BatchError, match="'x' is a torch"):
        Batch.pack({"x": torch.ones(2)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch is about to drop them
        quantized = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.quint8)
    for bad, word in [
        (torch.ones(2, 2).to_sparse(), "to_dense"),
        (quantized, "quantized"),
        (torch.ones(2, device="meta"), "meta"),
        (torch.ones((1,) * 33), "33 dimensions"),
    ]:
        with pytest.raises(BatchError, match=f"'x', sample 1.*{word}"):
            Batch.pack({"x": [torch.ones(1), bad]})
