"""What `doctor` sees of broker, vaults and jobs."""

import time
from collections.abc import Mapping
from typing import Any

import ray

from ...client.connection import Connection, get
from ...deadline import Deadline
from ...errors import CrossJobError
from ...types import PROTOCOL, VAULT_NAME, shortened
from ..text import span_text
from ..viewer import raise_if_stuck
from . import Finding

ANSWER_S = 10.0
"""For the broker: it is away for seconds while it restarts."""
_VAULT_S = 5.0
_MOST_JOBS = 50
_LONG_RESTART_S = 3600.0  # a restart of the broker that is older is no news


def look_at_broker(namespace: str, job_id: str | None) -> tuple[Connection, list[Finding], dict[str, Any]]:
    """A connection to the broker; findings on it; of each job that is looked at its status, progress and events.

    Raises what the broker lacks: NoBroker, BrokerLost, ProtocolMismatch, WaitTimeout."""
    raise_if_stuck(namespace)
    connection = Connection(namespace, make=False, patience_s=ANSWER_S, grace_s=ANSWER_S)
    began = time.monotonic()
    statuses = connection.call("status")
    what = f"it answers within {time.monotonic() - began:.2f} s, keeps {len(statuses)} jobs"
    chosen = [job for job, one in statuses.items() if job == job_id or (job_id is None and not one["complete"])]
    jobs = {job: connection.call("look", job, limit=200) for job in chosen[:_MOST_JOBS]}
    told = [Finding("broker", "ok", what, where=namespace), *restarts(jobs, time.time())]
    if job_id is not None and not jobs:
        what = f"namespace {namespace!r} knows no job {job_id}; it knows {', '.join(sorted(statuses)) or 'none'}"
        told.append(Finding("jobs", "error", what, "", "correct the job id, the namespace or the address", job_id))
    elif not jobs:
        told.append(Finding("jobs", "note", "not looked at: there is no open job"))
    return connection, told, jobs


def restarts(jobs: Mapping[str, Any], now: float) -> list[Finding]:
    """Whether the broker was restarted within the last hour; `now`: wall clock."""
    times = [event.at for one in jobs.values() for _, event in one["events"] if event.kind == "restarted"]
    ago_s = now - max(times, default=0.0)
    if ago_s > _LONG_RESTART_S:
        return []
    count = max(one["status"]["events"].get("restarted", 0) for one in jobs.values())
    what = f"it was restarted {count} times; the last time {span_text(ago_s)} ago"
    do = "look for its end in the events of its node: out of memory, or a node that went away"
    return [Finding("broker", "warning", what, "each restart holds up both jobs for seconds", do)]


def look_at_vaults(namespace: str, jobs: int) -> list[Finding]:
    """Ask every vault on a node that is alive who it is."""
    hosts = {f"{VAULT_NAME}_{n['NodeID']}": n["NodeManagerHostname"] for n in ray.nodes() if n["Alive"]}
    named = ray.util.list_named_actors(all_namespaces=True)
    mine = [actor["name"] for actor in named if actor["namespace"] == namespace and actor["name"] in hosts]
    asked = {name: ray.get_actor(name, namespace=namespace).hello.remote() for name in mine}
    deadline, answers = Deadline(_VAULT_S), dict[str, int | str]()
    for name, ref in asked.items():
        title = f"vault of node {hosts[name]} ({name})"
        try:
            answers[title] = get(ref, deadline, "it")["protocol"]
        except (CrossJobError, ray.exceptions.RayError) as error:
            answers[title] = shortened(str(error).partition("\n")[0], 300)
    return vaults(answers, len(hosts), jobs)


def vaults(answers: Mapping[str, int | str], nodes: int, jobs: int) -> list[Finding]:
    """`answers`: of each vault its protocol, or why it is silent. So many `nodes` are alive, so many `jobs` open."""
    found = []
    for name, said in answers.items():
        if isinstance(said, str):
            why = "what lies in it cannot be read, and its node takes no new rollouts"
            do = "look at its node and at its log (ray logs actor --id ...); Ray restarts a vault that died"
            found.append(Finding("vaults", "error", f"it does not answer: {said}", why, do, name))
        elif said != PROTOCOL:
            do = "start the jobs with the same slime cross-job, or use another --cross-job-namespace"
            found.append(Finding("vaults", "error", f"it speaks protocol {said}, we {PROTOCOL}", do=do, where=name))
    answering = sum(said == PROTOCOL for said in answers.values())
    if answering < 2 <= nodes and jobs:
        what = f"{answering} vaults keep what the broker must remember, on {nodes} nodes"
        why = "with the node of the only one, the broker's memory of the jobs is gone as well"
        do = "publish or read from a second node, or give the jobs a durable store (--cross-job-store)"
        found.append(Finding("vaults", "warning", what, why, do))
    return found or [Finding("vaults", "ok", f"{answering} vaults answer, on {nodes} nodes")]


def look_at_job(job_id: str, status: Mapping[str, Any]) -> list[Finding]:
    """How a job stands, in the words of `status` (see verdicts.standing), and who its clients are."""
    told = [Finding("jobs", one["level"], one["text"], where=job_id) for one in status["standing"]]
    clients = {"rollout job": status["producer"], **{f"group {n}": c for n, c in status["consumers"].items()}}
    for name, one in clients.items():
        if one is not None:
            stands = "presumed dead" if one["presumed_dead"] else one["state"]
            what = f"{name} (Ray job {one['submission_id'] or one['ray_job_id']}, pid {one['pid']} on "
            what += f"{one['host'] or '?'}) is {stands}, silent for {one['silent_s']:.1f} of "
            what += f"{one['dead_after_s']:g} s, at {one['activity']!r} for {span_text(one['activity_s'])}"
            told.append(Finding("jobs", "ok", what, where=job_id))
    return told
