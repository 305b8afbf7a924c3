"""Verdicts: what is said to somebody who waited, or who is turned away. Pure functions over the ledger's records."""

from typing import Any

from .records import DEAD, FAILED, FINISHED, LIVE, STOPPED, Client

_JOB_NAME = {"producer": "rollout job", "consumer": "train job"}
SLOW_AFTER_S = 5.0
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


def verdict(client: Client | None, role: str, job_id: str, now: float, now_wall: float) -> dict[str, Any]:
    """Say how the peer in `role` stands: kind absent, slow, alive, finished, stopped, failed or
    dead; and what to do.

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
        "last_sign_of_life": client.last_beat_wall,
        "activity": client.activity,
        "ray_job_id": client.info.ray_job_id,
        "submission_id": client.info.submission_id,
        "cluster": client.info.cluster,
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
    else:
        assert client.state == DEAD
        kind = "dead"
        text = (
            f"the {who(client)} is dead: {client.reason}; it was last heard {ago}, doing: {client.activity}. "
            f"Start the {name} again: what it had published is still there"
        )
    return {"kind": kind, "message": text, **facts}
