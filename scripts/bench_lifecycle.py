"""Whether a store that holds much is slow: claims, listings of ids and publishing with 10,000 rollouts of 100 KB,
and publishing while 9,000 of them are freed. Run by itself: `scripts/bench.sh --lifecycle [--quick] [--json FILE]`.

Two processes, without Ray. One is the broker: its own ledger and replicas, with a journal in the store, asked
over a socket; there are no vaults, which would keep a copy of each change. The other is the vault's part and the
clients': it writes payloads (durably, with checksums) and asks. What Ray adds, hops of 1 to 2 ms, is in neither.
Publishing is a payload in the store and its entry in the journal.
"""

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import statistics
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

from bench_report import Target, figure, machine, table, targets_table
from bench_stores import own_redis
from slime.cross_job.batch import Batch
from slime.cross_job.broker.durability import Durability
from slime.cross_job.broker.replicas import Replicas
from slime.cross_job.ledger import Ledger
from slime.cross_job.storage import open_store
from slime.cross_job.storage.payloads import Archive, new_name
from slime.cross_job.types import ClientInfo, Payload

_JOB = "bench"
_READS = ("listed", "catalog", "status")
_WRITERS = 8  # that fill the store


class BrokerProcess:
    """What broker/actor.py does around a ledger, for one job; `serve` is the whole life of a process."""

    def __init__(self, uri: str):
        self._uri = uri
        self._ledger = Ledger()
        self._durability = Durability(self._ledger, "bench")
        self._replicas = Replicas("bench", self._ledger, self._durability)
        self._freeing: asyncio.Task[None] | None = None
        self._freed_s = 0.0

    @classmethod
    def serve(cls, uri: str, address: str) -> None:
        loop = asyncio.new_event_loop()
        threading.Thread(target=loop.run_forever, daemon=True).start()
        broker = cls(uri)
        asyncio.run_coroutine_threadsafe(broker.begin(), loop).result(60)

        def answer(caller: Connection) -> None:
            with contextlib.suppress(EOFError):
                while True:
                    operation, args = caller.recv()
                    asked = asyncio.run_coroutine_threadsafe(broker.call(operation, *args), loop)
                    caller.send(asked.result(600))

        with Listener(address, "AF_UNIX") as listener:
            while True:
                threading.Thread(target=answer, args=(listener.accept(),), daemon=True).start()

    async def begin(self) -> None:
        await self._durability.open(_JOB, self._uri)
        for name, role, group in (("p", "producer", ""), ("c", "consumer", "train")):
            self._ledger.membership.attach(
                ClientInfo(name, _JOB, role, group=group), max_ahead=1_000_000, store=self._uri
            )
        await self._replicas.keep(_JOB)

    async def call(self, operation: str, *args: Any) -> Any:
        if operation == "publish_all":  # nobody is told of one before the other
            for rollout_id, payload in args[0]:
                self._ledger.publish("p", rollout_id, payload)
            await self._replicas.keep(_JOB)
            return None
        if operation == "freed_s":  # None: not yet
            done = self._freeing is None or self._freeing.done()
            return self._freed_s if done and not self._durability.may_free else None
        answer = getattr(self._ledger, operation)(*args)
        if operation not in _READS:
            await self._replicas.keep(_JOB)
            self._ledger.garbage.take_drops()
            if self._durability.may_free and (self._freeing is None or self._freeing.done()):
                self._freeing = asyncio.get_running_loop().create_task(self._free())
        return answer

    async def _free(self) -> None:
        began = time.perf_counter()
        await self._durability.free()
        self._freed_s = time.perf_counter() - began


class Load:
    """A store with `count` rollouts, and a broker that knows them."""

    def __init__(self, uri: str, address: str):
        self._callers = [Client(address, "AF_UNIX") for _ in range(2)]
        self._archive = Archive(open_store(uri), _JOB)
        self._batch = Batch.pack({"tokens": [[number % 50_000 for number in range(1000)]] * 25})
        self.next_id = 0

    @property
    def nbytes(self) -> int:
        return self._batch.nbytes

    def ask(self, operation: str, *args: Any, caller: int = 0) -> Any:
        self._callers[caller].send((operation, args))
        return self._callers[caller].recv()

    def fill(self, count: int) -> None:
        with ThreadPoolExecutor(_WRITERS) as pool:
            payloads = [*pool.map(lambda _: self._stored(), range(count))]
        self.ask("publish_all", [(self.next_id + at, payload) for at, payload in enumerate(payloads)])
        self.next_id += count

    def publish(self) -> None:
        self.ask("publish", "p", self.next_id, self._stored())
        self.next_id += 1

    def claim(self) -> float:
        """Milliseconds of a claim of the lowest free rollout, which is given back, untimed."""
        took_ms, located = _timed(lambda: self.ask("claim", "c", None, None, 0.0, uuid.uuid4().hex))
        self.ask("release", "c", located.rollout_id)
        return took_ms

    def listing(self, expected: int) -> float:
        took_ms, found = _timed(lambda: self.ask("listed", _JOB))
        assert len(found[_JOB]) == expected
        return took_ms

    def publish_while_freeing(self, below: int) -> tuple[list[float], float]:
        """Milliseconds of each publish from the moment on that everything `below` is given up until it is freed; and
        how long the freeing took, in seconds."""
        took: list[float] = []
        begun, over = threading.Event(), threading.Event()

        def publishing() -> None:
            while not over.is_set():
                counts = begun.is_set()
                took_ms, _ = _timed(self.publish)
                if counts:
                    took.append(took_ms)

        thread = threading.Thread(target=publishing)
        thread.start()
        time.sleep(0.2)
        begun.set()
        self.ask("resume", "c", below, caller=1)
        while (freed_s := self.ask("freed_s", caller=1)) is None:
            time.sleep(0.02)
        over.set()
        thread.join()
        return took, freed_s

    def _stored(self) -> Payload:
        token = uuid.uuid4().hex
        name = new_name(token)
        self._archive.save(name, [self._batch], {"rollout_id": token})
        meta = {"reward_mean": 0.1, "response_length_mean": 4000.5, "generate_s": 12.5}
        return Payload(token, "vault/1", self._batch.nbytes, 1, 25, 0, meta, stored=name)


@contextlib.contextmanager
def broker_of(uri: str) -> Iterator[str]:
    """A broker process; where it listens."""
    with tempfile.TemporaryDirectory(prefix="xjob") as folder:
        address = f"{folder}/s"
        process = multiprocessing.get_context("spawn").Process(
            target=BrokerProcess.serve, args=(uri, address), daemon=True
        )
        process.start()
        try:
            deadline = time.monotonic() + 60
            while not Path(address).exists():
                assert process.is_alive(), "the broker process ended"
                assert time.monotonic() < deadline, "the broker process does not begin"
                time.sleep(0.05)
            yield address
        finally:
            process.kill()
            process.join(10)


def measure(uri: str, quick: bool) -> dict[str, Any]:
    """Figures of one store."""
    count = 1_000 if quick else 10_000
    keep, turns = count // 10, 100 if quick else 500
    with broker_of(uri) as address:
        load = Load(uri, address)
        began = time.perf_counter()
        load.fill(count)
        filled_s = time.perf_counter() - began
        claims = [load.claim() for _ in range(turns)]
        listings = [load.listing(count) for _ in range(turns)]
        alone, beside, freed_s = list[float](), list[float](), list[float]()
        for turn in range(1 if quick else 2):
            alone += [_timed(load.publish)[0] for _ in range(turns)]
            took, seconds = load.publish_while_freeing(load.next_id - keep - turns)
            beside += took
            freed_s.append(seconds)
            if not quick and turn == 0:
                load.fill(count - keep - turns)
        return {
            "rollouts": count,
            "freed_at_once": count - keep,
            "bytes_each": load.nbytes,
            "filled_s": filled_s,
            "freed_s": freed_s,
            "claim_ms": tail(claims),
            "listing_ms": tail(listings),
            "publish_ms": tail(alone),
            "publish_while_freeing_ms": tail(beside),
        }


def tail(samples: list[float]) -> dict[str, float]:
    """p50, p99 and the worst of milliseconds."""
    ordered = sorted(samples)
    return {
        "p50": statistics.median(ordered),
        "p99": ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))],
        "max": ordered[-1],
        "n": len(ordered),
    }


def tables(found: dict[str, Any]) -> str:
    rows = []
    names = {
        "claim_ms": "claim of the lowest free",
        "listing_ms": "ids of all",
        "publish_ms": "publish",
        "publish_while_freeing_ms": "publish while most are freed",
    }
    for store, figures in found.items():
        for name, what in names.items():
            ways = figures[name]
            rows.append([f"{store}: {what}", *(figure(ways[key]) for key in ("p50", "p99", "max")), str(ways["n"])])
        freed = ", ".join(figure(seconds) for seconds in figures["freed_s"])
        print(f"{store}: {figures['rollouts']} rollouts of {figures['bytes_each']} bytes; freed in {freed} s")
    return table("Lifecycle, ms", ["", "p50", "p99", "max", "n"], rows)


def targets(found: dict[str, Any]) -> list[Target]:
    checks = []
    for store, figures in found.items():
        checks.append(Target(f"{store}: claim, p99", 20, figures["claim_ms"]["p99"], "ms", "lower"))
        checks.append(Target(f"{store}: ids of all, p99", 20, figures["listing_ms"]["p99"], "ms", "lower"))
        held_up = figures["publish_while_freeing_ms"]["p99"] / figures["publish_ms"]["p99"]
        checks.append(Target(f"{store}: publish while most are freed, p99", 2, held_up, "x", "lower"))
    return checks


def _timed(act: Callable[[], Any]) -> tuple[float, Any]:
    """(milliseconds, what it returned)."""
    start = time.perf_counter()
    answer = act()
    return 1e3 * (time.perf_counter() - start), answer


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench.sh --lifecycle", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of the rollouts")
    parser.add_argument("--json", type=Path, help="write all figures there, machine-readable")
    parser.add_argument("--store", choices=("filesystem", "Redis"), help="this one only")
    args = parser.parse_args()
    facts = machine()
    print("\n".join(f"{name:22} {value}" for name, value in facts.items()) + "\n", flush=True)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="xjobbench", dir=os.environ.get("TMPDIR")) as made, own_redis() as redis:
        for store, uri in (("filesystem", f"file://{made}/store"), ("Redis", redis)):
            if uri is not None and args.store in (None, store):
                found[store] = measure(uri, args.quick)
    print(tables(found))
    print(targets_table(targets(found)))
    if args.json:
        args.json.write_text(json.dumps({"machine": facts, "lifecycle": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
