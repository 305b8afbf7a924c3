"""What every group has acked: how long it can still be had, where it lies meanwhile, and how it is freed.

Whatever is stated bounds what is retained, by number, by age, by bytes; where only an age or a number of bytes is, any
number of rollouts is kept. What lies in a durable store leaves the object store at once.

A job may say that retention begins with publication where no consumer group reads it (--cross-job-retain-from): nobody
acks there. A reading (`read`) counts like an ack: retention begins anew. At a bound the oldest goes, read or not, but
never the newest; what nobody read is counted as dropped. A group that attaches gets what is there then.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from ..types import Located, LocatedValue
from .garbage import Garbage
from .history import History
from .prompts import Prompts
from .registry import Registry
from .state import ACKED, DROPPED, FREED, PUBLICATION, PUBLISHED, Job, in_memory


@dataclass(eq=False)
class Retention:
    """See the module."""

    registry: Registry
    history: History
    prompts: Prompts
    garbage: Garbage

    def expire(self) -> list[str]:
        """Free what has been acked for longer than it is retained; ids of the jobs concerned. To be called now and
        then."""
        return [job.job_id for job in self.registry.jobs.values() if job.retain_s is not None and self.make_room(job)]

    def settle(self, job: Job, rollout_ids: Iterable[int]) -> None:
        """Move those that every open group has acked towards being freed; the first of them is the oldest."""
        for rollout_id in rollout_ids:
            acked_by = [g for g in job.groups.values() if rollout_id in g.acked]
            if any(rollout_id not in g.acked for g in job.groups.values() if not g.closed):
                continue
            if not acked_by and not is_unread(job):
                continue
            if rollout_id in job.lost or rollout_id in job.rollouts:
                job.lost.discard(rollout_id)
                job.demands.discard(rollout_id)
                if rollout_id not in job.done:
                    job.done[rollout_id] = self.history.age(job)
                    known = job.progress.get(rollout_id)
                    if (
                        acked_by and known is not None and known.state != ACKED
                    ):  # by those that do not drive the producer
                        self.history.note(job, rollout_id, ACKED, acked=self.registry.wall())
                self.shed(job, rollout_id)
        self.make_room(job)

    def cover(self, job: Job, rollout_id: int) -> None:
        """Published late: groups that resumed further on have taken it before."""
        covering = [g for g in job.groups.values() if rollout_id < g.start and rollout_id not in g.acked]
        for group in covering:
            group.acked.add(rollout_id)
            job.covered += 1
        if covering:
            self.history.note(job, rollout_id, ACKED, acked=self.registry.wall())
        acked = any(rollout_id in group.acked for group in job.groups.values())  # perhaps before it was thrown away
        if (acked or is_unread(job)) and rollout_id not in job.done:
            self.settle(job, [rollout_id])

    def shed(self, job: Job, rollout_id: int) -> None:
        """Everybody has had it, and it lies in the durable store: the object store need not hold it."""
        for at, located in enumerate(versions := job.rollouts.get(rollout_id, [])):
            payload = located.payload
            if payload.stored and payload.vault:
                job.held_bytes -= payload.nbytes
                self.garbage.drops.append((payload.vault, payload.token))
                versions[at] = kept = replace(located, payload=replace(payload, vault=""))
                self.note_stored(job, kept)
                position = job.positions.get(rollout_id, -1)
                if position in job.sources and job.sources[position].token == payload.token:
                    job.sources[position] = kept.payload
                    self.garbage.drops += [(payload.vault, f"{payload.token}.source")][: payload.source_apart]

    def make_room(self, job: Job) -> bool:
        """Retention holds as far as its bounds, and that on the object store, allow. Whether anything was freed."""
        before = len(job.done)
        for rollout_id in _beyond_bounds(job, self.history.age(job)):
            self._let_go(job, rollout_id)
        if self.over_bytes(job):
            newest = [*job.done][-1:] if is_unread(job) else []
            held = [r for r in job.done if r not in newest]
            for rollout_id in [r for r in held if not all(v.payload.stored for v in job.rollouts.get(r, []))]:
                if self.over_bytes(job):
                    self._let_go(job, rollout_id)
        return len(job.done) < before

    def _let_go(self, job: Job, rollout_id: int) -> None:
        del job.done[rollout_id]
        known = job.progress.get(rollout_id)
        if is_unread(job) and known is not None and known.state == PUBLISHED and rollout_id in job.rollouts:
            job.dropped += 1
            job.skipped.add(rollout_id)
            self.history.count_bytes(job, "dropped", sum(v.payload.nbytes for v in job.rollouts[rollout_id]))
        self._free(job, rollout_id)

    def withdraw(self, job: Job, rollout_id: int) -> None:
        """Nobody can have it any more."""
        for located in job.rollouts.pop(rollout_id, []):
            job.held_bytes -= in_memory(located.payload)
            self.drop(job, located)
        job.readable.discard(rollout_id)

    def _free(self, job: Job, rollout_id: int) -> None:
        self.withdraw(job, rollout_id)
        self.gone(job, rollout_id)

    def gone(self, job: Job, rollout_id: int) -> None:
        """It is over, for everybody."""
        if rollout_id in job.progress:
            self.history.note(job, rollout_id, DROPPED if rollout_id in job.skipped else FREED)
        job.freed.add(rollout_id)
        job.demands.discard(rollout_id)
        job.again.pop(rollout_id, None)
        self.prompts.forget_position(job, rollout_id)
        for group in job.groups.values():
            group.acked.discard(rollout_id)

    @staticmethod
    def over_bytes(job: Job) -> bool:
        return job.max_bytes is not None and job.held_bytes > job.max_bytes

    def free_all(self, job: Job) -> None:
        for rollout_id in [*job.rollouts]:
            self._free(job, rollout_id)
        for source in job.sources.values():
            self.prompts.drop_source(job, source)
        for value in job.values.values():
            self.drop(job, value)
        for records in (
            *(job.done, job.values, job.lost_values, job.lost, job.again, job.sources, job.positions, job.records),
        ):
            records.clear()

    def drop(self, job: Job, record: Located | LocatedValue) -> None:
        """Its vault may free it, and so may the durable store."""
        job.over.add(record.serial)
        job.records.pop(record.serial, None)
        self.garbage.drops.append((record.payload.vault, record.payload.token))
        if record.payload.stored:
            self.garbage.store_drops.append((job.job_id, record.payload.stored))

    @staticmethod
    def note_stored(job: Job, record: Located | LocatedValue) -> None:
        if record.payload.stored:
            job.records[record.serial] = record


def is_unread(job: Job) -> bool:
    """Whether retention begins with publication, because no consumer group reads the job."""
    return job.retain_from == PUBLICATION and all(group.closed for group in job.groups.values())


def _beyond_bounds(job: Job, age: float) -> list[int]:
    """The oldest of what is retained, which have to go."""
    nbytes = 0
    if job.retain_bytes is not None:
        nbytes = sum(version.payload.nbytes for r in job.done for version in job.rollouts.get(r, ()))
    number, found = len(job.done), list[int]()
    for rollout_id, since in job.done.items():
        if number == 1 and is_unread(job):  # the newest goes with its age only
            return [*found, rollout_id] if job.retain_s is not None and age - since > job.retain_s else found
        too_many = number > _most(job)
        too_old = job.retain_s is not None and age - since > job.retain_s
        if not (too_many or too_old or (job.retain_bytes is not None and nbytes > job.retain_bytes)):
            break
        found.append(rollout_id)
        number -= 1
        nbytes -= sum(version.payload.nbytes for version in job.rollouts.get(rollout_id, ()))
    return found


def _most(job: Job) -> float:
    if job.retain is not None:
        return job.retain
    return 0 if job.retain_s is None and job.retain_bytes is None else float("inf")
