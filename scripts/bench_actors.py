"""The two sides of the benchmark's hand-over: an actor that holds what was generated, and one that trains on it.

They stand for slime's Buffer (it keeps Python lists) and for rank 0 of its trainer. Each measures itself, with the
clock of its own process.
"""

import time
from collections.abc import Iterable
from typing import Any

import numpy as np
import ray
import torch

from slime.cross_job.batch import Batch
from slime.cross_job.client.consumer import Consumer, Rollout
from slime.cross_job.client.producer import returned

DICTS, TENSORS, PACKED, CROSS_JOB, FLOOR = "dict of lists", "tensors", "packed", "cross-job", "floor"
"""The ways to hand a batch over: slime at 079dbcf, slime v0.3.1, a batch through plain Ray, cross-job end to end."""

_TENSOR_TYPES = {"tokens": torch.long, "loss_masks": torch.int, "rollout_log_probs": torch.float32}  # as v0.3.1
_VOCABULARY = 151_936


def columns_of(samples: int, seed: int) -> dict[str, list[Any]]:
    """A rollout as slime makes it: Python lists, 512 samples being about 2.2 M tokens."""
    rng = np.random.default_rng(seed)
    prompts, responses = rng.integers(100, 601, samples), rng.integers(256, 7801, samples)
    masks = [np.ones(n, np.int64) for n in responses]
    for mask in masks[::4]:  # every fourth answer holds a tool's output, which is not trained on
        mask[len(mask) // 3 : len(mask) // 2] = 0
    return {
        "tokens": [rng.integers(0, _VOCABULARY, p + r).tolist() for p, r in zip(prompts, responses)],
        "response_lengths": responses.tolist(),
        "rewards": rng.integers(0, 2, samples).astype(float).tolist(),
        "truncated": rng.integers(0, 2, samples).tolist(),
        "loss_masks": [mask.tolist() for mask in masks],
        "sample_indices": list(range(samples)),
        "rollout_log_probs": [(-rng.exponential(0.5, n)).astype(np.float32).tolist() for n in responses],
    }


def tensors_of(columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """The same as slime v0.3.1 holds it: a tensor a sample."""
    return {
        name: [torch.tensor(row, dtype=_TENSOR_TYPES[name]) for row in values] if name in _TENSOR_TYPES else values
        for name, values in columns.items()
    }


def batch_of(nbytes: int) -> Batch:
    """A packed batch of about `nbytes` bytes, of 64 samples."""
    row = np.random.default_rng(0).integers(0, 1 << 30, nbytes // 64 // 4).astype(np.int32)
    return Batch.pack({"values": [row] * 64})


class Maker:
    """Holds generated columns, or a packed batch, and gives them away in each way."""

    def fill(self, samples: int, seed: int) -> dict[str, int]:
        """Make the columns anew; says how large they are."""
        self._columns: dict[str, list[Any]] = {}  # frees the former ones first
        self._columns = columns_of(samples, seed)
        self._packed_bytes = 0
        rows = [row for values in self._columns.values() if isinstance(values[0], list) for row in values]
        scalars = sum(len(values) for values in self._columns.values() if not isinstance(values[0], list))
        return {
            "samples": samples,
            "tokens": sum(map(len, self._columns["tokens"])),
            "elements": sum(map(len, rows)) + scalars,
            "token_sum": sum(map(sum, self._columns["tokens"])),
        }

    def empty(self) -> None:
        self._columns = {}

    def make(self, way: str) -> dict[str, Any]:
        """Hand the columns over with `ray.put`: {"refs": [one], "convert_ms", "put_ms"}."""
        start = time.perf_counter()
        value = self._convert(way)
        converted = time.perf_counter()
        refs = [ray.put(value)]
        done = time.perf_counter()
        return {"refs": refs, "convert_ms": 1e3 * (converted - start), "put_ms": 1e3 * (done - converted)}

    def _convert(self, way: str) -> Any:
        if way == PACKED:
            return Batch.pack(self._columns)
        if way == TENSORS:
            return tensors_of(self._columns)
        if way == FLOOR:
            self._packed_bytes = self._packed_bytes or Batch.pack(self._columns).nbytes
            return {"bytes": np.ones(self._packed_bytes, np.uint8)}
        return self._columns

    def generate(self) -> tuple[Any, ...]:
        """For publish_from: packs the columns."""
        return returned(self._columns)

    def hold(self, nbytes: int) -> int:
        """Make a packed batch and keep it; its size."""
        self._batch = batch_of(nbytes)
        return self._batch.nbytes

    def put_held(self) -> float:
        """Milliseconds of one `ray.put` of the batch."""
        start = time.perf_counter()
        ref = ray.put(self._batch)
        took = 1e3 * (time.perf_counter() - start)
        del ref
        return took

    def give_held(self) -> tuple[Any, ...]:
        """For publish_from: the batch as it is."""
        return returned(self._batch)

    def touch(self, nbytes: int, pieces: int) -> None:
        """Write `pieces` objects of `nbytes`, all alive at once, so that later writes meet no untouched page."""
        piece = np.ones(nbytes, np.uint8)
        refs = [ray.put(piece) for _ in range(pieces)]
        del refs


class Reader:
    """Reads what was handed over, and says how long it took."""

    def __init__(self, job_id: str):
        self._consumer = Consumer(job_id)

    def read(self, refs: list[Any]) -> dict[str, float]:
        """`ray.get`, then every token: {"consume_ms", "touch_ms", "token_sum"}."""
        start = time.perf_counter()
        value = ray.get(refs[0])
        columns = {name: value[name] for name in value}
        return _timed(start, columns.get("tokens", ()))

    def claim(self, rollout_id: int) -> dict[str, float]:
        """Claim a rollout of the job, open all its columns, read every token, ack it."""
        start = time.perf_counter()
        rollout = self._consumer.claim(rollout_id, timeout_s=60)
        columns = _open(rollout)
        found = _timed(start, columns["tokens"])
        rollout.ack()
        return found

    def open(self, rollout_id: int) -> dict[str, float]:
        """Claim a rollout, open it, ack it: {"claim_ms", "open_ms"}."""
        start = time.perf_counter()
        rollout = self._consumer.claim(rollout_id, timeout_s=60)
        claimed = time.perf_counter()
        _open(rollout)
        done = time.perf_counter()
        rollout.ack()
        return {"claim_ms": 1e3 * (claimed - start), "open_ms": 1e3 * (done - claimed)}

    def touch(self, rollout_ids: list[int]) -> None:
        """Read all of some rollouts, then ack them: maps their part of the object store into this process."""
        held = [self._consumer.claim(rollout_id, timeout_s=60) for rollout_id in rollout_ids]
        for rollout in held:
            for row in rollout.batch["values"]:
                row.max()
        for rollout in held:
            rollout.ack()

    def finish(self) -> None:
        self._consumer.finish()


def _open(rollout: Rollout) -> dict[str, Any]:
    return {name: rollout.batch[name] for name in rollout.batch}


def _timed(start: float, tokens: Iterable[Any]) -> dict[str, float]:
    opened = time.perf_counter()
    total = sum(sum(row) if isinstance(row, list) else int(row.sum()) for row in tokens)
    done = time.perf_counter()
    return {"consume_ms": 1e3 * (opened - start), "touch_ms": 1e3 * (done - opened), "token_sum": total}
