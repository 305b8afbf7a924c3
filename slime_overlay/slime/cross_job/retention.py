"""How long what every group has acked can still be had: by number, by age, by bytes. Pure functions over records.

Whatever is stated bounds what is retained; where only an age or a number of bytes is, any number of rollouts is kept.
"""

from .records import Job
from .types import Payload


def too_much(job: Job, now_wall: float) -> bool:
    """Whether the oldest of what is retained has to go."""
    if not job.done:
        return False
    if len(job.done) > _most(job):
        return True
    if job.retain_s is not None and now_wall - next(iter(job.done.values())) > job.retain_s:
        return True
    return job.retain_bytes is not None and retained_bytes(job) > job.retain_bytes


def retained_bytes(job: Job) -> int:
    """Bytes of what is acked and can be had again, wherever it lies."""
    return sum(version.payload.nbytes for r in job.done for version in job.rollouts.get(r, ()))


def in_memory(payload: Payload) -> int:
    """Bytes of this payload in the object store."""
    return payload.nbytes if payload.vault else 0


def _most(job: Job) -> float:
    if job.retain is not None:
        return job.retain
    return 0 if job.retain_s is None and job.retain_bytes is None else float("inf")
