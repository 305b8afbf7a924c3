"""Asking Ray whether a client can still be alive: its Ray job, its actor. Public state API only."""

import logging
import re

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


def _last_lines(message: str | None) -> str:
    """The end of a job's message, where Ray appends its log, without terminal escapes."""
    lines = re.sub(r"\x1b\[[0-9;]*m", "", message or "").strip().splitlines()
    return f" ({' | '.join(line.strip()[:200] for line in lines[-_LINES:])})" if lines else ""
