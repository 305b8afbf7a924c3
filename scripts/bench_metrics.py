"""What figures for Prometheus cost: one observation, one round of the broker's export, a rollout's hand-over with them
and without. Run by itself: `scripts/bench.sh --metrics [--quick] [--json FILE]`.

The hand-overs (publish, claim, open, ack of one rollout) go through two brokers of one private cluster, one for each
way, in turns. Observations and export are measured in a process of that cluster, as they happen: there they go through
Ray's own metrics. The share is what they add to a hand-over, by these times; the difference of the two ways, whose
noise on a busy machine is greater, is given besides.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray

from bench_report import Target, figure, machine, spread, summary, table, targets_table
from local_cluster import LocalCluster, begin_without, says_why
from slime.cross_job import Consumer, Producer
from slime.cross_job.batch import Batch
from slime.cross_job.broker.exporter import EVERY_S, Exporter
from slime.cross_job.ledger import Ledger
from slime.cross_job.metrics import Latencies
from slime.cross_job.types import ClientInfo, Payload

OVERLAY = Path(__file__).resolve().parent.parent / "slime_overlay"
JOBS = (1, 100)
SIZES = (100_000, 10_000_000)
OBSERVATIONS = 2  # a hand-over: one in the vault, one in the consumer
_RETAINED = 50  # rollouts of a job that the broker exports


def observations_us(count: int) -> list[float]:
    """Microseconds of one observation, each the mean of a hundred."""
    latencies, samples = Latencies(), []
    for _ in range(count):
        began = time.perf_counter()
        for _ in range(100):
            latencies.observe("claim_seconds", "bench", 0.01)
        samples.append(1e4 * (time.perf_counter() - began))
    return samples[1:]


def rounds_ms(jobs: int, count: int) -> list[float]:
    """Milliseconds of one round of the export, of so many jobs of which each has moved since the last."""
    ledger = Ledger()
    for job in range(jobs):
        ledger.membership.attach(ClientInfo(f"p{job}", f"bench{job}", "producer"))
        ledger.membership.attach(ClientInfo(f"c{job}", f"bench{job}", "consumer", group="train"))
    for rollout_id in range(_RETAINED):
        move(ledger, jobs, rollout_id)
    exporter, samples = Exporter(ledger), []
    for rollout_id in range(_RETAINED, _RETAINED + count + 1):
        move(ledger, jobs, rollout_id)
        began = time.perf_counter()
        exporter.export()
        samples.append(1e3 * (time.perf_counter() - began))
    return samples[1:]


def move(ledger: Ledger, jobs: int, rollout_id: int) -> None:
    """A rollout of each job is published; every other one is claimed."""
    for job in range(jobs):
        ledger.publish(f"p{job}", rollout_id, Payload(f"{job}-{rollout_id}", "vault/1", 100))
        if rollout_id % 2:
            ledger.claim(f"c{job}")


class Way:
    """One job with metrics on or off, with a broker of its own."""

    def __init__(self, metrics: str, nbytes: int, **settings: Any):
        settings = {"namespace": f"bench_{metrics}_{nbytes}", "metrics": metrics, **settings}
        self.producer = Producer(f"bench-{metrics}", **settings)
        self.consumer = Consumer(f"bench-{metrics}", **settings)
        self.batch = Batch.pack({"tokens": [np.zeros(nbytes // 4, np.int32)]})
        self.samples: list[float] = []

    def hand_over(self, rollout_id: int) -> None:
        began = time.perf_counter()
        self.producer.publish(rollout_id, self.batch)
        with self.consumer.claim(rollout_id, timeout_s=60) as rollout:
            assert rollout.batch.num_samples == 1
        self.samples.append(1e3 * (time.perf_counter() - began))

    def end(self) -> None:
        for client in (self.producer, self.consumer):
            client.finish()


def hand_overs_ms(nbytes: int, count: int) -> dict[str, list[float]]:
    """Milliseconds of each hand-over, with metrics and without, in turns."""
    ways = {metrics: Way(metrics, nbytes) for metrics in ("on", "off")}
    for rollout_id in range(count):
        for way in [*ways.values()][:: 1 if rollout_id % 2 else -1]:
            way.hand_over(rollout_id)
    for way in ways.values():
        way.end()
    return {metrics: way.samples[10:] for metrics, way in ways.items()}


@says_why
def main() -> None:
    begin_without()
    parser = argparse.ArgumentParser(prog="scripts/bench.sh --metrics", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument("--json", type=Path, help="write all figures there, machine-readable")
    args = parser.parse_args()
    count = 100 if args.quick else 400
    facts = machine()
    print("\n".join(f"{name:22} {value}" for name, value in facts.items()) + "\n", flush=True)
    with LocalCluster(env={"PYTHONPATH": str(OVERLAY)}) as cluster:
        ray.init(address=cluster.address, log_to_driver=False)
        observed = summary(observations_us(count))
        rounds = {jobs: summary(rounds_ms(jobs, 20)) for jobs in JOBS}
        ways = {nbytes: {k: summary(v) for k, v in hand_overs_ms(nbytes, count).items()} for nbytes in SIZES}
        ray.shutdown()
    rows = [["an observation, us", spread(observed)]]
    rows += [[f"a round of the export, {jobs} jobs, ms", spread(found)] for jobs, found in rounds.items()]
    checks = []
    for nbytes, found in ways.items():
        rows += [[f"hand-over of {nbytes} bytes, metrics {k}, ms", spread(v)] for k, v in found.items()]
        off = found["off"]["median"]
        rows.append([f"hand-over of {nbytes} bytes, on / off", figure(found["on"]["median"] / off)])
        added = 100 * OBSERVATIONS * observed["median"] / 1e3 / off
        checks.append(Target(f"observations, of a hand-over of {nbytes} bytes", 1, added, "%", "lower"))
    for jobs, round_ms in rounds.items():
        share = 100 * round_ms["median"] / 1e3 / EVERY_S
        checks.append(Target(f"export of {jobs} jobs, of the broker's time", 1, share, "%", "lower"))
    print(table("Metrics", ["", "median (min-max)"], rows))
    print(targets_table(checks))
    if args.json:
        figures = {"observation_us": observed, "round_ms": rounds, "hand_over_ms": ways}
        args.json.write_text(json.dumps({"machine": facts, "metrics": figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
