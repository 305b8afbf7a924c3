"""What a job's operator may do to it.

steer          any of those below, once: also where it is asked again because the answer was lost
foresee        what it would answer, or raise; changes nothing
control        pause it, let it go on, drain it
requeue        take a rollout from who holds it
discard        let a published rollout be generated anew
close_group    give up on a consumer group
"""

from dataclasses import dataclass
from typing import Any

from ..errors import BadInput, Refused
from ..types import check_rollout_id
from .history import History
from .leases import Leases
from .lifetime import Lifetime
from .membership import Membership
from .operations import reads, writes
from .pacing import Pacing
from .registry import Registry
from .rollouts import Rollouts
from .state import ANSWERS, DEAD, DRAINING, FINISHED, PAUSED, RUNNING, Group, Job
from .verdicts import who

STEERING = ("control", "requeue", "discard", "close_group")
SET_ASIDE = "dead letters"
"""In the place of a holder: the rollout is set aside."""


@dataclass(eq=False)
class Operator:
    """See the module."""

    registry: Registry
    history: History
    membership: Membership
    rollouts: Rollouts
    pacing: Pacing
    leases: Leases
    lifetime: Lifetime

    @writes(of_job=True)
    def steer(self, job_id: str, token: str, operation: str, *args: Any) -> Any:
        """One of STEERING; with the same `token` again the answer is the same, and nothing else happens. Raises what
        it raises."""
        if operation not in STEERING:
            raise BadInput(f"{operation!r} is none of {', '.join(STEERING)}")
        job = self.registry.known_job(job_id)
        if token not in job.steered:
            answer = getattr(self, operation)(job_id, *args)
            job.steered = {**dict([*job.steered.items()][-ANSWERS + 1 :]), token: answer}
        return job.steered[token]

    @reads(of_job=True)
    def foresee(self, job_id: str, operation: str, *args: Any) -> Any:
        """What one of STEERING, or Lifetime.forget, would answer now. Raises what it would raise; changes nothing."""
        job = self.registry.known_job(job_id)
        if operation == "forget":
            return self.lifetime.check_forget(job)
        if operation not in STEERING:
            raise BadInput(f"{operation!r} is none of {', '.join(STEERING)}")
        return getattr(self, f"_foresee_{operation}")(job, *args)

    @writes(of_job=True)
    def control(self, job_id: str, wanted: str) -> str:
        """Pause the job (`paused`), let it go on (`running`), or drain it; returns what held before.

        Paused: nothing new is generated, what is published can be claimed. Draining: besides, the producer's stream
        ends, and the consumers' with the last published rollout; who ends then has stopped, and nothing is freed.
        """
        job = self.registry.known_job(job_id)
        before = self._foresee_control(job, wanted)
        job.control = wanted
        if before != wanted:
            self.history.event(job, wanted, f"the job is {wanted} now; it was {before}")
        return before

    def _foresee_control(self, job: Job, wanted: str) -> str:
        if wanted not in (RUNNING, PAUSED, DRAINING):
            raise BadInput(f"{wanted!r} is none of {RUNNING!r}, {PAUSED!r}, {DRAINING!r}")
        return job.control

    @writes(of_job=True)
    def close_group(self, job_id: str, name: str) -> list[int]:
        """A consumer group that will not come back is through: it holds nothing back any more. Returns the ids that it
        had not acked. A consumer that attaches to it later begins with what is there then.

        Raises:
            GroupNotFound: there is no such group. Refused: a consumer of it is alive.
        """
        job = self.registry.known_job(job_id)
        self._foresee_close_group(job, name)
        group = job.groups[name]
        for member in self.registry.members(group, job):
            self.membership.end(member.info.client_id, DEAD, member.reason)
        behind = _behind(job, group)
        if group.ended is not None:
            group.ended.state, group.ended.reason = FINISHED, "its group was closed"
            self.history.event(job, "closed", f"group {name} was closed; it had not acked {len(behind)} rollouts")
            self.leases.ended(job, group.ended)
        return behind

    def _foresee_close_group(self, job: Job, name: str) -> list[int]:
        group = self.leases.group(job, name)
        for member in self.registry.members(group, job):
            if self.registry.is_there(member):
                raise Refused(f"group {name!r} of job {job.job_id} is in use: {who(member)} is alive")
        return _behind(job, group)

    @writes(of_job=True)
    def requeue(self, job_id: str, rollout_id: int, name: str = "train") -> str:
        """End the lease of a rollout in group `name`: it can be claimed again. Returns who held it, in words; that one
        is refused when it acks it. What is set aside is wanted again.

        Raises:
            GroupNotFound: there is no such group. Refused: nobody holds it.
        """
        job, rollout_id = self.registry.known_job(job_id), check_rollout_id(rollout_id)
        held_by = self._foresee_requeue(job, rollout_id, name)
        if held_by == SET_ASIDE:
            del job.dead_letters[rollout_id]
            job.refused = 0
            self.history.event(job, "requeued", "it was set aside, and is wanted again by its operator", rollout_id)
            return held_by
        self.leases.give_back(job, job.groups[name], rollout_id)
        self.history.event(job, "requeued", f"taken from the {held_by}, by its operator", rollout_id)
        return held_by

    def _foresee_requeue(self, job: Job, rollout_id: int, name: str = "train") -> str:
        group = self.leases.group(job, name)
        letter = job.dead_letters.get(check_rollout_id(rollout_id))
        if letter is not None and not letter["replaced"]:
            return SET_ASIDE
        lease = group.leases.get(rollout_id)
        if lease is None:
            raise Refused(
                f"rollout {rollout_id} of job {job.job_id} is leased by nobody of group {name!r}: there is nothing to "
                "take back. What was acked is handed out again to a train job that resumes from an older checkpoint"
            )
        holder = self.registry.clients.get(lease[0])
        return who(holder) if holder is not None else "a client that ended"

    @writes(of_job=True)
    def discard(self, job_id: str, rollout_id: int, same_prompts: bool = False) -> int:
        """A published rollout goes, and is generated anew; returns its bytes.

        Args:
            same_prompts: from the prompts that it was made of, else from new ones.

        Raises:
            RolloutNotFound: it is not published. Refused: it is leased, or acked.
        """
        job, rollout_id = self.registry.known_job(job_id), check_rollout_id(rollout_id)
        nbytes = self._foresee_discard(job, rollout_id)
        if rollout_id in job.dead_letters:
            job.dead_letters[rollout_id] = {**job.dead_letters[rollout_id], "replaced": True}
        how = "from the same prompts" if same_prompts else "from new prompts"
        self.history.event(job, "discarded", f"by its operator; it is generated anew, {how}", rollout_id)
        self.pacing.discard(job, rollout_id, same_prompts, again=True)
        return nbytes

    def _foresee_discard(self, job: Job, rollout_id: int, same_prompts: bool = False) -> int:
        self.rollouts.version(job, check_rollout_id(rollout_id), None)
        for group in job.groups.values():
            if rollout_id in group.leases:
                raise Refused(
                    f"rollout {rollout_id} of job {job.job_id} is leased to group {group.name!r}: take it back first "
                    "(requeue)"
                )
            if rollout_id in group.acked:
                raise Refused(
                    f"rollout {rollout_id} of job {job.job_id} was acked by group {group.name!r}: it has taken effect"
                )
        return sum(version.payload.nbytes for version in job.rollouts[rollout_id])


def _behind(job: Job, group: Group) -> list[int]:
    """What it has not acked."""
    return sorted(r for r in {*job.rollouts, *job.lost} if r not in group.acked)
