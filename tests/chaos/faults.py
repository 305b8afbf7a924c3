"""The faults of a chaos run: each takes effect on a process from outside, and brings a witness that it did.

A fault is a function of the run that returns when it has taken effect, with the moment, or None when it could not be
carried out now (its victim is just being started); `after` is asked once the training has recovered.
"""

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.util import state

from local_cluster import is_alive
from slime.cross_job.types import BROKER_NAME, VAULT_NAME
from tests.chaos.nodes import Node, wait_until
from tests.chaos.points import arm, disarm, jump
from tests.chaos.supervisor import JOB_ID, LEASE_S, NAMESPACE, Incarnation, Supervisor
from tests.support.redis_server import program

_PATIENCE_S = 20.0  # for a victim to come to the place where it is to fail


@dataclass
class Run:
    """What faults may touch."""

    cluster: Any  # nodes.Cluster, or the machines of tests/cluster
    supervisor: Supervisor
    folder: Path
    archiver: Any  # Archiver, or what is seen of it
    store: str = ""
    observer: Any = None  # machines.Observer


@dataclass
class Taken:
    """A fault that took effect."""

    at: float  # monotonic
    victim: str
    witness: str  # what was seen of it
    felt: float = 0.0  # when it was complete, where that was later
    # once all has recovered: says what else was seen, or raises AssertionError; told whether it was the only fault
    after: Callable[[bool], str] | None = None


Fault = Callable[[Run, str], Taken | None]
FAULTS: dict[str, Fault] = {}


def fault(name: str) -> Callable[[Fault], Fault]:
    def add(inject: Fault) -> Fault:
        FAULTS[name] = inject
        return inject

    return add


# ---------------------------------------------------------------------- processes


def kill(pid: int, victim: str) -> Taken:
    at = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    assert wait_until(lambda: not is_alive(pid), 10), f"{victim} (pid {pid}) outlived SIGKILL"
    return Taken(at, f"{victim} pid {pid}", "SIGKILL: the process is gone")


def driver(run: Run, role: str) -> tuple[int, Incarnation] | None:
    """The driver that the broker knows as the live client of this role."""
    found, job = run.supervisor.client(role), run.supervisor.current(role)
    if found.get("state") != "live" or found["submission_id"] != job.submission_id or not is_alive(found["pid"]):
        return None
    return found["pid"], job


def actor(name: str) -> int | None:
    """Process id of the one live actor of this class, or with this name."""
    address = ray.get_runtime_context().gcs_address
    for key in ("class_name", "name"):
        filters: Any = [(key, "=", name), ("state", "=", "ALIVE")]
        found = state.list_actors(address=address, filters=filters, timeout=10)
        if found:
            return int(found[0].pid)
    return None


def ended_with(run: Run, job: Incarnation, code: int) -> Callable[[bool], str]:
    """The job ended, with this exit code; of two faults at once the other may have been first."""

    def look(alone: bool) -> str:
        assert wait_until(lambda: job.details is not None, 30), f"{job.submission_id} did not end"
        log = run.supervisor.log(job)
        assert job.exit_code == code or not alone, f"{job.submission_id} ended with {job.exit_code}, not {code}: {log}"
        return f"its job ended with exit code {job.exit_code}"

    return look


def killed_driver(run: Run, role: str) -> Taken | None:
    found = driver(run, role)
    return None if found is None else kill(found[0], f"{role} driver")


def stopped_driver(run: Run, role: str) -> Taken | None:
    """SIGSTOP for longer than the lease; woken when another has taken its place: it must find itself fenced."""
    found = driver(run, role)
    if found is None:
        return None
    pid, job = found
    at = time.monotonic()
    os.kill(pid, signal.SIGSTOP)
    assert wait_until(lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED, 5), f"pid {pid} did not stop"

    def replaced() -> bool:
        """The supervisor starts another one as soon as its lease is over; a train job takes the place by `resume`."""
        found, groups = run.supervisor.client(role), run.supervisor.status().get("groups", {})
        return bool(found) and found["pid"] != pid and (role == "rollout" or groups["train"]["live"] == 1)

    assert wait_until(replaced, LEASE_S + 60), "nobody took its place"
    felt = time.monotonic()  # until then what it had begun may have gone on without it

    def wake(alone: bool) -> str:
        os.kill(pid, signal.SIGCONT)
        return ended_with(run, job, 3)(alone)  # errors.Fenced

    return Taken(at, f"{role} driver pid {pid}", "SIGSTOP beyond its lease: another took its place", felt, wake)


def terminated_driver(run: Run, role: str) -> Taken | None:
    found = driver(run, role)
    if found is None:
        return None
    at = time.monotonic()
    os.kill(found[0], signal.SIGTERM)
    return Taken(at, f"{role} driver pid {found[0]}", "SIGTERM", after=ended_with(run, found[1], 0))


def killed_actor(name: str, victim: str) -> Taken | None:
    pid = actor(name)
    return None if pid is None else kill(pid, victim)


def paused_actor(name: str, victim: str, seconds: float) -> Taken | None:
    pid = actor(name)
    if pid is None:
        return None
    at = time.monotonic()
    os.kill(pid, signal.SIGSTOP)
    assert wait_until(lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED, 5), f"pid {pid} did not stop"
    time.sleep(seconds)
    os.kill(pid, signal.SIGCONT)
    return Taken(at, f"{victim} pid {pid}", f"SIGSTOP for {seconds:g} s: the process was stopped")


def at_point(run: Run, name: str, place: str, action: str, role: str, code: int | None = None) -> Taken | None:
    """Whoever comes to `place` next fails there."""
    found = driver(run, role)
    if found is None:
        return None
    taken = run.folder / f"taken-{name}"
    arm(run.folder, place, name, action)
    if not wait_until(taken.exists, _PATIENCE_S, 0.01) and disarm(run.folder, place):
        return None
    after = None if code is None else ended_with(run, found[1], code)
    return Taken(time.monotonic(), f"{role} job at {place}", f"it {action}s there: {taken.name}", after=after)


def vault_of(run: Run, node: str) -> str:
    """Name of the vault on a node of the cluster."""
    for found in ray.nodes():
        if found["Alive"] and node in found["Resources"]:
            return f"{VAULT_NAME}_{found['NodeID']}"
    return ""


# ---------------------------------------------------------------------- the catalogue

for _role in ("rollout", "train"):
    FAULTS[f"{_role} driver killed"] = lambda run, name, role=_role: killed_driver(run, role)  # type: ignore[misc]
    FAULTS[f"{_role} driver stopped"] = lambda run, name, role=_role: stopped_driver(run, role)  # type: ignore[misc]
    FAULTS[f"{_role} driver terminated"] = lambda run, name, role=_role: terminated_driver(run, role)  # type: ignore[misc]


@fault("sampler killed")
def _(run: Run, name: str) -> Taken | None:
    return killed_actor("Sampler", "sampler")


@fault("rank killed")
def _(run: Run, name: str) -> Taken | None:
    return killed_actor("Rank", "DP rank")


@fault("sampler stopped")
def _(run: Run, name: str) -> Taken | None:
    return paused_actor("Sampler", "sampler", LEASE_S + 2)


@fault("rank stopped")
def _(run: Run, name: str) -> Taken | None:
    return paused_actor("Rank", "DP rank", LEASE_S + 2)


@fault("exit in generate")
def _(run: Run, name: str) -> Taken | None:
    return at_point(run, name, "generated", "exit", "rollout", 4)  # errors.ActorLost


@fault("exit in publish")
def _(run: Run, name: str) -> Taken | None:
    return at_point(run, name, "mid-publish", "exit", "rollout")


@fault("deadlock in generate")
def _(run: Run, name: str) -> Taken | None:
    return at_point(run, name, "mid-generate", "hang", "rollout", 5)  # errors.WaitTimeout


@fault("exit between step and save")
def _(run: Run, name: str) -> Taken | None:
    return at_point(run, name, "stepped", "exit", "train")


@fault("exit between save and ack")
def _(run: Run, name: str) -> Taken | None:
    return at_point(run, name, "saved", "exit", "train")


@fault("older checkpoint")
def _(run: Run, name: str) -> Taken | None:
    """The newest checkpoint is lost, and the train job with it: it goes back further than it has acked."""
    found = driver(run, "train")
    saved = sorted(run.folder.glob("checkpoint-*.npz"))
    if found is None or len(saved) < 2:
        return None
    taken = kill(found[0], "train driver")
    newest = sorted(run.folder.glob("checkpoint-*.npz"))[-1]
    newest.unlink()
    before = run.supervisor.status().get("rewound", 0)

    def look(alone: bool) -> str:
        back = run.supervisor.status().get("rewound", 0) > before
        return f"{newest.name} was lost, {'and acks taken back' if back else 'which was not acked yet'}"

    taken.after = look
    return taken


@fault("broker killed")
def _(run: Run, name: str) -> Taken | None:
    return killed_actor(BROKER_NAME, "broker")


@fault("broker stopped")
def _(run: Run, name: str) -> Taken | None:
    return paused_actor(BROKER_NAME, "broker", LEASE_S + 2)


@fault("vault killed")
def _(run: Run, name: str) -> Taken | None:
    vault = vault_of(run, "rollout")
    return killed_actor(vault, "vault of the rollout node") if vault else None


@fault("vault of weights killed")
def _(run: Run, name: str) -> Taken | None:
    node = run.supervisor.client("train").get("node_id")
    return killed_actor(f"{VAULT_NAME}_{node}", "vault of the train driver's node") if node else None


@fault("vault stopped")
def _(run: Run, name: str) -> Taken | None:
    vault = vault_of(run, "rollout")
    return paused_actor(vault, "vault of the rollout node", LEASE_S + 2) if vault else None


@fault("clock jump")
def _(run: Run, name: str) -> Taken | None:
    """The broker's wall clock jumps by an hour; back when it is restarted."""
    broker: Any = ray.get_actor(BROKER_NAME, namespace=NAMESPACE)
    forward = 3600.0 if int(name.split("-")[-1]) % 2 else -3600.0

    def published() -> dict[tuple[int, int], float]:
        found = run.supervisor.connection.call("catalog", JOB_ID)
        return {(located.rollout_id, located.version): located.published_at for located in found}

    before, at = published(), time.monotonic()
    off = ray.get(broker.__ray_call__.remote(jump, forward), timeout=20)

    def look(alone: bool) -> str:
        since = {known: when for known, when in published().items() if known not in before}
        if not since:
            return "the next step was one on a rollout of before"
        newest, when = max(since.items())
        seen = when - time.time()
        assert not alone or abs(seen - forward) < 60, f"what is published is off by {seen:.0f} s, not {forward:.0f}"
        return f"rollout {newest[0]} counts as published {seen:.0f} s from now"

    return Taken(at, "broker's clock", f"it is off by {off:.0f} s", after=look)


def _gcs(run: Run, name: str) -> Taken | None:
    """The head's GCS dies, whose tables are in Redis, and is away for 3 s."""
    at = time.monotonic()
    old, new = run.cluster.head.restart_gcs(3.0)
    assert wait_until(lambda: not is_alive(old), 10), f"the GCS (pid {old}) outlived SIGKILL"
    return Taken(at, f"GCS pid {old}", f"SIGKILL: the process is gone; now {new}", felt=time.monotonic())


if program():
    FAULTS["GCS killed"] = _gcs


@fault("cluster killed")
def _(run: Run, name: str) -> Taken | None:
    """Every process of it at once; with a durable store, training goes on in another cluster."""
    if not run.store:
        return None
    at = time.monotonic()
    with run.supervisor.connected:
        run.supervisor.all_are_lost()
        run.archiver.leave()
        ray.shutdown()
        killed = run.cluster.kill_and_begin_anew()
        ray.init(address=run.cluster.head.address, log_to_driver=False, logging_level="ERROR")
        run.supervisor.connect(run.cluster.head.api)
    run.archiver.start()
    return Taken(at, f"the cluster, {killed} processes", "SIGKILL: all are gone", felt=time.monotonic())


def killed_node(run: Run, node: Node) -> Taken | None:
    """Its raylet, and with it all that ran there; started again at once."""
    try:
        pid = node.raylet()
    except LookupError:
        return None
    known = [n["NodeID"] for n in ray.nodes() if n["Alive"] and node.name in n["Resources"]]
    if not known:
        return None
    taken = kill(pid, f"raylet of the {node.name} node")

    def dead() -> bool:
        return not any(n["Alive"] for n in ray.nodes() if n["NodeID"] in known)

    assert wait_until(dead, 30, 0.2), "Ray did not notice that the node died"
    taken.witness += "; Ray counts the node as dead"
    taken.felt = time.monotonic()
    node.end()
    node.start()
    return taken


for _node in ("rollout", "train"):
    FAULTS[f"{_node} node killed"] = lambda run, name, node=_node: killed_node(run, run.cluster.nodes[node])  # type: ignore[misc]
