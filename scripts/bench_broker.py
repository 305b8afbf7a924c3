"""What the broker costs (C): calls per second, claim latency and memory by the number of retained rollouts.

The ledger is filled with pipelined calls of its own `publish` operation, with Payload records behind which there is no
object: the broker never sees payloads, so that nothing it does is left out. Every number of retained rollouts has a
broker of its own (a namespace each), so that they can be measured in turns.
"""

import gc
import random
import threading
import time
import uuid
from typing import Any

import psutil
import ray

from bench_report import Target, figure, spread, summary, table
from slime.cross_job.client.connection import Connection
from slime.cross_job.client.consumer import Consumer
from slime.cross_job.client.producer import Producer
from slime.cross_job.deadline import Deadline
from slime.cross_job.types import BROKER_NAME, VAULT_NAME, Payload

RETAINED = (10, 1_000, 10_000)
_IN_FLIGHT = 200  # calls that are pipelined while the ledger is filled
_WARM_UP = 5_000  # calls after which Ray itself takes no more memory for each


class Load:
    """One broker with `count` rollouts that are published and not acked."""

    def __init__(self, count: int) -> None:
        namespace, job_id = f"bench_{count}", f"bench-{count}"
        self.count = count
        self.producer = Producer(job_id, namespace=namespace)
        self.consumer = Consumer(job_id, namespace=namespace)
        self.connection = Connection(namespace)
        self.broker = ray.get_actor(BROKER_NAME, namespace=namespace)
        node_id = self.producer.info.node_id
        incarnation = ray.get(self.connection.vault_on(node_id).hello.remote())["incarnation"]
        self.vault = f"{VAULT_NAME}_{node_id}/{incarnation}"  # the broker watches over it
        self.claim_ms: list[float] = []
        self.next_ms: list[float] = []

    def fill(self, warm_up: int) -> dict[str, float]:
        """Publish `count` rollouts; says at what rate, and what the broker's memory grew by for each."""
        first = _payload(0, self.vault)
        self._publish([(0, first)] * warm_up)  # the same once more is a no-op: only Ray's own memory grows
        before = self._resident_bytes()
        start = time.perf_counter()
        self._publish([(rollout_id, _payload(rollout_id, self.vault)) for rollout_id in range(1, self.count + 1)])
        per_s = self.count / (time.perf_counter() - start)
        return {"publishes_per_s": per_s, "bytes_per_rollout": (self._resident_bytes() - before) / self.count}

    def claim(self, rollout_id: int) -> None:
        """Claim a rollout by id, then the lowest free one; each is given back, untimed."""
        for asked, into in ((rollout_id, self.claim_ms), (None, self.next_ms)):
            start = time.perf_counter()
            found = self.connection.wait(
                Deadline(60), "claim", self.consumer.info.client_id, asked, token=uuid.uuid4().hex
            )
            into.append(1e3 * (time.perf_counter() - start))
            self.consumer.release(found.rollout_id)

    def calls_per_s(self, callers: int, duration_s: float) -> float:
        """Look-ups of published rollouts by `callers` threads, each waiting for its answer before it asks again."""
        done, end = [0] * callers, time.perf_counter() + duration_s

        def ask(me: int) -> None:
            while time.perf_counter() < end:
                self.connection.call("get", self.producer.job_id, (me + done[me]) % self.count)
                done[me] += 1

        threads = [threading.Thread(target=ask, args=(me,), daemon=True) for me in range(callers)]
        start = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sum(done) / (time.perf_counter() - start)

    def finish(self) -> None:
        self.consumer.finish()
        self.producer.finish()
        ray.kill(self.broker)

    def _publish(self, rollouts: list[tuple[int, Payload]]) -> None:
        refs: list[Any] = []
        for rollout_id, payload in rollouts:
            if len(refs) >= _IN_FLIGHT:
                ready, refs = ray.wait(refs, num_returns=_IN_FLIGHT // 2, fetch_local=False)
                ray.get(ready)
            refs.append(self.broker.call.remote("publish", self.producer.info.client_id, rollout_id, payload))
        ray.get(refs)

    def _resident_bytes(self) -> int:
        return int(ray.get(self.broker.__ray_call__.remote(_resident_bytes)))


def measure(quick: bool) -> dict[str, Any]:
    """All figures of C."""
    loads = [Load(count) for count in RETAINED]
    try:
        filled = {load.count: load.fill(min(load.count, _WARM_UP)) for load in loads}
        rng = random.Random(0)
        for _ in range(100 if quick else 600):
            for load in loads:
                load.claim(rng.randrange(load.count))
        rates: dict[int, list[float]] = {1: [], 8: []}
        for _ in range(2 if quick else 5):
            for callers, into in rates.items():
                into.append(loads[1].calls_per_s(callers, 0.5 if quick else 1.5))
    finally:
        for load in loads:
            load.finish()
    return {
        "how": "ledger filled by pipelined `publish` operations with Payload records that have no object behind them; "
        "one broker per number of retained rollouts, measured in turns; retained: published and not acked",
        "calls_per_s": {str(callers): summary(found) for callers, found in rates.items()},
        "pipelined_publishes_per_s": filled[RETAINED[-1]]["publishes_per_s"],
        "claim_ms": {str(load.count): summary(load.claim_ms) for load in loads},
        "claim_next_ms": {str(load.count): summary(load.next_ms) for load in loads},
        "bytes_per_rollout": filled[RETAINED[-1]]["bytes_per_rollout"],
        "claim_growth": _median(loads[-1]) / _median(loads[0]),
    }


def tables(found: dict[str, Any]) -> str:
    rows = [
        [f"claim with {int(count):,} retained, ms", spread(by_id), spread(found["claim_next_ms"][count])]
        for count, by_id in found["claim_ms"].items()
    ]
    claims = table(f"C. Broker ({found['how']})", ["", "of an id", "of the lowest free"], rows)
    calls = found["calls_per_s"]
    rows = [
        ["calls per second, 1 caller", spread(calls["1"])],
        ["calls per second, 8 callers", spread(calls["8"])],
        [f"publishes per second, {_IN_FLIGHT} in flight", figure(found["pipelined_publishes_per_s"])],
        [f"memory per rollout, bytes (of {RETAINED[-1]:,})", figure(found["bytes_per_rollout"], 4)],
    ]
    return claims + "\n" + table("   Broker: throughput and memory", ["", "value"], rows)


def targets(found: dict[str, Any]) -> list[Target]:
    return [
        Target("claim with 10,000 retained vs with 10", 1.3, found["claim_growth"], "x", "lower"),
        Target("broker memory per retained rollout", 4096, found["bytes_per_rollout"], "bytes", "lower"),
    ]


def _median(load: Load) -> float:
    return summary(load.claim_ms)["median"]


def _payload(rollout_id: int, vault: str) -> Payload:
    """As slime's producer would record it, with the facts a reader wants to see without opening the payload."""
    meta = {
        "reward_mean": rollout_id / 7,
        "response_length_mean": 4000 + rollout_id / 3,
        "truncated_ratio": rollout_id / 1e5,
        "generate_s": rollout_id / 11,
        "data_source": {
            "epoch": rollout_id // 100,
            "sample_offset": 32 * rollout_id,
            "sample_index": 512 * rollout_id,
        },
    }
    return Payload(uuid.uuid4().hex, vault, 20_000_000, 1, 512, rollout_id, meta)


def _resident_bytes(broker: Any) -> int:
    """Runs in the broker's process."""
    gc.collect()
    return psutil.Process().memory_info().rss
