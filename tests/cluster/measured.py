"""What bench_machines.py runs on the machines: a producer, and consumers that say what they took. One driver each.

Files in the run's folder are how they meet: NAME.ready (written here), NAME.go (waited for), NAME.json (the figures).
"""

import argparse
import json
import logging
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import ray

from slime.cross_job import Batch, Consumer, Producer
from slime.cross_job.client.connection import Connection

NAMESPACE = "measured"
_SECONDS = 300.0
_NAMED = {"namespace": NAMESPACE, "timeout_s": _SECONDS}


def batch(nbytes: int) -> Batch:
    """16 samples of random numbers."""
    numbers = np.random.default_rng(0).integers(0, 1 << 30, nbytes // 4, dtype=np.int32)
    return Batch.pack({"tokens": np.array_split(numbers, 16)})


def produce(args: argparse.Namespace) -> None:
    """Publish what is demanded, in parts, not faster than one every so many seconds."""
    parts = [batch(args.nbytes // args.parts) for _ in range(args.parts)]
    with Producer(args.job_id, max_ahead=args.ahead, **_NAMED) as producer:
        for rollout_id in producer.demands(until=args.count):
            began = time.monotonic()
            producer.publish(rollout_id, parts if args.parts > 1 else parts[0], weight_version=0)
            time.sleep(max(0.0, began + args.every_s - time.monotonic()))


@ray.remote(num_cpus=0)
class Rank:
    def read(self, refs: list[Any]) -> int:
        """Bytes of what Ray has brought here."""
        return sum(one.nbytes for one in ray.get(refs))


def read(args: argparse.Namespace) -> dict[str, Any]:
    """Ranks at these addresses read every rollout: each the part of its machine, or all of it where there is one."""
    ranks = [Rank.options(resources={f"node:{ip}": 0.001}).remote() for ip in args.ranks]  # type: ignore[attr-defined]
    ray.get([rank.__ray_ready__.remote() for rank in ranks], timeout=_SECONDS)
    nbytes = []
    with Consumer(args.job_id, **_NAMED) as consumer:
        for rollout_id in range(args.count):
            consumer.demand(rollout_id)
        while len(consumer.rollout_ids()) < args.count:
            time.sleep(0.1)
        meet(args)
        for rollout_id in range(args.count):
            with consumer.claim(rollout_id) as rollout:
                refs = rollout.refs
                shares = [[refs[at]] if len(refs) > 1 else refs for at in range(len(ranks))]
                nbytes.append(
                    ray.get([r.read.remote(s) for r, s in zip(ranks, shares, strict=True)], timeout=_SECONDS)
                )
        found = {"nbytes": nbytes, "at": time.monotonic()}
        (args.folder / f"{args.name}.json").write_text(json.dumps(found))
        time.sleep(2)  # for counters to be read before this ends
    return found


@ray.remote(num_cpus=0, resources={"rollout": 0.01})
class Maker:
    def make(self, nbytes: int) -> np.ndarray:
        return np.random.default_rng(0).integers(0, 1 << 30, nbytes // 4, dtype=np.int32)


def race(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds until a batch from the other machine is here: by cross-job, and a plain array by Ray."""
    maker, took = Maker.remote(), {"cross-job": [], "plain": []}  # type: ignore[attr-defined,var-annotated]
    with Consumer(args.job_id, **_NAMED) as consumer:

        def cross_job(turn: int) -> Callable[[], int]:
            consumer.demand(turn)
            while turn not in consumer.rollout_ids():
                time.sleep(0.1)

            def take() -> int:
                with consumer.claim(turn) as rollout:
                    return int(rollout.batch["tokens"][-1][-1])

            return take

        def plain(turn: int) -> Callable[[], int]:
            ref = maker.make.remote(args.nbytes)
            ray.wait([ref], timeout=_SECONDS, fetch_local=False)
            return lambda: int(ray.get(ref, timeout=_SECONDS)[-1])

        meet(args)
        for turn in range(args.count):
            for name, prepare in random.Random(turn).sample([("cross-job", cross_job), ("plain", plain)], 2):
                take = prepare(turn)
                time.sleep(1)
                began = time.monotonic()
                take()
                if turn:
                    took[name].append(time.monotonic() - began)
                del take
    return took


def follow(args: argparse.Namespace) -> dict[str, Any]:
    """Consumers of one group, one a job, each of which asks for the next rollout as soon as it has acked one."""
    counted: dict[str, list[float]] = {job_id: [] for job_id in args.jobs}
    depth: list[int] = []

    def consume(job_id: str) -> None:
        with Consumer(job_id, group=args.group, **_NAMED) as consumer:
            for rollout_id in range(args.count):
                if args.group == "train":
                    consumer.demand(rollout_id)
                with consumer.claim(rollout_id) as rollout:
                    assert rollout.batch["tokens"][-1] is not None
                counted[job_id].append(time.monotonic())

    threads = [threading.Thread(target=consume, args=[job_id], daemon=True) for job_id in args.jobs]
    meet(args)
    for thread in threads:
        thread.start()
    connection = Connection(NAMESPACE)
    while any(thread.is_alive() for thread in threads):
        depth.append(max((job["queue_depth"] for job in connection.call("status").values()), default=0))
        time.sleep(2)
    return {"counted": counted, "depth": depth}


def meet(args: argparse.Namespace) -> None:
    (args.folder / f"{args.name}.ready").touch()
    deadline = time.monotonic() + _SECONDS
    while not (args.folder / f"{args.name}.go").exists():
        assert time.monotonic() < deadline, "nobody says go"
        time.sleep(0.05)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("what", choices=["produce", "read", "race", "follow"])
    add("--name", default="")
    add("--folder", type=Path, required=True)
    add("--job-id", default="")
    add("--jobs", nargs="*")
    add("--group", default="train")
    add("--count", type=int, required=True)
    add("--nbytes", type=int, default=0)
    add("--parts", type=int, default=1)
    add("--ahead", type=int, default=1)
    add("--every-s", type=float, default=0.0)
    add("--ranks", nargs="*")
    args = parser.parse_args()
    ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR, namespace=NAMESPACE)
    found = globals()[args.what](args)
    if found is not None:
        (args.folder / f"{args.name}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
