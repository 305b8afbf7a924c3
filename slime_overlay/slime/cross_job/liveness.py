"""Asking Ray whether a client can still be alive: its Ray job, its actor. Public state API only."""

import logging
import re
from typing import Any

import ray
from ray.util import state
from ray.util.state.exception import RayStateApiException

from .types import ClientInfo

logger = logging.getLogger(__name__)

_OVER = ("SUCCEEDED", "STOPPED", "FAILED")
_LINES = 3
JOB_IS = "its Ray job is "


def over_reason(info: ClientInfo) -> str | None:
    """Why the client cannot be alive any more, in words; None when it may live or nobody can tell (no dashboard).

    Blocks for some tens of milliseconds; call it from a thread.
    """
    reasons = []
    try:
        if info.node_id in {node["NodeID"] for node in ray.nodes() if not node["Alive"]}:
            reasons.append(f"its node {info.node_id[:8]} ({info.host}) died")
        if info.actor_id:
            actor = state.get_actor(info.actor_id, address=ray.get_runtime_context().gcs_address, timeout=5)
            if actor is not None and actor.state == "DEAD":
                reasons.append(f"its actor {info.actor_id} died")
        found = job_words(info.ray_job_id)
        if found is not None and (reasons or found[0] in _OVER):
            reasons.append(found[1])
    except (RayStateApiException, ConnectionError, OSError) as error:
        logger.warning("Ray cannot tell about Ray job %s: %s", info.ray_job_id, error)
    return "; ".join(reasons) or None


def job_words(ray_job_id: str) -> tuple[str, str] | None:
    """(status, the same in words with the last lines of its log where it is over) of a Ray job; None: Ray does not
    know it. Blocks for some tens of milliseconds. Raises what the state API raises where it is not there."""
    for job in _jobs(ray_job_id):
        # of a driver that was not submitted, Ray says SUCCEEDED however it ended
        status = str(job.status.value)
        return status, f"{JOB_IS}{status}{_last_lines(job.message) if status in _OVER else ''}"
    return None


def is_over(words: str) -> bool:
    """Whether these words tell of a Ray job that is over."""
    return any(f"{JOB_IS}{status}" in words for status in _OVER)


def submission_id(ray_job_id: str) -> str:
    """The name under which `ray job logs` knows this Ray job; empty where it was not submitted, or nobody can tell."""
    try:
        return next((job.submission_id for job in _jobs(ray_job_id) if job.submission_id), "")
    except (RayStateApiException, ConnectionError, OSError):
        return ""


def _jobs(ray_job_id: str) -> Any:
    # without an address the state API looks for a cluster on this machine, and gives up where there are two
    address = ray.get_runtime_context().gcs_address
    return state.list_jobs(address=address, filters=[("job_id", "=", ray_job_id)], timeout=5)


def _last_lines(message: str | None) -> str:
    """The end of a job's message, where Ray appends its log, without terminal escapes."""
    lines = re.sub(r"\x1b\[[0-9;]*m", "", message or "").strip().splitlines()
    return f" ({' | '.join(line.strip()[:200] for line in lines[-_LINES:])})" if lines else ""
