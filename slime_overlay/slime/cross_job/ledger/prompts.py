"""Where the producer's source of prompts stands: the n-th generation began where the one before it ended. So a rollout
can be generated again from the same prompts, and a producer goes on without skipping any.
"""

from dataclasses import dataclass

from ..errors import PayloadLost
from ..types import Payload, check_rollout_id, source_name
from .garbage import Garbage
from .operations import reads
from .registry import Registry
from .state import Job


@dataclass(eq=False)
class Prompts:
    """See the module."""

    registry: Registry
    garbage: Garbage

    @reads()
    def source_before(self, client_id: str, rollout_id: int) -> tuple[int, Payload | None]:
        """(n, payload that tells where the source of prompts stood) before the generation of `rollout_id`, the n-th.

        What is generated again begins where it began the first time; anything else where the newest one ended. None:
        at the source's own beginning, or nobody said where it ended.

        Raises:
            PayloadLost: it was said, but is lost.
        """
        job = self.registry.jobs[self.registry.live(client_id, "producer").info.job_id]
        if job.gap and job.tells_source:
            raise PayloadLost(
                f"the last changes of job {job.job_id} went with vaults that died or were given up: where its "
                "source of prompts stood is not known. Start the train job again from a checkpoint that knows it, or "
                "begin anew under another --job-id"
            )
        position = job.positions.get(check_rollout_id(rollout_id), job.frontier + 1)
        before = job.sources.get(position - 1)
        if before is None and position > 0 and job.tells_source:
            raise PayloadLost(
                f"where the source of prompts stood before rollout {rollout_id} of job {job.job_id} is lost, with all "
                "vaults that kept it: begin anew under another --job-id, from a checkpoint that knows it"
            )
        return position, before

    def drop_source(self, job: Job, source: Payload) -> None:
        if source.source_apart:
            self.garbage.drops.append((source.vault, f"{source.token}.source"))
            if source.stored:
                self.garbage.store_drops.append((job.job_id, source_name(source.stored)))

    def take_source(self, job: Job, source: Payload | None, begins: bool) -> None:
        """A consumer resumed from a checkpoint that says where the source stood (None: it does not, or `begins`: it is
        the beginning of the run). Where something was published, what the producer said counts, unless the broker's
        memory of that has a gap; else what the newest checkpoint says."""
        if job.ever and job.frontier >= 0 and not job.gap:
            if source is not None:
                self.drop_source(job, source)
            return
        if source is None and (job.gap or not begins):
            return
        for known in job.sources.values():
            self.drop_source(job, known)
        job.positions.clear()
        job.sources.clear()
        job.frontier, job.tells_source, job.gap = -1, False, False
        if source is not None:
            job.frontier, job.tells_source = 0, True
            job.sources[0] = source

    def take_position(self, job: Job, rollout_id: int, payload: Payload) -> None:
        if rollout_id not in job.positions:
            job.frontier += 1
            job.positions[rollout_id] = job.frontier
        position = job.positions[rollout_id]
        old = job.sources.get(position)
        if old is not None:
            self.drop_source(job, old)
        job.tells_source = job.tells_source or payload.source is not None or payload.source_apart
        self._note_source(job, position, payload)

    def _note_source(self, job: Job, position: int, payload: Payload) -> None:
        if position == job.frontier or position + 1 in job.positions.data.values():  # something begins there
            job.sources[position] = payload
        else:
            job.sources.pop(position, None)
            self.drop_source(job, payload)

    def forget_position(self, job: Job, rollout_id: int) -> None:
        """This rollout is never generated from these prompts again: nobody needs to know where they began."""
        position = job.positions.pop(rollout_id, None)
        before = None if position is None else job.sources.pop(position - 1, None)
        if before is not None:
            self.drop_source(job, before)
