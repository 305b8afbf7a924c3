"""The two Ray jobs of check.py beside the demo's: they hand over tensors of the device.

The rollout job publishes rollouts of 1, 10 and 100 MB from tensors of its device; the train job claims each, copies it
to its own device and compares sums. Plain copies of the same tensors are the baseline. Then the train job hands 100 MB
of weights over in two ways: published (shared memory), and as handles of its own memory, as SGLang's
update_weights_from_tensor does. That is CUDA IPC on a GPU; on a CPU the same code goes through torch's shared memory.
Each job writes a JSON file.
"""

import argparse
import json
import pickle
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import torch
from torch import multiprocessing as torch_mp

from slime.cross_job import Consumer, Producer
from slime.cross_job.batch import Batch
from slime.cross_job.client.jobs import run
from slime.cross_job.client.weights import Weights

SIZES_MB, TURNS, SAMPLES = (1, 10, 100), 6, 64  # the first turn of each size is not counted
WEIGHTS_MB, TENSORS, WEIGHT_TURNS = 100, 16, 4
WAIT_S = 60.0
Times = dict[str, list[float]]


class Job:
    """What both sides need: the device, and a clock that waits for it."""

    def __init__(self, device: str):
        self.device = torch.device(device)
        self.times: dict[str, Times] = defaultdict(lambda: defaultdict(list))
        self.ipc = "CUDA IPC" if device != "cpu" else "torch's shared memory"
        if device == "cpu":
            torch_mp.set_sharing_strategy("file_system")  # handles that any process can open

    def timed(self, row: str, what: str, work: Callable[[], Any]) -> Any:
        """What `work` returns; its time, with what it left to the device, is noted in milliseconds."""
        self.wait()
        start = time.perf_counter()
        value = work()
        self.wait()
        self.times[row][what].append(1e3 * (time.perf_counter() - start))
        return value

    def medians(self) -> dict[str, dict[str, float]]:
        """Row -> what -> milliseconds, without the first turn."""
        return {
            row: {what: statistics.median(times[1:] or times) for what, times in of.items()}
            for row, of in self.times.items()
        }

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def numbers(self, count: int, megabytes: int, first: int) -> list[torch.Tensor]:
        """`count` tensors of `megabytes` together, other numbers for another `first`, made on the device."""
        length = megabytes * 1_000_000 // 4 // count
        return [
            torch.arange(first + i, first + i + length, dtype=torch.int32, device=self.device) for i in range(count)
        ]


def sums(tensors: list[torch.Tensor]) -> list[int]:
    return [int(tensor.sum(dtype=torch.int64)) for tensor in tensors]


def weights_of(job: Job) -> dict[str, torch.Tensor]:
    return {f"layer.{i}": tensor for i, tensor in enumerate(job.numbers(TENSORS, WEIGHTS_MB, 7))}


def rollout(job_id: str, job: Job) -> None:
    with Producer(job_id) as producer:
        for rollout_id in producer.demands(until=len(SIZES_MB) * TURNS):
            size = SIZES_MB[rollout_id // TURNS]
            values, row = job.numbers(SAMPLES, size, rollout_id), f"{size} MB"
            job.timed(
                row, "plain copy to host", lambda values=values: [tensor.to("cpu", copy=True) for tensor in values]
            )
            batch = job.timed(row, "pack", lambda values=values: Batch.pack({"values": values}))
            meta = {"sums": sums(values), "device": str(values[0].device)}
            job.timed(row, "publish", lambda: producer.publish(rollout_id, batch, meta=meta))  # noqa: B023
        mine = {name: torch.zeros_like(tensor) for name, tensor in weights_of(job).items()}
        version = handled = None
        for _ in range(WEIGHT_TURNS):
            published = producer.weights(version, WAIT_S)
            assert published is not None, "no weights were published"
            version = published.version
            load(job, "shared memory", mine, lambda: published)  # noqa: B023
            producer.publish_value("loaded", {"version": [version]})
            handled, found = heard(producer, "handles", handled)
            load(job, job.ipc, mine, lambda: pickle.loads(found["handles"][0]))  # noqa: B023
            producer.publish_value("loaded", {"version": [version]})


def heard(session: Producer | Consumer, key: str, newer_than: int | None) -> tuple[int, Any]:
    """The next value that the other job publishes under `key`, with its version."""
    found = session.value(key, newer_than, WAIT_S)
    assert found is not None, f"no {key} came within {WAIT_S:g} s"
    return found


def load(job: Job, how: str, mine: dict[str, torch.Tensor], opened: Callable[[], Weights | dict[str, Any]]) -> None:
    """Copy what is `opened` into own tensors, and compare it with what the train job has."""
    for tensor in mine.values():
        tensor.zero_()

    def copy() -> None:
        for name, tensor in opened().items():
            mine[name].copy_(tensor)

    job.timed(how, "open and copy to device", copy)
    expected = weights_of(job)
    assert all(torch.equal(mine[name], expected[name]) for name in expected), f"{how}: other weights than those sent"


def train(job_id: str, job: Job) -> None:
    with Consumer(job_id) as consumer:
        for rollout_id in range(len(SIZES_MB) * TURNS):
            row = f"{SIZES_MB[rollout_id // TURNS]} MB"
            consumer.demand(rollout_id)
            asked = time.time()
            with consumer.claim(rollout_id, timeout_s=WAIT_S) as claimed:
                batch = claimed.batch
                job.times[row]["claim"].append(1e3 * (time.time() - max(asked, claimed.published_at)))
                values = job.timed(
                    row, "to device", lambda batch=batch: [t.to(job.device, copy=True) for t in batch["values"]]
                )
                assert claimed.meta["sums"] == sums(values), f"rollout {rollout_id} came with other numbers"
                assert claimed.meta["device"] == str(values[0].device)
                host = [tensor.to("cpu", copy=True) for tensor in values]
                job.timed(row, "plain copy to device", lambda host=host: [t.to(job.device, copy=True) for t in host])
        weights = weights_of(job)
        loaded = None
        for version in range(WEIGHT_TURNS):
            job.timed("shared memory", "publish", lambda: consumer.publish_weights(version, weights))  # noqa: B023
            loaded, _ = heard(consumer, "loaded", loaded)
            handles = job.timed(job.ipc, "publish", lambda: bytes(ForkingPickler.dumps(weights)))
            consumer.publish_value("handles", {"handles": [handles]})
            loaded, _ = heard(consumer, "loaded", loaded)  # until then this process holds the memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("role", choices=("rollout", "train"))
    parser.add_argument("--job-id", required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file")
    args = parser.parse_args()
    job = Job(args.device)
    try:
        (rollout if args.role == "rollout" else train)(args.job_id, job)
    finally:
        args.out.write_text(json.dumps(job.medians()) + "\n")


if __name__ == "__main__":
    run(main)
