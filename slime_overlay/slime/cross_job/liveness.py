"""Asking Ray whether a client can still be alive: its Ray job, its actor, its node. Public state API only."""

import logging

from ray.util import state
from ray.util.state.exception import RayStateApiException

from .types import ClientInfo

logger = logging.getLogger(__name__)

_OVER = ("SUCCEEDED", "STOPPED", "FAILED")


def over_reason(info: ClientInfo) -> str | None:
    """Why the client cannot be alive any more, in words; None when it may live or nobody can tell (no dashboard).

    Blocks for some tens of milliseconds; call it from a thread.
    """
    try:
        if info.actor_id:
            actor = state.get_actor(info.actor_id, timeout=5)
            if actor is not None and actor.state == "DEAD":
                return f"its actor {info.actor_id} died"
        for job in state.list_jobs(timeout=5, limit=10_000):
            if job.job_id == info.ray_job_id and job.status in _OVER:
                return f"its Ray job is {job.status}" + (f": {job.message}" if job.message else "")
    except (RayStateApiException, ConnectionError, OSError) as error:
        logger.info("Ray cannot tell about Ray job %s: %s", info.ray_job_id, error)
    return None
