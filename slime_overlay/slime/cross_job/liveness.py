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


def over_reason(info: ClientInfo) -> str | None:
    """Why the client cannot be alive any more, in words; None when it may live or nobody can tell (no dashboard).

    Blocks for some tens of milliseconds; call it from a thread.
    """
    # without an address the state API looks for a cluster on this machine, and gives up where there are two
    address = ray.get_runtime_context().gcs_address
    try:
        if info.actor_id:
            actor = state.get_actor(info.actor_id, address=address, timeout=5)
            if actor is not None and actor.state == "DEAD":
                return f"its actor {info.actor_id} died"
        for job in state.list_jobs(address=address, filters=[("job_id", "=", info.ray_job_id)], timeout=5):
            if job.status in _OVER:  # of a driver that was not submitted, Ray says SUCCEEDED however it ended
                return f"its Ray job is {job.status.value}{_last_lines(job.message)}"
    except (RayStateApiException, ConnectionError, OSError) as error:
        logger.warning("Ray cannot tell about Ray job %s: %s", info.ray_job_id, error)
    return None


def submission_id(ray_job_id: str) -> str:
    """The name under which `ray job logs` knows this Ray job; empty where it was not submitted, or nobody can tell."""
    address = ray.get_runtime_context().gcs_address
    try:
        jobs: Any = state.list_jobs(address=address, filters=[("job_id", "=", ray_job_id)], timeout=5)
    except (RayStateApiException, ConnectionError, OSError):
        return ""
    return next((job.submission_id for job in jobs if job.submission_id), "")


def pending_reason() -> str | None:
    """Which actor of this Ray job has not started yet, and what it misses; None when all have, or nobody can tell."""
    context = ray.get_runtime_context()
    pending: Any = [("job_id", "=", context.get_job_id()), ("state", "=", "PENDING_CREATION")]
    try:
        actors = state.list_actors(address=context.gcs_address, filters=pending, detail=True, timeout=5)
    except (RayStateApiException, ConnectionError, OSError):
        return None
    if not actors:
        return None
    found: Any = actors[0]
    needs = dict(found.required_resources or {})
    free, total = ray.available_resources(), ray.cluster_resources()
    short = [f"{n:g} {name} ({free.get(name, 0):g} of {total.get(name, 0):g} free)" for name, n in needs.items()]
    return (
        f"the actor {found.class_name} waits to be started: it needs {', '.join(short) or 'a worker process'}; "
        "stop what holds them, add nodes, or ask for fewer"
    )


def _last_lines(message: str | None) -> str:
    """The end of a job's message, where Ray appends its log, without terminal escapes."""
    lines = re.sub(r"\x1b\[[0-9;]*m", "", message or "").strip().splitlines()
    return f" ({' | '.join(line.strip()[:200] for line in lines[-_LINES:])})" if lines else ""
