"""Verdicts: what is said to somebody who waited, or who is turned away. Pure functions over the ledger's records."""

from collections.abc import Sequence
from typing import Any

from ..types import MOST_REASON, shortened
from .state import (
    DEAD,
    DRAINING,
    FAILED,
    FINISHED,
    LIVE,
    PAUSED,
    PUBLICATION,
    RUNNING,
    SILENT,
    STOPPED,
    Client,
    Job,
    is_full,
)

_JOB_NAME = {"producer": "rollout job", "consumer": "train job"}
SLOW_AFTER_S = 5.0
VOUCHED_S = 60.0
"""For so long Ray's word holds that a silent client is alive: its machine may be overloaded, and the dashboard too."""
OK, WARNING, ERROR = "ok", "warning", "error"
FEWEST = 4
"""Rollouts that were claimed, from which one says who waits for whom."""
_MOST = 300  # characters of a reason
_ONE_SIDED = 0.1  # share of the time, from which one of them is the bottleneck
_IDLE_S, _IDLE_TIMES = 600.0, 5.0
"""A job in which nothing happens for so long, and for so many times as a rollout usually takes, is worth a look."""
_LONG_S = 10.0  # an activity that lasts longer says how long


def who(client: Client) -> str:
    """Name a client so that its operator can find it."""
    info = client.info
    ray_job = f"Ray job {info.ray_job_id or '?'}" + (f" ({info.submission_id})" if info.submission_id else "")
    group = f", group {info.group}" if info.group else ""
    return (
        f"{info.role} of job {info.job_id} (epoch {client.epoch}{group}, {ray_job}, "
        f"pid {info.pid} on {info.host or '?'})"
    )


def presumed_dead(client: Client, now: float) -> bool:
    """Whether its lease is over and nobody can tell that it lives: its peers take it for dead, until it is heard."""
    vouched = client.vouched_at is not None and now - client.vouched_at <= VOUCHED_S
    return client.state == SILENT and not vouched


def verdict(client: Client | None, role: str, job_id: str, now: float) -> dict[str, Any]:
    """Say how the peer in `role` stands: kind absent, slow, alive, silent, finished, stopped,
    failed or dead; and what to do.

    Returns a JSON-able dict with `kind`, `message`, and where there is a client `who`, `silent_s`, `activity`,
    `activity_s` (seconds since it began with that), `ray_job_id`, `submission_id`, `reason`.
    """
    name = _JOB_NAME[role]
    if client is None:
        return {
            "kind": "absent",
            "message": (
                f"no {name} has attached to job {job_id} yet: "
                f"start it with --job-id {job_id}, on this cluster and namespace"
            ),
        }
    silent_s = max(0.0, now - client.last_beat)
    ago = f"{silent_s:.1f} s ago" if silent_s < 120 else f"{silent_s / 60:.0f} min ago"
    facts = {
        "who": who(client),
        "silent_s": round(silent_s, 3),
        "activity": client.activity,
        "ray_job_id": client.info.ray_job_id,
        "submission_id": client.info.submission_id,
        "reason": client.reason,
        "state": client.state,
    }
    lasted_s = max(0.0, now - client.since)
    facts["activity_s"] = round(lasted_s, 3)
    if client.state == LIVE:
        kind = "slow" if silent_s > SLOW_AFTER_S else "alive"
        text = f"the {who(client)} gave its last sign of life {ago}, doing: {client.activity}"
        text += f", for {lasted_s:.0f} s by now" if lasted_s > _LONG_S else ""
        text += "; it may be stuck: look at its log" if kind == "slow" else "; it is still at work: allow more time"
    elif client.state == FINISHED:
        kind, text = "finished", f"the {who(client)} finished" + (f": {client.reason}" if client.reason else "")
    elif client.state == STOPPED:
        kind = "stopped"
        text = f"the {who(client)} stopped as asked: {client.reason or 'no reason given'}; start the {name} again"
    elif client.state == FAILED:
        kind, text = "failed", f"the {who(client)} failed: {client.reason}; mend it and start the {name} again"
    elif presumed_dead(client, now):
        kind = "dead"
        text = (
            f"the {who(client)} counts as dead: no sign of life for {silent_s:.1f} s, and Ray cannot tell whether it "
            f"lives (does its dashboard run?); it was last doing: {client.activity}. Start the {name} again: what it "
            "had published is still there"
        )
    elif client.state == SILENT:
        kind = "silent"
        text = (
            f"the {who(client)} is silent, not dead: no sign of life for {silent_s:.1f} s, but Ray calls it alive "
            f"(node {client.info.node_id[:8] or '?'}); it was last doing: {client.activity}. It goes on when it wakes "
            "up and nobody took its place: see whether its process hangs or is stopped, or its machine is overloaded; "
            f"or stop its Ray job and start the {name} again"
        )
    else:
        assert client.state == DEAD
        kind = "dead"
        text = (
            f"the {who(client)} is dead: {client.reason}; it was last heard {ago}, doing: {client.activity}. "
            f"Start the {name} again: the rollouts that were published are still there"
        )
    return {"kind": kind, "message": text, **facts}


def state_of(job: Job, now: float) -> str:
    """How a job stands, in a word: complete; failed, dead or silent, as a client of it is that ended last; paused or
    draining, as its operator wants; stopped: nobody of it is there any more; waiting: one side is not there; running.
    """
    if job.complete:
        return "complete"
    trainers = [group.last for group in job.groups.values()]
    clients = [client for client in (job.producer, *trainers) if client is not None]
    states = {DEAD if presumed_dead(client, now) else client.state for client in clients}
    if worst := next((state for state in (FAILED, DEAD, SILENT) if state in states), ""):
        return worst
    if clients and LIVE not in states:
        return STOPPED
    if job.control != RUNNING:
        return job.control
    sides = [job.producer, *(trainers or [None] * (job.retain_from != PUBLICATION))]
    return "waiting" if any(side is None or side.state == STOPPED for side in sides) else RUNNING


def patience_left_s(verdict: dict[str, Any], timeout_s: float, grace_s: float) -> float:
    """For how many seconds more a wait goes on that ends after `timeout_s` of silence or stopped progress; 0 or less:
    it ends now.

    Args:
        verdict: of Ledger.peer_verdict; `stalled_s` tells for how long every client of the job has only waited.
        grace_s: that a peer has to come back.
    """
    kind, silent_s = verdict["kind"], verdict.get("silent_s", 0.0)
    if kind in ("alive", "slow", "full"):
        return timeout_s - max(silent_s, verdict.get("stalled_s", 0.0))
    if kind in ("silent", "paused"):  # that nobody is at work is what the operator of a paused job wants
        return timeout_s - silent_s
    if kind in ("stopped", "failed", "dead"):
        return timeout_s + grace_s - silent_s
    return 0.0


def set_aside(job: Job, rollout_id: int, most: int = MOST_REASON) -> str:
    """Why this rollout is set aside (in so many characters), and how to go on."""
    again = "hands it out again" if rollout_id in job.rollouts else "has it generated again"
    drop = f"; `slime-cross-job drop {rollout_id}` replaces it" if rollout_id in job.rollouts else ""
    reason = shortened(job.dead_letters[rollout_id]["reason"], most)
    return (
        f"rollout {rollout_id} of job {job.job_id} is set aside: {reason}. Mend the cause; then `slime-cross-job "
        f"requeue {rollout_id}` {again}{drop}. With --cross-job-on-poison skip such a rollout is replaced by one of "
        "new prompts"
    )


def standing(
    job: Job, recent: dict[str, Any], now: float, idle_s: float | None, damaged: Sequence[int] = (), unstored: int = 0
) -> list[dict[str, str]]:
    """How a job stands, in sentences for its operator, what matters most first: [{"level", "text"}], where a level is
    error, warning or ok. `recent`, `idle_s` and `damaged` are those of its status;
    `unstored` rollouts do not come into the durable store."""
    if job.complete:
        return [{"level": OK, "text": f"Complete: {job.acked + job.covered} rollouts took effect."}]
    said = [*_of_its_operator(job), *_of_its_clients(job, now)]
    replaced = [r for r, letter in job.dead_letters.items() if letter["replaced"]]
    said += [(ERROR, set_aside(job, r, _MOST)) for r in job.dead_letters if r not in replaced]
    if replaced:
        text = f"{len(replaced)} rollouts were set aside and replaced ({_some(replaced)}): see `quarantine`."
        said.append((WARNING, text))
    if job.lost:
        some = _some(sorted(job.lost))
        said.append(
            (
                WARNING,
                f"{len(job.lost)} rollouts are lost ({some}): generated again on demand.",
            )
        )
    if unstored:
        said.append(
            (
                WARNING,
                f"{unstored} rollouts are not in the durable store after a minute: see the logs of their vaults.",
            )
        )
    if damaged:
        text = f"{len(damaged)} rollouts have a damaged record ({_some(damaged)}): their weight version or meta has a "
        said.append((WARNING, f"{text}wrong type. They are handed out as of unknown weights; drop them if in doubt."))
    if is_full(job):
        text = f"The rollout job waits for room: {job.held_bytes} bytes are held. Save checkpoints more often, raise "
        said.append((WARNING, f"{text}--cross-job-max-bytes {job.max_bytes}, or close a group that stays away."))
    usual_s = 60 / recent["per_minute"] if recent["per_minute"] else 0.0
    if idle_s is not None and idle_s > max(_IDLE_S, _IDLE_TIMES * usual_s):
        said.append((WARNING, f"Nothing has happened to a rollout for {idle_s / 60:.0f} min: {_waited_for(job)}."))
    said.append((OK, _balance(recent)))
    said.sort(key=lambda one: (ERROR, WARNING, OK).index(one[0]))
    return [{"level": level, "text": text} for level, text in said]


def _waited_for(job: Job) -> str:
    leased = sum(len(group.leases) for group in job.groups.values())
    if leased:
        return f"the train job has {leased} rollouts and does not ack them"
    if waiting := sum(rollout_id not in job.done for rollout_id in job.rollouts):
        return f"{waiting} published rollouts wait for the train job to claim them"
    if job.demands:
        return f"the train job waits for {len(job.demands)} rollouts that it demanded of the rollout job"
    return "the rollout job waits for the train job to demand a rollout, or for its weights"


def _some(ids: Sequence[int]) -> str:
    return ", ".join(map(str, ids[:8])) + (", ..." if len(ids) > 8 else "")


def _of_its_operator(job: Job) -> list[tuple[str, str]]:
    words = {
        PAUSED: "Paused by its operator: nothing new is generated until it is resumed.",
        DRAINING: "Draining: what is out is finished, then both jobs end.",
    }
    return [(WARNING, words[job.control])] if job.control in words else []


def _of_its_clients(job: Job, now: float) -> list[tuple[str, str]]:
    groups = [
        (("train job" if name == "train" else f"consumer group {name}"), g.last) for name, g in job.groups.items()
    ]
    said = []
    nobody = [] if job.retain_from == PUBLICATION else [("train job", None)]
    for name, client in [("rollout job", job.producer), *(groups or nobody)]:
        if client is None:
            said.append((WARNING, f"No {name} has attached yet: start it with --job-id {job.job_id}."))
            continue
        reason, ago = shortened(client.reason, _MOST), f"{now - client.ended_at:.0f} s"
        if client.state == DEAD:
            said.append((ERROR, f"The {name} is dead, for {ago}: {reason or 'nobody knows why'}. Start it again."))
        elif client.state == FAILED:
            said.append((ERROR, f"The {name} failed, {ago} ago: {reason or 'no reason given'}. Start it again."))
        elif client.state == STOPPED:
            said.append((WARNING, f"The {name} stopped as asked ({reason or 'no reason given'}): start it to go on."))
        elif client.state == FINISHED:
            said.append((OK, f"The {name} is through."))
        elif presumed_dead(client, now):
            text = f"The {name} gives no sign of life for {now - client.last_beat:.0f} s, and counts as dead, as Ray"
            said.append((ERROR, f"{text} cannot tell whether it lives. Start it again, or see to Ray's dashboard."))
        elif client.state == SILENT:
            text = f"The {name} is silent for {now - client.last_beat:.0f} s, doing: {client.activity}. Ray calls it"
            said.append((WARNING, f"{text} alive: see whether its process hangs, or its machine is overloaded."))
        elif (silent_s := now - client.last_beat) > SLOW_AFTER_S:
            text = f"The {name} gives no sign of life for {silent_s:.0f} s of its lease of {client.dead_after_s:g} s, "
            said.append((WARNING, f"{text}doing: {client.activity}. Look at its log, and whether it hangs."))
    return said


def _balance(recent: dict[str, Any]) -> str:
    share, claimed = recent["bottleneck"], recent["rollouts"]
    if share is None:
        so_far = f"{claimed or 'No'} rollout{'' if claimed == 1 else 's'}"
        return f"{so_far} claimed so far: who waits for whom is said from {FEWEST} on."
    by = f"({share:+.2f} over the last {recent['rollouts']} rollouts)"
    if share > _ONE_SIDED:
        return f"Training waits for rollouts: generation is the bottleneck {by}."
    if share < -_ONE_SIDED:
        return f"Generation waits for training: training is the bottleneck {by}."
    return f"Balanced: neither job waits much longer for the other {by}."
