"""What a job's operator may do to it. The ledger's part for the command line; pure state like the rest of it.

steer          any of the others, once: also where it is asked again because the answer was lost
control        pause it, let it go on, drain it
requeue        take a rollout from who holds it
discard        let a published rollout be generated anew
close_group    give up on a consumer group
"""

import heapq
from typing import Any

from .engines import Engines
from .errors import BadInput, Refused, RolloutNotFound
from .records import ANSWERS, CLAIMED, DEAD, DRAINING, FINISHED, PAUSED, PUBLISHED, RUNNING, Group, Job
from .types import check_rollout_id
from .verdicts import who

STEERING = ("control", "requeue", "discard", "close_group")


class Steering(Engines):
    """See the module."""

    def steer(self, job_id: str, token: str, operation: str, *args: Any) -> Any:
        """One of STEERING; with the same `token` again the answer is the same, and nothing else happens. Raises what
        it raises."""
        if operation not in STEERING:
            raise BadInput(f"{operation!r} is none of {', '.join(STEERING)}")
        job = self._known_job(job_id)
        if token not in job.steered:
            answer = getattr(self, operation)(job_id, *args)
            job.steered = {**dict([*job.steered.items()][-ANSWERS + 1 :]), token: answer}
        return job.steered[token]

    def control(self, job_id: str, wanted: str) -> str:
        """Pause the job (`paused`), let it go on (`running`), or drain it; returns what held before.

        Paused: nothing new is generated, what is published can be claimed. Draining: besides, the producer's stream
        ends, and the consumers' with the last published rollout; who ends then has stopped, and nothing is freed.
        """
        if wanted not in (RUNNING, PAUSED, DRAINING):
            raise BadInput(f"{wanted!r} is none of {RUNNING!r}, {PAUSED!r}, {DRAINING!r}")
        job = self._known_job(job_id)
        before, job.control = job.control, wanted
        if before != wanted:
            self._event(job, wanted, f"the job is {wanted} now; it was {before}")
        return before

    def close_group(self, job_id: str, name: str) -> list[int]:
        """A consumer group that will not come back is through: it holds nothing back any more. Returns the ids that it
        had not acked. A consumer that attaches to it later begins with what is there then.

        Raises:
            RolloutNotFound: there is no such group. Refused: a consumer of it is alive.
        """
        job = self._known_job(job_id)
        group = self._group(job, name)
        for member in self._members(group, job):
            if self._is_there(member):
                raise Refused(f"group {name!r} of job {job_id} is in use: {who(member)} is alive")
            self.end(member.info.client_id, DEAD, member.reason)
        behind = sorted(r for r in {*job.rollouts, *job.lost} if r not in group.acked)
        if group.ended is not None:
            group.ended.state, group.ended.reason = FINISHED, "its group was closed"
            self._event(job, "closed", f"group {name} was closed; it had not acked {len(behind)} rollouts")
            self._ended(job, group.ended)
        return behind

    def requeue(self, job_id: str, rollout_id: int, name: str = "train") -> str:
        """End the lease of a rollout in group `name`: it can be claimed again. Returns who held it, in words; that one
        is refused when it acks it. What is set aside is wanted again.

        Raises:
            RolloutNotFound: there is no such group. Refused: nobody holds it.
        """
        job, rollout_id = self._known_job(job_id), check_rollout_id(rollout_id)
        group = self._group(job, name)
        letter = job.dead_letters.get(rollout_id)
        if letter is not None and not letter["replaced"]:
            del job.dead_letters[rollout_id]
            job.refused = 0
            self._event(job, "requeued", "it was set aside, and is wanted again by its operator", rollout_id)
            return "dead letters"
        lease = group.leases.get(rollout_id)
        if lease is None:
            raise Refused(
                f"rollout {rollout_id} of job {job_id} is leased by nobody of group {name!r}: there is nothing to "
                "take back. What was acked is handed out again to a train job that resumes from an older checkpoint"
            )
        holder = self.clients.get(lease[0])
        held_by = who(holder) if holder is not None else "a client that ended"
        self._give_back(job, group, rollout_id)
        self._event(job, "requeued", f"taken from the {held_by}, by its operator", rollout_id)
        return held_by

    def discard(self, job_id: str, rollout_id: int, same_prompts: bool = False) -> int:
        """A published rollout goes, and is generated anew; returns its bytes.

        Args:
            same_prompts: from the prompts that it was made of, else from new ones.

        Raises:
            RolloutNotFound: it is not published. Refused: it is leased, or acked.
        """
        job, rollout_id = self._known_job(job_id), check_rollout_id(rollout_id)
        self._version(job, rollout_id, None)
        for group in job.groups.values():
            if rollout_id in group.leases:
                raise Refused(
                    f"rollout {rollout_id} of job {job_id} is leased to group {group.name!r}: take it back first "
                    "(requeue)"
                )
            if rollout_id in group.acked:
                raise Refused(
                    f"rollout {rollout_id} of job {job_id} was acked by group {group.name!r}: it has taken effect"
                )
        if rollout_id in job.dead_letters:
            job.dead_letters[rollout_id] = {**job.dead_letters[rollout_id], "replaced": True}
        nbytes = sum(version.payload.nbytes for version in job.rollouts[rollout_id])
        how = "from the same prompts" if same_prompts else "from new prompts"
        self._event(job, "discarded", f"by its operator; it is generated anew, {how}", rollout_id)
        self._discard(job, rollout_id, same_prompts, again=True)
        return nbytes

    def _give_back(self, job: Job, group: Group, rollout_id: int) -> None:
        owner, _ = group.leases.pop(rollout_id)
        if (holder := self.clients.get(owner)) is not None:
            holder.claims.pop(rollout_id, None)
        heapq.heappush(group.ready, rollout_id)
        job.requeued += 1
        self._note_lease_over(job, group, rollout_id)

    def _note_lease_over(self, job: Job, group: Group, rollout_id: int) -> None:
        """Nobody of the group holds it; which group drives the producer may have changed since it was claimed."""
        known = job.progress.get(rollout_id)
        held = any(rollout_id in g.leases for g in job.groups.values())
        claimed = known is not None and known.state == CLAIMED
        if rollout_id in job.rollouts and (self._drives(job, group.name) or (claimed and not held)):
            self._note(job, rollout_id, PUBLISHED)

    def _group(self, job: Job, name: str) -> Group:
        if name not in job.groups:
            raise RolloutNotFound(
                f"job {job.job_id} has no consumer group {name!r}; it has {', '.join(job.groups) or 'none'}"
            )
        return job.groups[name]
