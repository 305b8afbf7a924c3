"""Asking Ray whether a client can still be alive: its process, its actor, its Ray job. Public state API only.

What follows from the answer is decided in actor.py (`_is_over`) and membership.py.
"""

import asyncio
import contextlib
import logging
import os
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray
from ray.util import state
from ray.util.state.exception import RayStateApiException

from ..types import ClientInfo, shortened

logger = logging.getLogger(__name__)

_OVER = ("SUCCEEDED", "STOPPED", "FAILED")
_LINES = 3
_JOB_KNOWN_S = 8.0  # after which Ray knows how the job of a process that died has ended, if it has
_THREADS = ThreadPoolExecutor(32, "ask-ray")  # of their own: a dashboard that hangs holds up nothing else
JOB_IS = "its Ray job is "
_FIRST = "RAY_API_SERVER_ADDRESS"  # what the state API looks at before all else
_lock = threading.Lock()
_asking: list[str | None] = []  # what stood there before, for each who asks now


@contextlib.contextmanager
def this_cluster() -> Iterator[str]:
    """In this block Ray's state API asks the cluster of this process, whose address is what `with` gives.

    It prefers RAY_API_SERVER_ADDRESS and RAY_ADDRESS to its argument; where these name another cluster, a job of that
    one that has the same id would be taken for ours. Changes this process's environment for as long.
    """
    # without an address the state API looks for a cluster on this machine, and gives up where there are two
    address = ray.get_runtime_context().gcs_address
    with _lock:
        _asking.append(_asking[0] if _asking else os.environ.get(_FIRST))
        os.environ[_FIRST] = address
    try:
        yield address
    finally:
        with _lock:
            before = _asking.pop()
            if not _asking and before is None:
                os.environ.pop(_FIRST, None)
            elif not _asking and before is not None:
                os.environ[_FIRST] = before


async def ask_ray(function: Callable[..., Any], *args: Any) -> Any:
    """Call one of the functions below in a thread for that."""
    return await asyncio.get_running_loop().run_in_executor(_THREADS, function, *args)


def over_reason(info: ClientInfo, silent_s: float = 0.0) -> str | None:
    """Why the client cannot be alive any more, in words. Empty: Ray calls it alive; None: nobody can tell.

    A process that died, in a job that runs on (a script that started it), counts from some seconds of silence on: Ray
    knows a little later how a job ended.

    Blocks for some tens of milliseconds; call it by `ask_ray`.
    """
    reasons = []
    try:
        lives = _process_lives(info)
        if info.node_id in {node["NodeID"] for node in ray.nodes() if not node["Alive"]}:
            reasons.append(f"its node {info.node_id[:8]} ({info.host}) died")
        if info.actor_id:
            with this_cluster() as address:
                actor = state.get_actor(info.actor_id, address=address, timeout=5)
            if actor is not None and actor.state == "DEAD":
                reasons.append(f"its actor {info.actor_id} died")
        found = job_words(info.ray_job_id)
        if found is not None and (reasons or found[0] in _OVER):
            reasons.append(found[1])
        elif lives is False and silent_s > _JOB_KNOWN_S:
            reasons = [f"its process {info.pid} on {info.host} died", *([found[1]] if found else [])]
    except (RayStateApiException, ConnectionError, OSError) as error:
        logger.warning("Ray cannot tell about Ray job %s: %s", info.ray_job_id, error)
        return "; ".join(reasons) or None
    if reasons:
        return "; ".join(reasons)
    return "" if lives or (lives is None and found is not None) else None


def job_words(ray_job_id: str) -> tuple[str, str] | None:
    """(status, the same in words with the last lines of its log where it is over) of a Ray job; None: Ray does not
    know it. Blocks for some tens of milliseconds. Raises what the state API raises where it is not there."""
    for job in _jobs(ray_job_id):
        # of a driver that was not submitted, Ray says SUCCEEDED however it ended
        status = str(job.status.value)
        return status, f"{JOB_IS}{status}{_last_lines(job.message) if status in _OVER else ''}"
    return None


def actor_words(name: str, namespace: str) -> str:
    """How Ray sees a named actor, in words; blocks for two seconds at most."""
    named: Any = [("name", "=", name), ("ray_namespace", "=", namespace)]
    try:
        with this_cluster() as address:
            found = [a for a in state.list_actors(address=address, filters=named, timeout=2) if a.state != "DEAD"]
        if not found:
            return "Ray calls it dead: see `ray list actors`"
        actor = found[-1]
        hosts = {node["NodeID"]: node["NodeManagerHostname"] for node in ray.nodes()}
        where = f"pid {actor.pid} on node {str(actor.node_id)[:8]}, {hosts.get(actor.node_id, '?')}"
        if actor.state != "ALIVE":
            return f"Ray calls it {actor.state}: it may be waiting for a free worker process"
        return f"Ray calls it alive ({where}): its process may be stopped, or its machine overloaded"
    except (RayStateApiException, ConnectionError, OSError):
        return "Ray's dashboard cannot tell how it stands"


def is_over(words: str) -> bool:
    """Whether these words tell of a Ray job that is over."""
    return any(f"{JOB_IS}{status}" in words for status in _OVER)


def submission_id(ray_job_id: str) -> str:
    """The name under which `ray job logs` knows this Ray job; empty where it was not submitted, or nobody can tell."""
    try:
        return next((job.submission_id for job in _jobs(ray_job_id) if job.submission_id), "")
    except (RayStateApiException, ConnectionError, OSError):
        return ""


def _process_lives(info: ClientInfo) -> bool | None:
    """None: Ray does not know the process."""
    here: Any = [("pid", "=", info.pid), ("node_id", "=", info.node_id)]
    with this_cluster() as address:
        known = [worker.is_alive for worker in state.list_workers(address=address, filters=here, timeout=5)]
    return any(known) if known else None


def _jobs(ray_job_id: str) -> Any:
    with this_cluster() as address:
        return state.list_jobs(address=address, filters=[("job_id", "=", ray_job_id)], timeout=5)


def _last_lines(message: str | None) -> str:
    """The end of a job's message, where Ray appends its log, without terminal escapes."""
    lines = re.sub(r"\x1b\[[0-9;]*m", "", message or "").strip().splitlines()
    return f" ({' | '.join(shortened(line.strip(), 200) for line in lines[-_LINES:])})" if lines else ""
