"""When a job is complete, and when it is forgotten."""

from dataclasses import dataclass

from ..errors import Refused
from .history import SMALL_AFTER_S, History
from .operations import writes
from .registry import Registry
from .retention import Retention, is_unread
from .state import FINISHED, Job
from .verdicts import who


@dataclass(eq=False)
class Lifetime:
    """See the module."""

    registry: Registry
    history: History
    retention: Retention

    def expire(self) -> list[str]:
        """As Retention.expire; a job of which nothing is left then may be complete, and one that has been for a while
        is kept small."""
        changed = self.retention.expire()
        for job_id in changed:
            self.complete_if_over(self.registry.jobs[job_id])
        over = [
            job
            for job in self.registry.jobs.values()
            if job.complete and self.history.age(job) - job.completed_s > SMALL_AFTER_S
        ]
        return [*dict.fromkeys([*changed, *(job.job_id for job in over if self.history.make_small(job))])]

    def through(self) -> dict[str, bool]:
        """Jobs that are complete, and nobody works on; True: for so long that they are to be forgotten."""
        busy = {client.info.job_id for client in self.registry.clients.values() if client.attached}
        over = [job for job in self.registry.jobs.values() if job.complete and job.job_id not in busy]
        return {job.job_id: self.history.age(job) - job.completed_s > job.forget_after_s for job in over}

    @writes(of_job=True)
    def forget(self, job_id: str) -> None:
        """Free everything a job holds and forget it. Raises Refused while a client of it is alive."""
        job = self.registry.known_job(job_id)
        self.check_forget(job)
        self.retention.free_all(job)
        del self.registry.jobs[job_id]
        self.history.spans.pop(job_id, None)
        self.registry.clients = {k: c for k, c in self.registry.clients.items() if c.info.job_id != job_id}

    def check_forget(self, job: Job) -> None:
        """Raises Refused while a client of this job is alive."""
        if alive := self.registry.living_of(job.job_id):
            raise Refused(f"job {job.job_id} is in use: {who(alive[0])} is alive")

    def complete_if_over(self, job: Job) -> None:
        over = job.producer is not None and job.producer.state == FINISHED
        if not over or not all(g.closed for g in job.groups.values()):
            return
        nothing_left = not job.rollouts and not self.registry.living_of(job.job_id)
        if nothing_left if is_unread(job) else job.groups:
            self.retention.free_all(job)
            if not job.complete:
                job.complete, job.completed_s = True, self.history.age(job)
            for client in [job.producer, *(group.last for group in job.groups.values())]:
                if client is not None and not client.attached:
                    client.answered.clear()
