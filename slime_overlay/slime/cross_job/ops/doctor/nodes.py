"""What `doctor` sees of the nodes: a Ray task without CPUs runs on each for a moment, and what it saw is judged.

The task reads and writes nothing. It looks at /dev/shm, at the disk of Ray's session, at the node's own metrics (which
Ray renews every 10 s or so), and at the clock.
"""

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ..text import bytes_text, span_text
from . import Finding

SKEW_S = 1.0  # a heartbeat; NTP keeps nodes within hundredths
SKEW_BAD_S = 300.0  # half the age, by its writer's clock, at which what nobody knows of is freed in a durable store
_OF_NODES = ("nodes", "spilling", "shared memory", "disk", "clocks")
_LEAST_FREE = 0.05  # of a disk or /dev/shm; Ray writes no objects to a fuller disk (local_fs_capacity_threshold)


@dataclass(frozen=True)
class Node:
    """Facts about one node; None: not known. `error`: why it was not looked at."""

    node_id: str
    name: str
    store_bytes: int = 0  # size of its object store
    shm: tuple[int, int] | None = None  # of /dev/shm: bytes in all, and free
    disk: tuple[int, int] | None = None  # where Ray spills
    offset_s: float = 0.0  # of its clock against this one
    uncertain_s: float = 0.0
    metrics: Mapping[str, float] = field(default_factory=dict)  # see `figures`
    error: str = ""


def look_at_nodes(timeout_s: float) -> list[Node]:
    """Facts about every node that is alive; this process must be connected."""

    def probe(node: Mapping[str, Any]) -> tuple[Any, Any, str]:  # within this function, so that it travels by value
        import shutil
        import urllib.request

        def space(path: str) -> tuple[int, int] | None:
            try:
                usage = shutil.disk_usage(path)
                return usage.total, usage.free
            except OSError:
                return None

        try:
            page = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            metrics = opener.open(page, timeout=3).read().decode(errors="replace")
        except (OSError, KeyError):
            metrics = ""
        return space("/dev/shm"), space(node["RayletSocketName"].partition("/sockets/")[0]), metrics

    def now() -> float:
        return time.time()

    def on(node: Mapping[str, Any], function: Callable[..., Any], *args: Any) -> Any:
        place = NodeAffinitySchedulingStrategy(node_id=node["NodeID"], soft=False)
        options = {"num_cpus": 0, "max_retries": 0, "scheduling_strategy": place, "name": "slime_cross_job_doctor"}
        task: Any = ray.remote(function)
        return task.options(**options).remote(*args)

    alive, found = [node for node in ray.nodes() if node["Alive"]], []
    asked = [on(node, probe, node) for node in alive]
    ray.wait(asked, num_returns=len(asked), timeout=timeout_s)
    for node, ref in zip(alive, asked):
        name = f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']}, {node['NodeID'][:8]})"
        known = (node["NodeID"], name, int(node["Resources"].get("object_store_memory", 0)))
        try:
            shm, disk, metrics = ray.get(ref, timeout=0)
            began, sent = time.monotonic(), time.time()
            theirs = ray.get(on(node, now), timeout=3)  # in the worker that is warm by now
            half_s = (time.monotonic() - began) / 2  # its clock was read in the middle, plus or minus this
            found.append(Node(*known, shm, disk, theirs - (sent + half_s), half_s, figures(metrics)))
        except ray.exceptions.GetTimeoutError:
            found.append(Node(*known, error="a task on it does not end within the time"))
        except ray.exceptions.RayError as error:
            found.append(Node(*known, error=f"no task runs on it: {str(error).splitlines()[0]}"))
    for ref in asked:
        ray.cancel(ref, force=True)  # where it still waits, or runs
    return found


def figures(text: str) -> dict[str, float]:
    """Of a node's Prometheus metrics: bytes "spilled" now and "ever_spilled", in "fallback" files outside of shared
    memory, and "in_shm". What is not there is left out; other Ray nodes on the same page add up."""
    wanted = {
        "spilled": ("ray_object_store_memory", 'Location="SPILLED"'),
        "in_shm": ("ray_object_store_memory", 'Location="MMAP_SHM"'),
        "ever_spilled": ("ray_spill_manager_objects_bytes", 'State="Spilled"'),
        "fallback": ("ray_object_store_fallback_memory", ""),
    }
    found: dict[str, float] = {}
    for metric, label, value in re.findall(r"^(\w+)(?:\{(.*)\})? ([-+0-9.eE]+)(?: \d+)?$", text, re.MULTILINE):
        for name, (wanted_metric, part) in wanted.items():
            if metric == wanted_metric and part in label:
                found[name] = found.get(name, 0.0) + float(value)
    return found


def judge(node: Node) -> list[Finding]:
    """What is wrong with a node."""
    found: list[Finding] = []

    def tell(check: str, severity: str, what: str, why: str = "", do: str = "") -> None:
        found.append(Finding(check, severity, what, why, do, node.name))

    if node.error:
        why = "jobs, vaults and their weights hang with it, and Ray still counts it as alive"
        tell("nodes", "error", node.error, why, "look at its load, memory and raylet's log; take it out if it hangs")
        return found
    now, beside, ever = (node.metrics.get(name, 0.0) for name in ("spilled", "fallback", "ever_spilled"))
    if now or beside or ever:
        what = f"{bytes_text(now)} of objects lie on disk, {bytes_text(beside)} in files beside the object store; "
        what += f"{bytes_text(ever)} went to disk since the node started"
        why = "its object store is too small: every read of what was spilled waits for the disk"
        do = "give it a larger --object-store-memory, or keep less (--cross-job-retain, --cross-job-max-bytes)"
        tell("spilling", "warning" if now or beside else "note", what, why, do)
    elif "spilled" not in node.metrics:
        tell("spilling", "note", "not looked at: the node's metrics do not tell it; see `ray memory --stats-only`")
    if node.shm:
        total, free = node.shm
        store = bytes_text(node.store_bytes)
        what = f"/dev/shm has {bytes_text(total)}, {bytes_text(free)} free; the object store {store}"
        do = "enlarge /dev/shm (docker --shm-size, an emptyDir of medium Memory), or lower --object-store-memory"
        if total < node.store_bytes:
            why = "Ray then keeps the object store in files under /tmp, on disk: all that is published is slow"
            tell("shared memory", "error", what, why, do)
        elif free + node.metrics.get("in_shm", total) < node.store_bytes or free < _LEAST_FREE * total:
            why = "others use it too: when it is full, processes that write to the object store die (SIGBUS)"
            tell("shared memory", "warning", what, why, f"remove what was left in /dev/shm; {do}")
    total, free = node.disk or (0, 0)
    if free < _LEAST_FREE * total:
        what = f"the disk of Ray's session has {bytes_text(free)} free of {bytes_text(total)}"
        why = f"above {1 - _LEAST_FREE:.0%} Ray writes no objects to it any more: a full object store then fails"
        tell("disk", "error", what, why, "free some, or start Ray with --temp-dir on a larger disk")
    proven_s = abs(node.offset_s) - node.uncertain_s
    if proven_s > SKEW_S:
        side = "ahead of" if node.offset_s > 0 else "behind"
        what = f"its clock is {span_text(abs(node.offset_s))} {side} this machine's (± {node.uncertain_s:.2f} s)"
        why = "ages and waits come out wrong; from minutes on, what a durable store just took may be freed as old"
        tell("clocks", "error" if proven_s > SKEW_BAD_S else "warning", what, why, "run an NTP client there (chrony)")
    return found


def judged(nodes: Sequence[Node]) -> list[Finding]:
    """What is wrong with the nodes, and which checks found nothing."""
    found = [finding for node in nodes for finding in judge(node)]
    well = [check for check in _OF_NODES if not any(one.check == check for one in found)]
    return [*found, *(Finding(check, "ok", f"nothing is wrong with {len(nodes)} nodes") for check in well)]


def object_stores(nodes: Sequence[Node], jobs: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    """Whether the object stores can hold the rollouts of jobs: those ahead, the one that is generated, the one that is
    trained on. `jobs`: what the broker's `look` says, by job id."""
    found, needs = [], [0]
    for job, one in jobs.items():
        status = one["status"]
        here = {client["node_id"] for client in (status["producer"], *status["consumers"].values()) if client}
        largest = max((known.nbytes for _, known in one["progress"]), default=0)
        count, held = status["max_ahead"] + 2, status["held_bytes"]
        most = max(largest * count, held)
        needs.append(largest * count)
        for node in (node for node in nodes if node.node_id in here and largest and 0 < node.store_bytes < most):
            what = f"it has {bytes_text(node.store_bytes)}; job {job} has rollouts of up to {bytes_text(largest)}, "
            what += f"{count} of them at a time (--cross-job-max-ahead {count - 2}), and holds {bytes_text(held)}"
            why = "what does not fit goes to disk, and every reader waits for it, until the disk is full"
            do = f"start the node with --object-store-memory {-(-most // 100_000_000) * 100_000_000} or more, or "
            do += "lower --cross-job-max-ahead, --cross-job-retain or --cross-job-max-bytes"
            severity = "error" if largest > node.store_bytes else "warning"
            found.append(Finding("object store", severity, what, why, do, node.name))
    least = min((node.store_bytes for node in nodes), default=0)
    asked = f"jobs need up to {bytes_text(max(needs))} at a time" if max(needs) else "no job's rollouts are known"
    return found or [Finding("object store", "ok", f"the smallest has {bytes_text(least)}; {asked}")]
