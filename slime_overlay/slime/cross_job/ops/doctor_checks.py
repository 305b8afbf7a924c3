"""What `doctor` concludes from what the broker says of the jobs: pure functions, facts in, findings out.

Every check also tells the figure that it saw where all is well, so that a reader knows what was looked at.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..records import DEAD, DRAINING, FAILED, FINISHED, LIVE, PAUSED, SILENT, STOPPED
from ..types import PROTOCOL
from .text import span_text

SEVERITIES = ("error", "warning", "note", "ok")
STUCK_S = 600.0
"""A job in which nothing happened for so long, and for `STUCK_TIMES` of its usual rollouts, is worth a look."""
STUCK_TIMES = 5
_LEASE_SHARE = 0.5  # of its lease, that a live client may be silent
_LONG_RESTART_S = 3600.0  # a restart of the broker that is older is no news

Status = Mapping[str, Any]


@dataclass(frozen=True)
class Finding:
    """What one check found: `what` is the case, `why` it matters, what to `do`; `where`: the job, node or store."""

    check: str
    severity: str  # one of SEVERITIES; note: it was not looked at, or says something without being wrong
    what: str
    why: str = ""
    do: str = ""
    where: str = ""


def broker_speaks(hello: Mapping[str, Any], vaults: Mapping[str, int]) -> list[Finding]:
    """`hello` of the broker, and the protocol of each vault by name."""
    why = "all of a namespace must speak the same protocol: clients of another one are refused"
    do = f"start the jobs with the same slime cross-job ({PROTOCOL}), or use another --cross-job-namespace"
    found = []
    if hello["protocol"] != PROTOCOL:
        what = f"the broker of namespace {hello['namespace']!r} speaks protocol {hello['protocol']}, we {PROTOCOL}"
        found.append(Finding("protocol", "error", what, why, do, hello["namespace"]))
    for name, protocol in vaults.items():
        if protocol != PROTOCOL:
            found.append(Finding("protocol", "error", f"it speaks protocol {protocol}, we {PROTOCOL}", why, do, name))
    return found or [Finding("protocol", "ok", f"broker and {len(vaults)} vaults speak protocol {PROTOCOL}")]


def no_broker(namespace: str, others: Sequence[str]) -> Finding:
    there = ", ".join(others) or "none"
    return Finding(
        "broker",
        "error",
        f"namespace {namespace!r} has no broker; namespaces of this cluster that have one: {there}",
        "nothing has used cross-job there, or it was another cluster; jobs meet in a namespace only",
        f"name the right namespace (--namespace {others[0] if others else 'NAME'}), or start a job",
        namespace,
    )


def broker_stands(namespace: str, jobs: int, answered_s: float, restarted: Mapping[str, Any]) -> list[Finding]:
    """Args:
    restarted: {"count": times that a job went on with a new broker, "at": the last one, wall clock, "now"}.
    """
    found = [Finding("broker", "ok", f"it answers within {answered_s:.2f} s, and keeps {jobs} jobs", where=namespace)]
    if restarted.get("count"):
        ago_s = max(0.0, restarted["now"] - restarted["at"])
        found.append(
            Finding(
                "broker",
                "warning" if ago_s < _LONG_RESTART_S else "note",
                f"it was restarted {restarted['count']} times; the last time {span_text(ago_s)} ago",
                "a broker that dies again and again holds up both jobs each time, for seconds",
                "look for its end in the events of its node: out of memory, or a node that went away",
                namespace,
            )
        )
    return found


def vaults_answer(
    silent: Mapping[str, str], gone: Sequence[str], answering: int, nodes: int, jobs: int
) -> list[Finding]:
    """Args:
    silent: name of a vault that does not answer -> what was seen. gone: those whose node has left the cluster.
    nodes: of the cluster, that are alive.
    """
    found = [
        Finding(
            "vaults",
            "note",
            "its node has left the cluster",
            "what lay in it alone is lost; the broker has let it be generated again, or reads the durable store",
            "nothing, if the node was meant to go",
            name,
        )
        for name in gone
    ]
    found += [
        Finding(
            "vaults",
            "error",
            f"it does not answer: {words}",
            "what lies in it cannot be read, and its node takes no new rollouts",
            "look at its node and at its log (ray logs actor --id ...); a vault that died is started again by Ray",
            name,
        )
        for name, words in silent.items()
    ]
    if answering < 2 and jobs:
        found.append(
            Finding(
                "vaults",
                "warning" if nodes > 1 else "note",
                f"{answering} vaults keep what the broker must remember, on {nodes} nodes",
                "with the node of the only one, the broker's memory of the jobs is gone as well",
                "publish or read from a second node, or give the jobs a durable store (--cross-job-store)"
                if nodes > 1
                else "it is all that a cluster of one node can do; a durable store (--cross-job-store) outlives it",
            )
        )
    return found or [Finding("vaults", "ok", f"{answering} vaults answer, on {nodes} nodes")]


# ------------------------------------------------------------------ jobs


def peers(job_id: str, status: Status) -> list[Finding]:
    """Whether somebody waits for a job that is gone."""
    if status["complete"]:
        return [Finding("peers", "ok", "the job is complete", where=job_id)]
    producer = status["producer"]
    consumers = {name: one for name, one in status["consumers"].items() if one is not None}
    reading = [name for name, one in consumers.items() if _is_there(one)]
    producing = producer is not None and _is_there(producer)
    draining = status["control"] == DRAINING
    found: list[Finding] = []
    if reading and not producing:
        found += _gone(job_id, "rollout job", producer, f"the train job (group {', '.join(reading)})", draining)
    for name, one in consumers.items():
        if name not in reading and not status["groups"].get(name, {}).get("closed") and producing:
            found += _gone(job_id, f"train job (group {name})", one, "the rollout job", draining)
    if producing and not consumers:
        found += _gone(job_id, "train job", None, "the rollout job", draining)
    if not producing and not reading:
        ends = [_last(name, one) for name, one in (("rollout job", producer), *consumers.items())]
        failed = any(one is not None and _state(one) in (FAILED, DEAD) for one in (producer, *consumers.values()))
        found.append(
            Finding(
                "peers",
                "warning" if failed else "note",
                f"nobody is attached to it: {'; '.join(ends)}",
                f"nothing goes on; {status['queue_depth']} published rollouts wait, and keep their memory",
                "start both jobs again with the same command, or `forget` the job if it is over",
                job_id,
            )
        )
    if status["lost"]:
        found.append(
            Finding(
                "peers",
                "warning",
                f"rollouts {_numbers(status['lost'])} went with their vault and are not generated again yet",
                "whoever waits for one of them waits until the rollout job has generated it anew",
                "keep the rollout job running; a durable store (--cross-job-store) prevents it",
                job_id,
            )
        )
    if found:
        return found
    there = [_doing("rollout job", producer)] if producer is not None else []
    there += [_doing(f"group {name}", one) for name, one in consumers.items()]
    return [Finding("peers", "ok", "; ".join(there), where=job_id)]


def _gone(job_id: str, name: str, client: Status | None, waiting: str, draining: bool) -> list[Finding]:
    if client is None:
        return [
            Finding(
                "peers",
                "warning",
                f"no {name} has attached yet; {waiting} is there",
                "it waits: for rollouts, or for somebody who wants them",
                f"start the {name} with --job-id {job_id}, on this cluster and in this namespace",
                job_id,
            )
        ]
    state = _state(client)
    if state == FINISHED or (state == STOPPED and draining):
        return []
    return [
        Finding(
            "peers",
            "error" if state in (FAILED, DEAD) else "warning",
            f"the {_last(name, client)}, while {waiting} is alive and needs it",
            "the other side waits for it, as long as its --cross-job-peer-grace-s and its timeout allow",
            f"{'look at its log (ray job logs), mend it and ' if state != STOPPED else ''}start it again with the "
            "same command: it goes on where it was",
            job_id,
        )
    ]


def progress(job_id: str, status: Status) -> Finding:
    """Whether the job stands still, and who waits for whom."""
    if status["complete"]:
        return Finding("progress", "ok", "the job is complete", where=job_id)
    producer = status["producer"]
    consumers = {n: one for n, one in status["consumers"].items() if one is not None and _is_there(one)}
    if producer is None or not _is_there(producer) or not consumers:
        return Finding("progress", "note", "not looked at: one of the two jobs is not there", where=job_id)
    idle_s = status["idle_s"]
    acts = "; ".join([_doing("rollout job", producer), *(_doing(f"group {n}", c) for n, c in consumers.items())])
    usual = f"{status['published']} published, {status['acked']} acked, queue {status['queue_depth']}; {acts}"
    if status["control"] == PAUSED:
        why = "nothing new is generated until it is resumed, by whoever paused it"
        do = "resume it, if that was not meant"
        return Finding("progress", "warning", f"it is paused; {usual}", why, do, job_id)
    per_minute = status["recent"]["per_minute"]
    limit_s = max(STUCK_S, STUCK_TIMES * 60 / per_minute) if per_minute else STUCK_S
    stuck = idle_s is not None and idle_s > limit_s
    since = f"nothing happened to a rollout {'yet' if idle_s is None else f'for {span_text(idle_s)}'}"
    full = status["max_bytes"] is not None and status["held_bytes"] >= status["max_bytes"]
    if full:
        return Finding(
            "progress",
            "warning",
            f"the rollout job waits for room: {status['held_bytes']} bytes are held, of --cross-job-max-bytes "
            f"{status['max_bytes']}; {since}; {acts}",
            "nothing is generated until what was published is acked, which follows the checkpoints",
            "save checkpoints more often, raise --cross-job-max-bytes, or close a group that will not come back",
            job_id,
        )
    if not stuck:
        return Finding("progress", "ok", f"{since}; {usual}", where=job_id)
    return Finding(
        "progress",
        "warning",
        f"{since}, more than {span_text(limit_s)}: {_waiting(status)}; {acts}",
        "a step may take long, or one of them hangs; GPUs stand idle on the other side",
        "look at the log of the one that is waited for, and at its stack (py-spy dump --pid ...)",
        job_id,
    )


def _waiting(status: Status) -> str:
    if status["leased"]:
        return f"the train job has {status['leased']} rollouts and does not ack them"
    if status["queue_depth"]:
        return f"{status['queue_depth']} published rollouts wait for the train job to claim them"
    if status["demanded"]:
        return f"the train job waits for the rollout job, of which it demanded {status['demanded']} rollouts"
    return "the rollout job waits for the train job to demand a rollout (or for its weights)"


def leases(job_id: str, status: Status) -> list[Finding]:
    """Clients that are silent for so long that their lease is about to end, or over."""
    clients = {"rollout job": status["producer"], **{f"group {n}": c for n, c in status["consumers"].items()}}
    live = {name: one for name, one in clients.items() if one is not None and _is_there(one)}
    found = [
        Finding(
            "leases",
            "warning",
            f"the {name} (pid {one['pid']} on {one['host'] or '?'}) is silent for {one['silent_s']:.1f} s, of a "
            f"lease of {one['dead_after_s']:g} s. It was last doing: {one['activity']}",
            "once its lease is over, others may take its place and what it holds, and it is refused when it comes "
            "back; where Ray cannot tell whether it lives, its peers count it as dead",
            "see whether its process hangs, is stopped or has lost the network; raise --cross-job-dead-after-s if "
            "it only pauses",
            job_id,
        )
        for name, one in live.items()
        if one["silent_s"] > _LEASE_SHARE * one["dead_after_s"]
    ]
    if found:
        return found
    if not live:
        return [Finding("leases", "ok", "nobody is attached", where=job_id)]
    longest = max(live.values(), key=lambda one: one["silent_s"] / one["dead_after_s"])
    words = f"{len(live)} clients; the longest silence is {longest['silent_s']:.1f} of {longest['dead_after_s']:g} s"
    return [Finding("leases", "ok", words, where=job_id)]


# ------------------------------------------------------------------ words


def _last(name: str, client: Status | None) -> str:
    if client is None:
        return f"{name} never attached"
    reason = f": {client['reason']}" if client["reason"] else ""
    job = client["submission_id"] or client["ray_job_id"]
    who = f" (Ray job {job}, pid {client['pid']} on {client['host'] or '?'})"
    return f"{name}{who} is {_state(client)}{reason}; it was last heard {span_text(client['silent_s'])} ago"


def _is_there(client: Status) -> bool:
    return _state(client) in (LIVE, SILENT)


def _state(client: Status) -> str:
    return DEAD if client["presumed_dead"] else str(client["state"])


def _doing(name: str, client: Status) -> str:
    if not _is_there(client):
        return f"{name} {_state(client)}"
    return f"{name} {client['activity']!r} for {span_text(client['activity_s'])}"


def _numbers(ids: Sequence[int]) -> str:
    return ", ".join(map(str, ids[:8])) + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")
