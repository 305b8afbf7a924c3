"""What it costs that a job's two sides are on two Ray clusters, with nothing but a durable store between them.

The same consumer, once on the cluster of its producer, once on another one; each rollout (1 MB) is published before it
is asked for. Run by itself: `scripts/bench.sh --clusters [--redis] [--rollouts N]`.
"""

import argparse
import contextlib
import logging
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import ray
from bench_report import figure, table
from bench_stores import own_redis
from job_api import job_client
from local_cluster import LocalCluster, begin_without, says_why

from slime.cross_job import Batch, Consumer, Producer
from slime.cross_job.jobs import run

_NUMBERS = 250_000  # of 4 bytes
_TIMEOUT_S = 120.0


def produce(job_id: str, store: str, count: int) -> None:
    """In a Ray job of its own: publish that many rollouts, then stay until it is stopped."""
    ray.init()
    batch = Batch.pack({"tokens": [np.arange(_NUMBERS, dtype=np.int32)]})
    with Producer(job_id, store=store, max_ahead=count) as producer:
        for rollout_id in range(count):
            producer.publish(rollout_id, batch, weight_version=0)
        time.sleep(600)


def consume(job_id: str, store: str, count: int) -> dict[str, list[float]]:
    """Milliseconds of each call, by name."""
    found: dict[str, list[float]] = defaultdict(list)

    def timed(name: str, act: Callable[..., Any], *args: Any) -> Any:
        began = time.perf_counter()
        result = act(*args)
        found[name].append(1000 * (time.perf_counter() - began))
        return result

    with Consumer(job_id, store=store, timeout_s=_TIMEOUT_S) as consumer:
        consumer.claim(count - 1).release()  # the last one is there, so they all are
        for rollout_id in range(count - 1):
            timed("demand", consumer.demand, rollout_id)
            rollout = timed("claim and open", consumer.claim, rollout_id)
            timed("read", lambda r: r.batch["tokens"][0].sum(), rollout)
            timed("ack", rollout.ack)
    return found


def measure(store: str, count: int) -> dict[str, dict[str, list[float]]]:
    """By where the producer is: "the same cluster", "another cluster"."""
    script = str(Path(__file__).resolve())
    env = {"PYTHONPATH": os.environ["PYTHONPATH"]}
    found = {}
    with LocalCluster(env=env) as ours, LocalCluster(env=env) as other:
        for where, cluster in (("the same cluster", ours), ("another cluster", other)):
            client, job_id = job_client(cluster.api), where.replace(" ", "-")
            words = [sys.executable, script, "--produce", job_id, "--store", store, "--rollouts", str(count)]
            client.submit_job(entrypoint=shlex.join(words), runtime_env={"env_vars": env})
            ray.init(address=ours.address, log_to_driver=False, logging_level=logging.ERROR)
            try:
                if where == "another cluster":  # that one keeps the job; else the first to come would
                    time.sleep(10)
                found[where] = consume(job_id, store, count)
            finally:
                ray.shutdown()
    return found


@says_why
def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench.sh --clusters", description=__doc__)
    parser.add_argument("--rollouts", type=int, default=60)
    parser.add_argument("--redis", action="store_true", help="through a Redis of its own, not a folder")
    parser.add_argument("--produce", help=argparse.SUPPRESS)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.produce:
        produce(args.produce, args.store, args.rollouts)
        return
    begin_without()
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        store = (args.redis and stack.enter_context(own_redis())) or f"file://{folder}/store"
        found = measure(store, args.rollouts)
    names = [*found["the same cluster"]]
    rows = [
        [where, *(f"{figure(statistics.median(times[n]))} ({figure(max(times[n]))})" for n in names)]
        for where, times in found.items()
    ]
    title = f"producer on ...; median (max) in ms, a rollout of 1 MB, through {'Redis' if args.redis else 'a folder'}"
    print(table(title, ["", *names], rows))


if __name__ == "__main__":
    os.environ.setdefault("SLIME_CROSS_JOB_LOG_LEVEL", "WARNING")
    run(main)
