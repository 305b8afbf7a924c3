"""What is generated next, and what holds it back: demands, bounds, staleness, and what is set aside.

A method that finds nothing *yet* returns None, and `held_back` says why.
"""

import logging
from dataclasses import dataclass
from typing import Any

from ..errors import EndOfStream, Poisoned, RolloutNotFound
from ..types import MOST_REASON, check_rollout_id, ids_text, shortened
from .history import History
from .membership import Membership
from .operations import writes
from .prompts import Prompts
from .registry import Registry
from .retention import Retention
from .rollouts import Rollouts
from .state import (
    ACKED,
    CLAIMED,
    DEMANDED,
    DRAINING,
    DROP,
    FINISHED,
    GENERATING,
    PAUSED,
    PUBLISHED,
    SKIP,
    STOP,
    WAIT,
    Group,
    Job,
    is_full,
)
from .verdicts import set_aside

logger = logging.getLogger(__name__)

_CRASHES = 3  # of train jobs in a row on the same rollout, after which it is set aside; and of rollouts, see set_aside
_LETTERS = 100  # of those that were replaced, how many are remembered


@dataclass(eq=False)
class Pacing:
    """See the module."""

    registry: Registry
    history: History
    prompts: Prompts
    retention: Retention
    membership: Membership
    rollouts: Rollouts

    @writes()
    def demand(self, client_id: str, rollout_id: int) -> None:
        """Ask that `rollout_id` be generated. Demanding what is published already is no error.

        Raises:
            RolloutNotFound: it was acked and freed. Poisoned: it is set aside.
        """
        client = self.registry.live(client_id, "consumer")
        job, rollout_id = self.registry.jobs[client.info.job_id], check_rollout_id(rollout_id)
        if rollout_id in job.freed:
            raise RolloutNotFound(f"rollout {rollout_id} of job {job.job_id} was acked and freed")
        self.unless_set_aside(job, rollout_id)
        job.groups[client.info.group].demanded = True
        job.last_demanded = max(job.last_demanded, rollout_id)
        if rollout_id not in job.rollouts and rollout_id not in job.done:
            job.demands.add(rollout_id)
        known = job.progress.get(rollout_id)
        if known is None or known.state not in (GENERATING, PUBLISHED, CLAIMED, ACKED):
            self.history.note(job, rollout_id, DEMANDED, demanded=self.registry.wall())
        elif not known.demanded:
            self.history.note(job, rollout_id, demanded=self.registry.wall())

    @writes()
    def next_demand(
        self,
        client_id: str,
        start: int | None = None,
        until: int | None = None,
        grace_s: float = 0.0,
        gated: bool = False,
    ) -> int | None:
        """Which rollout the producer should generate next; None: nothing is wanted yet.

        First whatever was demanded and is not published, then up to `max_ahead` rollouts beyond the last demanded.
        Before any demand, going ahead needs `start`; ids from `until` on are not generated.

        Args:
            gated: it generates with engines that the consumers load weights into: nothing is handed out while their
                weights are unknown or change (see gate.py). The consumers' own `until` holds, once they said one, and
                what they demand is generated, whatever `until` is. Nor does reaching it end the stream, because the
                engines are still needed: only the consumers' end does.

        Raises:
            EndOfStream: the consumers finished, `until` is reached, or the job is drained. PeerFailed: they failed.
            Poisoned: what is wanted is set aside.
        """
        client = self.registry.live(client_id, "producer")
        job = self.registry.jobs[client.info.job_id]
        if job.control == DRAINING:
            raise EndOfStream(f"job {job.job_id} is being drained: what is out is finished, nothing new is generated")
        if gated:
            job.gate.producer_is(client.attached_as)
        found = self._next_wanted(job, start, until, gated)
        if found is not None:
            self.unless_set_aside(job, found)
            if gated:
                job.gate.generating = found
            if found not in job.handed or client.waited_s:  # else the same call again, whose answer was lost
                self.history.note(
                    job, found, GENERATING, begun=self.registry.wall(), producer_waited_s=client.waited_s
                )
                client.waited_s = 0.0
            job.handed[found] = (job.weights_now, job.resumed)
            return found
        drivers = self.drivers(job)
        left = [self.registry.left(group, job) for group in drivers]
        if left and None not in left:
            broken = [member for member in left if member is not None and member.state != FINISHED]
            if not broken:
                raise EndOfStream(f"job {job.job_id}: the consumers finished, nothing more is wanted")
            self.membership.raise_peer(max(broken, key=self.registry.ended_at), grace_s)
        return None

    @writes()
    def training(self, client_id: str, rollout_id: int | None) -> None:
        """This consumer trains on a rollout from now on; None: on none. What ends one train job after the other is set
        aside, see `--cross-job-on-poison`; whoever trains on a later one has passed those before."""
        client = self.registry.live(client_id, "consumer")
        job = self.registry.jobs[client.info.job_id]
        client.training = None if rollout_id is None else check_rollout_id(rollout_id)
        if client.training is not None:
            job.crashes = {r: number for r, number in job.crashes.items() if r >= client.training}

    @writes()
    def set_aside(self, client_id: str, rollout_id: int, reason: str) -> str:
        """What the producer generated as `rollout_id` cannot be published for what it holds. Returns `stop` or `skip`:
        it is wanted again, from new prompts. The third in a row is a `stop`, whatever the job says."""
        client = self.registry.live(client_id, "producer")
        job, rollout_id = self.registry.jobs[client.info.job_id], check_rollout_id(rollout_id)
        letter = job.dead_letters.get(rollout_id)
        if job.handed.pop(rollout_id, None) is None and letter is not None:
            return STOP if letter["stuck"] else job.on_poison  # the same call again, whose answer was lost
        if job.gate.generating == rollout_id:
            job.gate.generating = None
        job.refused += 1
        stuck = job.refused >= _CRASHES
        self._set_aside(job, rollout_id, f"it cannot be published: {reason}", stuck)
        self.rollouts.note_open(job, rollout_id)
        return STOP if stuck else job.on_poison

    def held_back(self, job: Job) -> dict[str, Any] | None:
        """Why nothing at all is generated although the producer lives, as a verdict; None: nothing holds it back."""
        if job.control == PAUSED:
            return _verdict("paused", f"job {job.job_id} is paused: nothing is generated until it is resumed")
        if is_full(job):
            held = sorted(set(job.rollouts) - set(job.done))
            behind = [g.name for g in job.groups.values() if not g.closed and any(r not in g.acked for r in held)]
            waiting = ", ".join(behind)
            what = f"{job.held_bytes} bytes of {ids_text(held)} are not acked by {waiting or 'anybody'}"
            cure = f"save checkpoints more often, or raise --cross-job-max-bytes {job.max_bytes}"
            return _verdict("full", f"the producer waits for room: {what}: {cure}")
        return None

    def idle(self, job: Job) -> str:
        """Why nothing more is generated for now, in words; empty where something is wanted."""
        gate, last = job.gate, job.last_demanded
        following = max(last, job.ever.last()) + 1
        if gate.engines and not gate.open:
            return f"nothing is generated now: {gate.unknown}"
        if job.demands:
            return ""
        if last >= 0 and following <= last + job.max_ahead and self.too_early(job, following):
            return (
                f"rollout {following} waits for newer weights than {job.weights_now}, "
                f"because of --cross-job-max-staleness {job.max_staleness}"
            )
        under_way = any(r not in job.rollouts for r in job.handed)
        if under_way or (last >= 0 and following <= last + job.max_ahead):
            return ""
        if last < 0:
            return "no rollout was demanded yet"
        return f"no rollout beyond {last} was demanded, and --cross-job-max-ahead is {job.max_ahead}"

    def crashed_in(self, job: Job, rollout_id: int, reason: str) -> None:
        job.crashes[rollout_id] = number = job.crashes.get(rollout_id, 0) + 1
        if number >= _CRASHES:
            words = f"{number} train jobs in a row ended while they trained on it, the last one: {reason}"
            before = job.dead_letters.get(rollout_id)
            replacement = before is not None and before["version"] > 0  # of one that was published and trained on, too
            if replacement:  # then it is not the rollout's fault
                words += ". So did those that trained on the rollout which it replaces: look for the cause elsewhere"
            self._set_aside(job, rollout_id, words, stuck=replacement)

    def unless_set_aside(self, job: Job, rollout_id: int) -> None:
        """Raise Poisoned where it is; with `skip` see that it is generated anew."""
        letter = job.dead_letters.get(rollout_id)
        if letter is None or letter["replaced"]:
            return
        if job.on_poison != SKIP or letter["stuck"]:
            raise Poisoned(set_aside(job, rollout_id))
        job.dead_letters[rollout_id] = {**letter, "replaced": True}
        if rollout_id in job.rollouts:
            self.discard(job, rollout_id, same_prompts=False, again=True)

    def drivers(self, job: Job) -> list[Group]:
        """The groups that the producer works for: those that demand, or all where nobody does."""
        return [g for g in job.groups.values() if g.demanded] or [*job.groups.values()]

    def drives(self, job: Job, group: str) -> bool:
        """Whether the producer works for this group."""
        return job.groups[group].demanded or not any(g.demanded for g in job.groups.values())

    def too_early(self, job: Job, rollout_id: int) -> bool:
        """Whether the newest weights would be too old for `rollout_id`, which is trained on by weights of that number.

        Asked for what is generated ahead: what is demanded is trained on next, whatever the newest weights are.
        """
        now = job.weights_now
        if job.on_stale != WAIT or job.max_staleness is None or now is None:
            return False
        return rollout_id - now > job.max_staleness

    def is_stale(self, job: Job, rollout_id: int) -> bool:
        """Whether what is published as `rollout_id` was generated by weights that are too old by now."""
        now, made = job.weights_now, job.rollouts[rollout_id][-1].payload.made_by
        if job.on_stale == WAIT or job.max_staleness is None or now is None or made is None:
            return False
        return now - made > job.max_staleness

    def give_up_stale(self, job: Job, rollout_id: int, again: bool) -> None:
        """Discard a rollout that is too stale; `again`: it is generated anew, else nobody gets it."""
        made, now = job.rollouts[rollout_id][-1].payload.weight_version, job.weights_now
        logger.warning(
            "job %s: rollout %d, generated by weights %s, is too stale at weights %s: %s",
            *(job.job_id, rollout_id, made, now, "dropped" if job.on_stale == DROP else "it is generated again"),
        )
        kind = "dropped" if job.on_stale == DROP else "regenerated"
        self.history.event(job, kind, f"generated by weights {made}, too stale at weights {now}", rollout_id)
        self.discard(job, rollout_id, same_prompts=job.on_stale != DROP, again=again)

    def discard(self, job: Job, rollout_id: int, same_prompts: bool, again: bool) -> None:
        """Nobody gets what is published as `rollout_id`; `again`: it is generated anew."""
        self.history.count_bytes(job, "dropped", sum(v.payload.nbytes for v in job.rollouts[rollout_id]))
        self.retention.withdraw(job, rollout_id)
        if same_prompts:
            job.regenerated += 1
        else:
            job.dropped += 1
            self.prompts.forget_position(job, rollout_id)
        if again:
            job.demands.add(rollout_id)
            self.history.note(job, rollout_id, DEMANDED)
        else:
            for group in job.groups.values():
                if group.leases.pop(rollout_id, None) is not None:
                    job.requeued += 1
            job.skipped.add(rollout_id)
            self.retention.gone(job, rollout_id)

    def _set_aside(self, job: Job, rollout_id: int, reason: str, stuck: bool = False) -> None:
        newest = job.rollouts[rollout_id][-1] if rollout_id in job.rollouts else None
        job.crashes.pop(rollout_id, None)
        job.dead_letters.pop(rollout_id, None)
        job.dead_letters[rollout_id] = {
            **{
                "reason": shortened(reason, MOST_REASON),
                "at": self.registry.wall(),
                "replaced": False,
                "stuck": stuck,
            },
            "version": 0 if newest is None else newest.version,
            "weight_version": None if newest is None else newest.payload.made_by,
            "nbytes": 0 if newest is None else newest.payload.nbytes,
        }
        for old in [r for r, letter in job.dead_letters.items() if letter["replaced"]][:-_LETTERS]:
            del job.dead_letters[old]
        logger.error("job %s: rollout %d is set aside: %s", job.job_id, rollout_id, reason)
        self.history.event(job, "set aside", reason, rollout_id)
        if job.on_poison == SKIP and not stuck:
            self.unless_set_aside(job, rollout_id)

    def _next_wanted(self, job: Job, start: int | None, until: int | None, gated: bool) -> int | None:
        gate = job.gate
        if gated and gate.generating is not None:
            return gate.generating  # the same call again, whose answer was lost
        if job.control == PAUSED or (gated and not gate.open) or is_full(job):
            return None
        until = gate.until if gated and gate.until is not None else until
        wanted = [r for r in job.demands if gated or until is None or r < until]
        if wanted:
            return min(wanted)
        last = job.last_demanded if job.last_demanded >= 0 else (None if start is None else start - 1)
        if last is None:
            return None
        ahead = max(last, job.ever.last()) + 1
        if until is not None and ahead >= until:
            if gated:
                return None
            raise EndOfStream(f"job {job.job_id}: {until - 1} is the last rollout, nothing more is generated")
        # while somebody waits to update the weights, only what he waits for is begun
        allowed = min(job.max_ahead, 1) if gated and gate.wanted_by else job.max_ahead
        if ahead > last + allowed:
            return None
        if self.too_early(job, ahead):
            if job.early != ahead:
                job.early, job.delayed = ahead, job.delayed + 1
                logger.info("job %s: %s", job.job_id, self.idle(job))
            return None
        return ahead


def _verdict(kind: str, message: str) -> dict[str, Any]:
    return {"kind": kind, "message": message}
