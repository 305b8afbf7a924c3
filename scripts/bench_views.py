"""What looking costs: `status`, `ls` and a refresh of a view with 5,000 rollouts in the ledger, and what 50 viewers of
the live view and a `top` at 2 Hz cost the broker; and a hand-over with traces on and off. Run by itself:
`scripts/bench.sh --views [--quick] [--json FILE]`.

The broker's time is its process's, as the kernel counts it, in percent of one core, beside what it
takes when nobody looks. Viewers are browsers' requests: each asks the server once a second what is new since its last
answer; a rollout is published, claimed and acked twice a second meanwhile, so that there is always something new.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import ray
from ray.util.state import list_actors

from bench_metrics import Way
from bench_report import Target, figure, machine, spread, summary, table, targets_table
from local_cluster import LocalCluster, begin_without, cpu_s, says_why
from slime.cross_job import Consumer, Producer
from slime.cross_job.ops.viewer import Viewer
from slime.cross_job.ops.web import WebView
from slime.cross_job.types import BROKER_NAME, Payload

OVERLAY = Path(__file__).resolve().parent.parent / "slime_overlay"
JOB = "bench"
VIEWERS = 50


def fill(producer: Producer, count: int) -> None:
    """`count` rollouts that say what rollouts say, without payloads: only the ledger is of interest."""
    for rollout_id in range(count):
        meta = {"reward": rollout_id / count, "generate_s": 1.0}
        payload = Payload(f"t{rollout_id}", "", 1000, num_samples=64, weight_version=rollout_id, meta=meta)
        producer.connection.call("publish", producer.info.client_id, rollout_id, payload)


def times_ms(work: Callable[[], Any], count: int) -> list[float]:
    samples = []
    for _ in range(count):
        began = time.perf_counter()
        work()
        samples.append(1e3 * (time.perf_counter() - began))
    return samples


def command(address: str, *words: str) -> None:
    env = {**os.environ, "RAY_ADDRESS": address, "PYTHONPATH": str(OVERLAY)}
    subprocess.run(
        [sys.executable, "-m", "slime.cross_job", *words], env=env, check=True, stdout=subprocess.DEVNULL, timeout=120
    )


class Load:
    """A rollout goes all its way, twice a second."""

    def __init__(self, producer: Producer, consumer: Consumer, first: int):
        self._producer, self._consumer, self._next = producer, consumer, first
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(60)

    def _run(self) -> None:
        while not self._ended.wait(0.5):
            self._producer.publish(self._next, {"tokens": [[1, 2, 3]]}, meta={"reward": 0.5})
            with self._consumer.claim(self._next, timeout_s=30):
                self._next += 1


def broker_pid() -> int:
    filters: Any = [("name", "=", BROKER_NAME), ("state", "=", "ALIVE")]
    found = list_actors(ray.get_runtime_context().gcs_address, filters=filters)
    return int(found[0]["pid"])


def share_of_a_core(pid: int, seconds: float) -> float:
    before, began = cpu_s([pid]), time.perf_counter()
    time.sleep(seconds)
    return 100 * (cpu_s([pid]) - before) / (time.perf_counter() - began)


async def browse(url: str, ended: threading.Event, answers: list[float]) -> None:
    """One viewer: first all, then what is new, once a second."""
    asked = {"job": JOB, "run": "", "since": -1, "events_since": 0}
    async with aiohttp.ClientSession() as session:
        while not ended.is_set():
            began = time.perf_counter()
            async with session.get(f"{url}api/look", params=asked) as answer:
                found = json.loads(await answer.text())
            answers.append(1e3 * (time.perf_counter() - began))
            events = max([e["number"] for e in found["events"]], default=asked["events_since"])
            asked |= {"run": found["run"], "since": found["seq"], "events_since": events}
            await asyncio.sleep(1)


def looked_at(address: str, pid: int, seconds: float) -> tuple[float, list[float]]:
    """(percent of a core that the broker takes, milliseconds of the viewers' answers)."""
    ended, answers = threading.Event(), list[float]()

    async def all_of_them(url: str) -> None:
        await asyncio.gather(*(browse(url, ended, answers) for _ in range(VIEWERS)))

    env = {**os.environ, "RAY_ADDRESS": address, "PYTHONPATH": str(OVERLAY)}
    top = [sys.executable, "-m", "slime.cross_job", "top", "--every", "0.5", "--job-id", JOB]
    with (
        WebView(Viewer, job_id=JOB) as view,
        subprocess.Popen(top, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as watching,
    ):
        viewers = threading.Thread(target=lambda: asyncio.run(all_of_them(view.url)), daemon=True)
        viewers.start()
        time.sleep(5)  # until top is there, and all have had their first answer
        answers.clear()
        share = share_of_a_core(pid, seconds)
        ended.set()
        viewers.join(30)
        watching.terminate()
    return share, answers


def traced(count: int) -> dict[str, list[float]]:
    """Milliseconds of hand-overs with traces on and off, in turns."""
    ways = {traces: Way("off", 100_000, namespace=f"bench_traces_{traces}", traces=traces) for traces in ("on", "off")}
    for rollout_id in range(count):
        for way in [*ways.values()][:: 1 if rollout_id % 2 else -1]:
            way.hand_over(rollout_id)
    for way in ways.values():
        way.end()
    return {traces: way.samples[10:] for traces, way in ways.items()}


@says_why
def main() -> None:
    begin_without()
    parser = argparse.ArgumentParser(prog="scripts/bench.sh --views", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument("--rollouts", type=int, default=5000)
    parser.add_argument("--json", type=Path, help="write all figures there, machine-readable")
    args = parser.parse_args()
    seconds, count = (10.0, 100) if args.quick else (30.0, 400)
    facts = machine()
    print("\n".join(f"{name:22} {value}" for name, value in facts.items()) + "\n", flush=True)
    with LocalCluster(env={"PYTHONPATH": str(OVERLAY)}) as cluster:
        ray.init(address=cluster.address, log_to_driver=False)
        with Producer(JOB, max_ahead=1, retain=2 * args.rollouts) as producer, Consumer(JOB) as consumer:
            fill(producer, args.rollouts)
            viewer = Viewer()
            seq = viewer.look(JOB)["seq"]
            queries = {
                "status, ms": summary(times_ms(lambda: viewer.status(JOB), 50)),
                "all rollouts, ms": summary(times_ms(lambda: viewer.look(JOB), 20)),
                "what is new, ms": summary(times_ms(lambda: viewer.look(JOB, since=seq, events_since=9), 50)),
                "command `status`, ms": summary(times_ms(lambda: command(cluster.address, "status"), 5)),
                "command `ls`, ms": summary(times_ms(lambda: command(cluster.address, "ls"), 5)),
                "python -c 'import ray', ms": summary(times_ms(import_ray, 5)),
            }
            pid = broker_pid()
            with Load(producer, consumer, args.rollouts):
                time.sleep(3)
                alone = share_of_a_core(pid, seconds)
                share, answers = looked_at(cluster.address, pid, seconds)
        handed = {traces: summary(samples) for traces, samples in traced(count).items()}
        ray.shutdown()
    rows = [[name, spread(found)] for name, found in queries.items()]
    rows.append(["broker, nobody looks, % of a core", figure(alone)])
    rows.append([f"broker, {VIEWERS} viewers and a top, % of a core", figure(share)])
    rows.append(["a viewer's answer, ms", spread(summary(answers))])
    rows += [[f"hand-over, traces {traces}, ms", spread(found)] for traces, found in handed.items()]
    print(table(f"Looking at {args.rollouts} rollouts", ["", "median (min-max)"], rows))
    checks = [
        Target("the broker's answer to `status`", 1000, queries["status, ms"]["median"], "ms", "lower"),
        Target("the whole command `status`", 1000, queries["command `status`, ms"]["median"], "ms", "lower"),
        Target(f"{VIEWERS} viewers and a top, of a core", 5, share - alone, "%", "lower"),
    ]
    print(targets_table(checks))
    if args.json:
        figures = {"queries": queries, "alone": alone, "looked_at": share, "hand_over_ms": handed}
        args.json.write_text(json.dumps({"machine": facts, "views": figures}, indent=2) + "\n")


def import_ray() -> None:
    subprocess.run([sys.executable, "-c", "import ray"], check=True, timeout=60)


if __name__ == "__main__":
    main()
