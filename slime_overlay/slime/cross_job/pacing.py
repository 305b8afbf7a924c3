"""What is generated next, and what holds it back. The ledger's part for producers.

Pure state like the rest of the ledger: a method that finds nothing *yet* returns None, and `held_back` says why.
"""

import logging
from typing import Any

from .errors import EndOfStream, RolloutNotFound
from .records import (
    ACKED,
    CLAIMED,
    DEMANDED,
    DRAINING,
    DROP,
    FINISHED,
    GENERATING,
    PAUSED,
    PUBLISHED,
    WAIT,
    Group,
    Job,
)
from .retention import in_memory
from .shelf import Shelf
from .types import check_rollout_id

logger = logging.getLogger(__name__)


class Pacing(Shelf):
    """See the module."""

    def demand(self, client_id: str, rollout_id: int) -> None:
        """Ask that `rollout_id` be generated. Demanding what is published already is no error.

        Raises:
            RolloutNotFound: it was acked and freed.
        """
        client = self._live(client_id, "consumer")
        job, rollout_id = self.jobs[client.info.job_id], check_rollout_id(rollout_id)
        if rollout_id in job.freed:
            raise RolloutNotFound(f"rollout {rollout_id} of job {job.job_id} was acked and freed")
        job.groups[client.info.group].demanded = True
        job.last_demanded = max(job.last_demanded, rollout_id)
        if rollout_id not in job.rollouts and rollout_id not in job.done:
            job.demands.add(rollout_id)
        known = job.progress.get(rollout_id)
        if known is None or known.state not in (GENERATING, PUBLISHED, CLAIMED, ACKED):
            self._note(job, rollout_id, DEMANDED, demanded=self._wall())
        elif not known.demanded:
            self._note(job, rollout_id, demanded=self._wall())

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
        """
        client = self._live(client_id, "producer")
        job = self.jobs[client.info.job_id]
        if job.control == DRAINING:
            raise EndOfStream(f"job {job.job_id} is being drained: what is out is finished, nothing new is generated")
        if gated:
            job.gate.producer_is(client.attached_as)
        found = self._next_wanted(job, start, until, gated)
        if found is not None:
            if gated:
                job.gate.generating = found
            if found not in job.handed or client.waited_s:  # else the same call again, whose answer was lost
                self._note(job, found, GENERATING, begun=self._wall(), producer_waited_s=client.waited_s)
                client.waited_s = 0.0
            job.handed[found] = (job.weights_now, job.resumed)
            return found
        drivers = self._drivers(job)
        left = [self._left(group, job) for group in drivers]
        if left and None not in left:
            broken = [member for member in left if member is not None and member.state != FINISHED]
            if not broken:
                raise EndOfStream(f"job {job.job_id}: the consumers finished, nothing more is wanted")
            self._raise_peer(broken[-1], grace_s)
        return None

    def held_back(self, job: Job) -> dict[str, Any] | None:
        """Why nothing at all is generated although the producer lives, as a verdict; None: nothing holds it back."""
        if job.control == PAUSED:
            return _verdict("paused", f"job {job.job_id} is paused: nothing is generated until it is resumed")
        if self._full(job):
            held = sorted(set(job.rollouts) - set(job.done))
            behind = [g.name for g in job.groups.values() if not g.closed and any(r not in g.acked for r in held)]
            waiting = ", ".join(behind)
            what = f"rollouts {held[0]} to {held[-1]}, {job.held_bytes} bytes, are not acked by {waiting or 'anybody'}"
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
        if last >= 0 and following <= last + job.max_ahead and self._too_early(job, following):
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

    # ------------------------------------------------------------------ inside

    def _drivers(self, job: Job) -> list[Group]:
        """The groups that the producer works for: those that demand, or all where nobody does."""
        return [g for g in job.groups.values() if g.demanded] or [*job.groups.values()]

    def _next_wanted(self, job: Job, start: int | None, until: int | None, gated: bool) -> int | None:
        gate = job.gate
        if gated and gate.generating is not None:
            return gate.generating  # the same call again, whose answer was lost
        if job.control == PAUSED or (gated and not gate.open) or self._full(job):
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
        if self._too_early(job, ahead):
            if job.early != ahead:
                job.early, job.delayed = ahead, job.delayed + 1
                logger.info("job %s: %s", job.job_id, self.idle(job))
            return None
        return ahead

    def _full(self, job: Job) -> bool:
        """Whether the next rollout, as large as the last one, would exceed the bound on bytes."""
        unacked = [r for r in job.rollouts if r not in job.done] if job.max_bytes is not None else []
        if not unacked:
            return False
        could_go = sum(in_memory(v.payload) for r in job.done for v in job.rollouts.get(r, []))
        return self._over_bytes(job, job.rollouts[max(unacked)][-1].payload.nbytes - could_go)

    def _too_early(self, job: Job, rollout_id: int) -> bool:
        """Whether the newest weights would be too old for `rollout_id`, which is trained on by weights of that number.

        Asked for what is generated ahead: what is demanded is trained on next, whatever the newest weights are.
        """
        now = job.weights_now
        if job.on_stale != WAIT or job.max_staleness is None or now is None:
            return False
        return rollout_id - now > job.max_staleness

    def _is_stale(self, job: Job, rollout_id: int) -> bool:
        """Whether what is published as `rollout_id` was generated by weights that are too old by now."""
        now, made = job.weights_now, job.rollouts[rollout_id][-1].payload.made_by
        if job.on_stale == WAIT or job.max_staleness is None or now is None or made is None:
            return False
        return now - made > job.max_staleness

    def _give_up_stale(self, job: Job, rollout_id: int, again: bool) -> None:
        """Discard a rollout that is too stale; `again`: it is generated anew, else nobody gets it."""
        made, now = job.rollouts[rollout_id][-1].payload.weight_version, job.weights_now
        logger.warning(
            "job %s: rollout %d, generated by weights %s, is too stale at weights %s: %s",
            *(job.job_id, rollout_id, made, now, "dropped" if job.on_stale == DROP else "it is generated again"),
        )
        kind = "dropped" if job.on_stale == DROP else "regenerated"
        self._event(job, kind, f"generated by weights {made}, too stale at weights {now}", rollout_id)
        self._discard(job, rollout_id, same_prompts=job.on_stale != DROP, again=again)

    def _discard(self, job: Job, rollout_id: int, same_prompts: bool, again: bool) -> None:
        """Nobody gets what is published as `rollout_id`; `again`: it is generated anew."""
        self._count_bytes(job, "dropped", sum(v.payload.nbytes for v in job.rollouts[rollout_id]))
        self._unshelve(job, rollout_id)
        if same_prompts:
            job.regenerated += 1
        else:
            job.dropped += 1
            self._forget_position(job, rollout_id)
        if again:
            job.demands.add(rollout_id)
            self._note(job, rollout_id, DEMANDED)
        else:
            for group in job.groups.values():
                if group.leases.pop(rollout_id, None) is not None:
                    job.requeued += 1
            job.skipped.add(rollout_id)
            self._gone(job, rollout_id)


def _verdict(kind: str, message: str) -> dict[str, Any]:
    return {"kind": kind, "message": message}
