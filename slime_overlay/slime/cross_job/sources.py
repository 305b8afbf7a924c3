"""Where the producer's source of prompts stands: the n-th generation began where the one before it ended. The ledger's
part that lets a rollout be generated again from the same prompts, and a producer go on without skipping any.

Pure state like the rest of the ledger.
"""

import time
from collections.abc import Callable

from .errors import PayloadLost
from .records import Job
from .roster import Roster
from .types import Payload, check_rollout_id, source_name


class Sources(Roster):
    """See the module."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time):
        super().__init__(clock, wall)
        self._drops: list[tuple[str, str]] = []
        self._store_drops: list[tuple[str, str]] = []

    def source_before(self, client_id: str, rollout_id: int) -> tuple[int, Payload | None]:
        """(n, payload that tells where the source of prompts stood) before the generation of `rollout_id`, the n-th.

        What is generated again begins where it began the first time; anything else where the newest one ended. None:
        at the source's own beginning, or nobody said where it ended.

        Raises:
            PayloadLost: it was said, but is lost.
        """
        job = self.jobs[self._live(client_id, "producer").info.job_id]
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

    def take_drops(self) -> list[tuple[str, str]]:
        """(vault, token) of payloads that nobody can ask for any more; each is told once."""
        drops, self._drops = self._drops, []
        return [(vault, token) for vault, token in drops if vault]  # what no vault holds needs no telling

    def take_store_drops(self) -> list[tuple[str, str]]:
        """(job id, name) of what may be freed in durable stores; each is told once."""
        drops, self._store_drops = self._store_drops, []
        return drops

    def _drop_source(self, job: Job, source: Payload) -> None:
        if source.source_apart:
            self._drops.append((source.vault, f"{source.token}.source"))
            if source.stored:
                self._store_drops.append((job.job_id, source_name(source.stored)))

    def _take_source(self, job: Job, source: Payload | None, begins: bool) -> None:
        """A consumer resumed from a checkpoint that says where the source stood (None: it does not, or `begins`: it is
        the beginning of the run). Where something was published, what the producer said counts, unless the broker's
        memory of that has a gap; else what the newest checkpoint says."""
        if job.ever and job.frontier >= 0 and not job.gap:
            if source is not None:
                self._drop_source(job, source)
            return
        if source is None and (job.gap or not begins):
            return
        for known in job.sources.values():
            self._drop_source(job, known)
        job.positions.clear()
        job.sources.clear()
        job.frontier, job.tells_source, job.gap = -1, False, False
        if source is not None:
            job.frontier, job.tells_source = 0, True
            job.sources[0] = source

    def _take_position(self, job: Job, rollout_id: int, payload: Payload) -> None:
        if rollout_id not in job.positions:
            job.frontier += 1
            job.positions[rollout_id] = job.frontier
        position = job.positions[rollout_id]
        old = job.sources.get(position)
        if old is not None:
            self._drop_source(job, old)
        job.tells_source = job.tells_source or payload.source is not None or payload.source_apart
        self._note_source(job, position, payload)

    def _note_source(self, job: Job, position: int, payload: Payload) -> None:
        if position == job.frontier or position + 1 in job.positions.data.values():  # something begins there
            job.sources[position] = payload
        else:
            job.sources.pop(position, None)
            self._drop_source(job, payload)

    def _forget_position(self, job: Job, rollout_id: int) -> None:
        """This rollout is never generated from these prompts again: nobody needs to know where they began."""
        position = job.positions.pop(rollout_id, None)
        before = None if position is None else job.sources.pop(position - 1, None)
        if before is not None:
            self._drop_source(job, before)
