"""What `doctor` sees of the nodes: a probe that runs on each for a moment, and conclusions from what it saw.

The probe is a Ray task without CPUs that reads and writes nothing: it looks at /dev/shm, at the disk of Ray's session,
at the node's own metrics (which Ray renews every 10 s or so), and at the clock. It needs nothing of this package.
"""

import http.client
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from .doctor_checks import Finding
from .text import bytes_text, span_text

SKEW_S = 1.0
"""Clocks that differ by more are told: ages, waits and staleness are differences of two nodes' clocks, and a heartbeat
is a second; NTP keeps nodes within hundredths."""
SKEW_BAD_S = 300.0
"""The broker frees what nobody knows of in a durable store when its name is 600 s old, by the clock of its writer:
half of that is an error."""
_SHM_FULL = 0.95
_DISK_FULL = 0.95  # Ray itself writes no objects to a disk that is fuller (local_fs_capacity_threshold)


@dataclass(frozen=True)
class Node:
    """Facts about one node; None: not known. `error`: why it was not looked at."""

    node_id: str
    name: str
    store_bytes: int = 0  # size of its object store
    shm: tuple[int, int] | None = None  # of /dev/shm: bytes in all, and free
    disk: tuple[int, int] | None = None  # where Ray spills
    offset_s: float | None = None  # of its clock against this one
    uncertain_s: float = 0.0
    metrics: Mapping[str, float] = field(default_factory=dict)  # see `figures`
    error: str = ""


@dataclass(frozen=True)
class Need:
    """What a job asks of the object stores: its largest payload, how many of them at a time, and what it holds."""

    job_id: str
    largest_bytes: int
    max_ahead: int
    held_bytes: int
    node_ids: tuple[str, ...]  # of its clients

    @property
    def bytes(self) -> int:
        """The rollouts ahead, the one that is generated, and the one that is trained on."""
        return self.largest_bytes * (self.max_ahead + 2)


def probe(metrics_host: str, metrics_port: int, session: str) -> dict[str, Any]:
    """Runs on the node. Uses the standard library only, because it travels by value."""
    facts: dict[str, Any] = {"metrics": ""}
    for name, path in (("shm", "/dev/shm"), ("disk", session)):
        try:
            usage = shutil.disk_usage(path)
            facts[name] = (usage.total, usage.free)
        except OSError:
            facts[name] = None
    if metrics_port:
        try:
            connection = http.client.HTTPConnection(metrics_host, metrics_port, timeout=3)
            connection.request("GET", "/metrics")
            lines = connection.getresponse().read().decode(errors="replace").splitlines()
            facts["metrics"] = "\n".join(line for line in lines if line.startswith(("ray_object_store", "ray_spill")))
            connection.close()
        except (OSError, http.client.HTTPException) as error:
            facts["metrics_error"] = repr(error)
    facts["clock"] = time.time()
    return facts


def clock_of_the_node() -> float:
    """Runs on the node, in the worker that is warm by now."""
    return time.time()


def look_at_nodes(timeout_s: float, clock: Callable[[], float] = time.time) -> list[Node]:
    """Facts about every node that is alive; this process must be connected."""
    import sys

    deadline = time.monotonic() + timeout_s
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers need not have this package
    alive = [node for node in ray.nodes() if node["Alive"]]
    asked: dict[str, Any] = {}
    for node in alive:
        session = node.get("RayletSocketName", "").partition("/sockets/")[0] or "/tmp"
        address, port = node["NodeManagerAddress"], int(node.get("MetricsExportPort") or 0)
        asked[node["NodeID"]] = _on(node["NodeID"], probe, address, port, session)
    ray.wait([*asked.values()], num_returns=len(asked), timeout=max(0.0, timeout_s - 3))
    return [_node(node, asked[node["NodeID"]], deadline, clock) for node in alive]


def _on(node_id: str, function: Callable[..., Any], *args: Any) -> Any:
    place = NodeAffinitySchedulingStrategy(node_id=node_id, soft=False)
    task: Any = ray.remote(function)
    options = {"num_cpus": 0, "max_retries": 0, "scheduling_strategy": place, "name": "slime_cross_job_doctor"}
    return task.options(**options).remote(*args)


def _node(node: Mapping[str, Any], ref: Any, deadline: float, clock: Callable[[], float]) -> Node:
    name = f"{node.get('NodeManagerHostname', '?')} ({node['NodeManagerAddress']}, {node['NodeID'][:8]})"
    store_bytes = int(node["Resources"].get("object_store_memory", 0))
    try:
        facts = ray.get(ref, timeout=0)
    except ray.exceptions.GetTimeoutError:
        ray.cancel(ref, force=True)
        return Node(node["NodeID"], name, store_bytes, error="a task on it does not end within the time")
    except ray.exceptions.RayError as error:
        return Node(node["NodeID"], name, store_bytes, error=f"no task runs on it: {str(error).splitlines()[0]}")
    offset_s, uncertain_s = _offset(node["NodeID"], deadline, clock)
    metrics = figures(facts["metrics"])
    return Node(node["NodeID"], name, store_bytes, facts["shm"], facts["disk"], offset_s, uncertain_s, metrics)


def _offset(node_id: str, deadline: float, clock: Callable[[], float]) -> tuple[float | None, float]:
    """(of the node's clock against this one, half of the way there and back), of the quickest of three answers. The
    node's clock was read somewhere on that way: in its middle, plus or minus half of it."""
    best: tuple[float | None, float] = (None, float("inf"))
    for _ in range(3):
        left_s = min(3.0, deadline - time.monotonic())
        if left_s <= 0:
            break
        began, sent = time.monotonic(), clock()
        try:
            theirs = ray.get(_on(node_id, clock_of_the_node), timeout=left_s)
        except ray.exceptions.RayError:  # it answered the probe: what it is worth is known already
            break
        half_s = (time.monotonic() - began) / 2
        if half_s < best[1]:
            best = (theirs - (sent + half_s), half_s)
    return best


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
    for line in text.splitlines():
        match = re.fullmatch(r"(\w+)(\{.*\})? ([-+0-9.eE]+)( \d+)?", line.strip())
        for name, (metric, label) in wanted.items():
            if match and match[1] == metric and label in (match[2] or ""):
                found[name] = found.get(name, 0.0) + float(match[3])
    return found


# ------------------------------------------------------------------ conclusions


def not_reached(nodes: Sequence[Node]) -> list[Finding]:
    """Of nodes that Ray counts as alive and on which nothing runs."""
    found = [
        Finding(
            "nodes",
            "error",
            node.error,
            "jobs, vaults and their weights hang with it, and Ray still counts it as alive",
            "look at the node: load, memory, its raylet's log; take it out if it hangs",
            node.name,
        )
        for node in nodes
        if node.error
    ]
    return found or [Finding("nodes", "ok", f"{len(nodes)} nodes are alive, and run a task")]


def object_store(nodes: Sequence[Node], needs: Sequence[Need]) -> list[Finding]:
    """Whether the object stores can hold the jobs' rollouts."""
    found = []
    for need in needs:
        for node in nodes:
            if node.node_id not in need.node_ids or not node.store_bytes or not need.largest_bytes:
                continue
            most = max(need.bytes, need.held_bytes)
            if most <= node.store_bytes:
                continue
            alone = need.largest_bytes > node.store_bytes
            found.append(
                Finding(
                    "object store",
                    "error" if alone else "warning",
                    f"it has {bytes_text(node.store_bytes)}; job {need.job_id} has rollouts of up to "
                    f"{bytes_text(need.largest_bytes)}, {need.max_ahead + 2} of them at a time "
                    f"(--cross-job-max-ahead {need.max_ahead}), and holds {bytes_text(need.held_bytes)} now",
                    "what does not fit goes to disk, and comes back from it for every reader: slow, until the disk "
                    "is full",
                    f"start the node with --object-store-memory {_round(most)} or more, or lower "
                    "--cross-job-max-ahead, --cross-job-retain or --cross-job-max-bytes",
                    node.name,
                )
            )
    if found:
        return found
    least = min((node.store_bytes for node in nodes), default=0)
    known = [need.bytes for need in needs if need.largest_bytes]
    asked = f"jobs need up to {bytes_text(max(known))} at a time" if known else "no job's rollouts are known"
    return [Finding("object store", "ok", f"the smallest has {bytes_text(least)}; {asked}")]


def _round(nbytes: int) -> int:
    return -(-nbytes // 100_000_000) * 100_000_000


def spilling(nodes: Sequence[Node]) -> list[Finding]:
    """Whether object stores have overflowed to disk."""
    found, blind = [], [node.name for node in nodes if not node.error and "spilled" not in node.metrics]
    for node in nodes:
        now, fallback = node.metrics.get("spilled", 0.0), node.metrics.get("fallback", 0.0)
        ever = node.metrics.get("ever_spilled", 0.0)
        if not (now or fallback or ever):
            continue
        found.append(
            Finding(
                "spilling",
                "warning" if now or fallback else "note",
                f"{bytes_text(now)} of objects lie on disk, and {bytes_text(fallback)} in files beside the object "
                f"store; {bytes_text(ever)} went to disk since the node started",
                "its object store is too small for what runs there: every read of what was spilled waits for the disk",
                "give the node a larger --object-store-memory, or keep less (--cross-job-retain, "
                "--cross-job-max-bytes)",
                node.name,
            )
        )
    if blind:
        what = f"not looked at on {', '.join(blind)}: the node's metrics do not answer, or have no such figure"
        found.append(Finding("spilling", "note", what, do="see `ray memory --stats-only` there"))
    return found or [Finding("spilling", "ok", f"nothing was spilled on {len(nodes)} nodes")]


def shared_memory(nodes: Sequence[Node]) -> list[Finding]:
    """Whether /dev/shm can hold the object store, and has room for it."""
    found = []
    do = "start the container with a larger /dev/shm (docker --shm-size, an emptyDir of medium Memory), or the node "
    do += "with a smaller --object-store-memory"
    for node in nodes:
        if node.shm is None:
            continue
        total, free = node.shm
        seen = f"/dev/shm has {bytes_text(total)}, {bytes_text(free)} free"
        seen += f"; the object store {bytes_text(node.store_bytes)}"
        if total < node.store_bytes:
            why = "Ray then keeps the object store in files under /tmp, on disk: all that is published is slow"
            found.append(Finding("shared memory", "error", seen, why, do, node.name))
        elif free + node.metrics.get("in_shm", total) < node.store_bytes or free < (1 - _SHM_FULL) * total:
            why = "others use it too: when it is full, processes that write to the object store die (SIGBUS)"
            do_ = f"see what lies in /dev/shm, and remove what was left there; {do}"
            found.append(Finding("shared memory", "warning", seen, why, do_, node.name))
    known = [node.shm for node in nodes if node.shm is not None]
    if not known:
        return [Finding("shared memory", "note", "not looked at: no node told of its /dev/shm")]
    return found or [Finding("shared memory", "ok", f"the smallest /dev/shm has {bytes_text(min(known)[0])}")]


def disks(nodes: Sequence[Node]) -> list[Finding]:
    """Whether there is room where Ray spills and logs."""
    found = [
        Finding(
            "disk",
            "error",
            f"the disk of Ray's session has {bytes_text(node.disk[1])} free of {bytes_text(node.disk[0])}",
            f"above {_DISK_FULL:.0%} Ray writes no objects to it any more: a full object store then fails",
            "free some, or start Ray with --temp-dir on a larger disk",
            node.name,
        )
        for node in nodes
        if node.disk is not None and node.disk[1] < (1 - _DISK_FULL) * node.disk[0]
    ]
    known = [node.disk[1] for node in nodes if node.disk is not None]
    if not known:
        return [Finding("disk", "note", "not looked at: no node told of its disk")]
    return found or [Finding("disk", "ok", f"the fullest disk of Ray's sessions has {bytes_text(min(known))} free")]


def clocks(nodes: Sequence[Node]) -> list[Finding]:
    """Clocks that differ from this machine's, by more than the way there and back can explain."""
    known = [(node, node.offset_s) for node in nodes if node.offset_s is not None]
    if not known:
        return [Finding("clocks", "note", "not looked at: no node told the time")]
    found = []
    for node, offset_s in known:
        proven_s = abs(offset_s) - node.uncertain_s
        if proven_s > SKEW_S:
            found.append(
                Finding(
                    "clocks",
                    "error" if proven_s > SKEW_BAD_S else "warning",
                    f"its clock is {span_text(abs(offset_s)) if proven_s > 9 else f'{abs(offset_s):.1f} s'} "
                    f"{'ahead of' if offset_s > 0 else 'behind'} this machine's (± {node.uncertain_s:.2f} s)",
                    "ages, waits and staleness are differences between nodes' clocks; from minutes on, what was "
                    "just written to a durable store may be taken for old, and freed",
                    "run an NTP client there (chrony, systemd-timesyncd)",
                    node.name,
                )
            )
    worst = max(abs(offset_s) for _, offset_s in known)
    return found or [Finding("clocks", "ok", f"{len(known)} nodes, at most {worst:.3f} s from this machine's clock")]
