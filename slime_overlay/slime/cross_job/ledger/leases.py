"""What consumers hold: claims, acks, and the history that a consumer goes on with.

When a lease is over, because nobody heard its owner, is decided in membership.py (`tick`).
"""

import heapq
import logging
from dataclasses import dataclass
from typing import Any

from ..errors import CrossJobError, GroupNotFound, NotOwner, PayloadLost, Refused, RolloutNotFound, ValueLost
from ..types import Located, Payload, check_payload, check_rollout_id
from .history import History
from .lifetime import Lifetime
from .membership import Membership
from .operations import writes
from .pacing import Pacing
from .prompts import Prompts
from .registry import Registry
from .retention import Retention
from .rollouts import Rollouts
from .state import (
    ACKED,
    CLAIMED,
    DEAD,
    DEMANDED,
    DROP,
    FINISHED,
    GENERATING,
    LOST,
    PUBLISHED,
    SILENT,
    Client,
    Group,
    Job,
)
from .verdicts import who

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Leases:
    """See the module."""

    registry: Registry
    history: History
    prompts: Prompts
    retention: Retention
    membership: Membership
    rollouts: Rollouts
    pacing: Pacing
    lifetime: Lifetime

    @writes()
    def claim(
        self,
        client_id: str,
        rollout_id: int | None = None,
        version: int | None = None,
        grace_s: float = 0.0,
        token: str = "",
    ) -> Located | None:
        """Lease a rollout to this consumer: `rollout_id`, or the lowest that nobody of its group has; None: not yet.

        Claiming again what one holds is the same lease, and so is asking for the next one with the same `token` again:
        as long as the lease lasts, it is the answer to the claim with that token. The lease stays with the version
        that was claimed. What a member of the group holds whose own lease is over may be claimed, too: that member is
        fenced.

        Raises:
            EndOfStream, PeerFailed: the producer ended, and what is asked for was not published.
            ValueLost: it is not published yet, and a value of this client's is lost, for which the producer may wait.
            RolloutNotFound: acked before, freed, or no such version. Poisoned: it is set aside.
        """
        client = self.registry.live(client_id, "consumer")
        job = self.registry.jobs[client.info.job_id]
        group = job.groups[client.info.group]
        if rollout_id is None:
            client.claims = {r: t for r, t in client.claims.items() if group.leases.get(r, ("",))[0] == client_id}
            for known in [r for r, its_token in client.claims.items() if token and its_token == token]:
                if known in job.rollouts:
                    return self.claim(client_id, known, token=token)
                self.unreadable(client_id, known)
            return self._claim_next(job, group, client, grace_s, token)
        rollout_id = check_rollout_id(rollout_id)
        if rollout_id < group.start and rollout_id not in job.rollouts:
            raise RolloutNotFound(
                f"group {group.name!r} of job {job.job_id} resumed at rollout {group.start}: its checkpoint covers "
                f"rollout {rollout_id}"
            )
        if rollout_id in group.acked or rollout_id in job.freed:
            state = "freed" if rollout_id in job.freed else "still readable with get()"
            raise RolloutNotFound(
                f"rollout {rollout_id} of job {job.job_id} was acked by group {group.name!r} before ({state})"
            )
        if self.pacing.drives(job, group.name):
            self.pacing.unless_set_aside(job, rollout_id)
        if rollout_id not in job.rollouts:
            if group.leases.get(rollout_id, ("",))[0] == client_id:  # it was lost since, and is wanted again
                self.give_back(job, group, rollout_id)
            if rollout_id in job.lost and group in self.pacing.drivers(job):
                job.demands.add(rollout_id)  # to claim what is lost is to want it generated again
            self._raise_if_value_lost(job, client)
            self._raise_if_lost_for_good(job, [rollout_id])
            self.membership.raise_if_producer_over(job, grace_s)
            return None
        owner, leased = group.leases.get(rollout_id, (client_id, None))
        if owner != client_id and self._taken_from(self.registry.clients[owner], client):
            owner, leased = client_id, None
        if owner != client_id:
            return None
        if leased is None and version is None and self.pacing.is_stale(job, rollout_id):
            self.pacing.give_up_stale(job, rollout_id, again=True)
            return None
        if version is None and leased in [v.version for v in job.rollouts[rollout_id]]:
            version = leased  # else it was lost, and the lease goes over to the newest
        located = self.rollouts.version(job, rollout_id, version)
        if leased is None:
            job.claimed += 1
            self._note_claimed(job, group, client, located)
        group.leases[rollout_id] = (client_id, located.version)
        client.claims[rollout_id] = token
        return located

    @writes()
    def ack(self, client_id: str, rollout_id: int) -> None:
        """The rollout has taken effect for good. Acking twice changes nothing.

        Raises:
            NotOwner: this consumer does not hold it.
        """
        client = self.registry.live(client_id, "consumer")
        job, rollout_id = self.registry.jobs[client.info.job_id], check_rollout_id(rollout_id)
        group = job.groups[client.info.group]
        if rollout_id in group.acked or rollout_id in job.freed:
            return
        self._check_owner(group, client, rollout_id)
        del group.leases[rollout_id]
        client.claims.pop(rollout_id, None)
        group.acked.add(rollout_id)
        job.acked += 1
        self.history.count_bytes(job, "acked", sum(v.payload.nbytes for v in job.rollouts.get(rollout_id, [])[-1:]))
        if self.pacing.drives(job, group.name):
            self.history.note(job, rollout_id, ACKED, acked=self.registry.wall())
        else:
            self._note_lease_over(job, group, rollout_id)
        self.retention.settle(job, [rollout_id])

    @writes()
    def release(self, client_id: str, rollout_id: int, token: str = "") -> None:
        """Give a leased rollout back: others of the group may claim it. With the same `token` again it was done.

        Raises:
            NotOwner: this consumer does not hold it.
        """
        client = self.registry.live(client_id, "consumer")
        job, rollout_id = self.registry.jobs[client.info.job_id], check_rollout_id(rollout_id)
        group = job.groups[client.info.group]
        if token and client.answer("release", token):
            return
        self._check_owner(group, client, rollout_id)
        self.give_back(job, group, rollout_id)
        client.remember("release", token, True)

    @writes()
    def resume(self, client_id: str, rollout_id: int, source: Any = None, token: str = "") -> dict[str, Any]:
        """This consumer's history covers every rollout below `rollout_id`, and nothing else: a checkpoint says so.

        What its group acked from there on is claimable again, the same bytes; what lies below is acked. Leases and
        acks of any other history are void, and its members fenced.

        `source` is where the source of prompts stood after the last of them, as far as the checkpoint knows, or the
        payload beside which that lies in a vault; it counts where nothing was published, as on a new cluster, or where
        the broker's memory of that has a gap.

        Returns {"again": ids that were acked and are not any more, "acked": ids that are now}; with the same `token`
        again the same, and nothing else happens.

        Raises:
            JobIdTaken: another Ray job's consumer of this group is alive.
            RolloutNotFound: something from `rollout_id` on was freed.
        """
        client = self.registry.live(client_id, "consumer")
        job, rollout_id = self.registry.jobs[client.info.job_id], check_rollout_id(rollout_id)
        kept = source if isinstance(source, Payload) else Payload("", "", 0, source=source)
        kept = check_payload(kept)
        if token and (answer := client.answer("resume", token)) is not None:
            return dict(answer)
        group = job.groups[client.info.group]
        others = self._others(client)
        for other in others:
            self.membership.may_replace(other, client.info)
        last = max((r for r in range(rollout_id, job.freed.last() + 1) if _acked_and_freed(job, r)), default=-1)
        if last >= 0:
            raise RolloutNotFound(
                f"job {job.job_id} cannot go back to rollout {rollout_id}: all up to {last} are acked and "
                "freed. Resume from a checkpoint that covers them (--load), keep more (--cross-job-retain), or begin "
                "anew under another --job-id"
            )
        for other in others:
            words = f"a newer consumer resumed its group at rollout {rollout_id}{self.registry.while_silent(other)}"
            self.membership.end(other.info.client_id, DEAD, words)
        again = sorted(r for r in group.acked if r >= rollout_id)
        for undone in again:
            group.acked.discard(undone)
        for undone in [r for r in job.done if r in again]:
            del job.done[undone]
            if undone not in job.rollouts:  # lost since: generated again, from the same prompts
                job.lost.add(undone)
                job.losses += 1
        for undone in again:
            self.rollouts.note_open(job, undone)
        for leased in [*group.leases]:
            self.give_back(job, group, leased)
        covered = sorted(r for r in {*job.rollouts, *job.lost} if r < rollout_id and r not in group.acked)
        for below in covered:
            group.acked.add(below)
            self.history.note(job, below, ACKED, acked=self.registry.wall())
        job.covered += len(covered)
        self.retention.settle(job, covered)
        group.start = rollout_id
        group.ready = sorted(r for r in job.rollouts if r >= rollout_id)
        if self.pacing.drivers(job) == [group]:  # the others' demands stand
            self._not_wanted(job)
            job.demands.clear()
            job.last_demanded = -1
        begins = rollout_id == 0 and self.pacing.drivers(job) == [group]
        self.prompts.take_source(job, kept if kept.source is not None or kept.source_apart else None, begins)
        job.gate.new_history(who(client))
        job.resumed += 1
        job.rewound += bool(again)
        behind = f"; {len(again)} that were acked are handed out again" if again else ""
        self.history.event(
            job, "rewound" if again else "resumed", f"group {group.name} resumed at {rollout_id}{behind}"
        )
        if token:
            client.remember("resume", token, {"again": again, "acked": covered})
        return {"again": again, "acked": covered}

    @writes()
    def first(self, client_id: str) -> bool:
        """True: no consumer of another Ray job had this one's place in its group before, and is alive; one whose lease
        is over is fenced.

        Raises:
            JobIdTaken: one is.
        """
        client = self.registry.live(client_id, "consumer")
        before = [other for other in self._others(client) if other.attached_as < client.attached_as]
        for other in before:
            self.membership.may_replace(other, client.info)
        for other in before:
            if other.state == SILENT:
                self.membership.end(
                    other.info.client_id, DEAD, f"a newer consumer took its place{self.registry.while_silent(other)}"
                )
        return True

    @writes()
    def unreadable(self, client_id: str, rollout_id: int) -> None:
        """What this consumer claimed is lost with its vault: its lease ends; if none is left, it is demanded."""
        client = self.registry.live(client_id, "consumer")
        job, rollout_id = self.registry.jobs[client.info.job_id], check_rollout_id(rollout_id)
        group = job.groups[client.info.group]
        if group.leases.get(rollout_id, ("",))[0] == client_id:
            self.give_back(job, group, rollout_id)
        if rollout_id in job.lost and group in self.pacing.drivers(job):
            job.demands.add(rollout_id)

    def ended(self, job: Job, client: Client) -> None:
        if client.info.role == "producer" and client is job.producer:
            job.gate.producer_gone()
            self._not_wanted(job, GENERATING)
        if client.info.role == "consumer":
            job.gate.gone(client.info.client_id, who(client))
            group = job.groups[client.info.group]
            for rollout_id in [r for r, (owner, _) in group.leases.items() if owner == client.info.client_id]:
                self.give_back(job, group, rollout_id)
            client.claims.clear()
            if group.closed:
                self.retention.settle(job, sorted([*job.rollouts, *job.lost]))
        self.lifetime.complete_if_over(job)

    def give_back(self, job: Job, group: Group, rollout_id: int) -> None:
        owner, _ = group.leases.pop(rollout_id)
        if (holder := self.registry.clients.get(owner)) is not None:
            holder.claims.pop(rollout_id, None)
        heapq.heappush(group.ready, rollout_id)
        job.requeued += 1
        self._note_lease_over(job, group, rollout_id)

    def group(self, job: Job, name: str) -> Group:
        if name not in job.groups:
            raise GroupNotFound(
                f"job {job.job_id} has no consumer group {name!r}; it has {', '.join(job.groups) or 'none'}"
            )
        return job.groups[name]

    def _note_lease_over(self, job: Job, group: Group, rollout_id: int) -> None:
        """Nobody of the group holds it; which group drives the producer may have changed since it was claimed."""
        known = job.progress.get(rollout_id)
        held = any(rollout_id in g.leases for g in job.groups.values())
        claimed = known is not None and known.state == CLAIMED
        if rollout_id in job.rollouts and (self.pacing.drives(job, group.name) or (claimed and not held)):
            self.history.note(job, rollout_id, PUBLISHED)

    def _others(self, client: Client) -> list[Client]:
        """The attached consumers of its group, but for itself."""
        job = self.registry.jobs[client.info.job_id]
        return [c for c in self.registry.members(job.groups[client.info.group], job) if c is not client]

    def _taken_from(self, holder: Client, taker: Client) -> bool:
        """What `holder` has is free for another of its group, if its lease is over: it is fenced."""
        if holder.state != SILENT:
            return False
        words = f"another consumer of its group (pid {taker.info.pid} on {taker.info.host or '?'}) took what it held"
        self.membership.end(holder.info.client_id, DEAD, f"{words}{self.registry.while_silent(holder)}")
        return True

    def _raise_if_value_lost(self, job: Job, client: Client) -> None:
        for value in job.lost_values.values():
            if value.author == client.info.client_id:
                raise ValueLost(
                    f"{value.key} version {value.version} of job {job.job_id}, which this client published, is lost "
                    "with its vault: publish it again"
                )

    def _raise_if_lost_for_good(self, job: Job, wanted: list[int]) -> None:
        """What is lost or dropped is generated again, but not by a producer that is through: no end of stream."""
        if job.producer is None or job.producer.state != FINISHED:
            return
        then = f"the {who(job.producer)} finished: start both jobs again, and they are generated again"
        if lost := [rollout_id for rollout_id in wanted if rollout_id in job.lost]:
            raise PayloadLost(
                f"rollouts {lost} of job {job.job_id} were published and are lost with their vault, and {then}"
            )
        gone = [r for r in wanted if r in job.demands and r in job.ever]
        if gone:
            raise Refused(f"rollouts {gone} of job {job.job_id} were dropped after their publication, and {then}")

    def _claim_next(self, job: Job, group: Group, client: Client, grace_s: float, token: str) -> Located | None:
        put_aside: list[int] = []
        try:
            while self._free_of_the_silent(group, client):
                rollout_id = group.ready[0]  # popped once it is settled, or an error would lose it
                if rollout_id in job.rollouts and rollout_id not in group.acked and rollout_id not in group.leases:
                    try:
                        if self.pacing.is_stale(job, rollout_id):
                            self.pacing.give_up_stale(job, rollout_id, again=job.on_stale != DROP)
                            located = None
                        else:
                            located = self.claim(client.info.client_id, rollout_id, token=token)
                    except CrossJobError:
                        raise
                    except Exception as error:  # its record is damaged: the others are handed out
                        logger.error("job %s: rollout %d cannot be handed out: %r", job.job_id, rollout_id, error)
                        put_aside.append(rollout_id)
                        located = None
                    if located is not None:
                        return located
                if group.ready and group.ready[0] == rollout_id:
                    heapq.heappop(group.ready)
        finally:
            for rollout_id in put_aside:
                heapq.heappush(group.ready, rollout_id)
        self._raise_if_value_lost(job, client)
        unpublished = sorted({*job.lost, *job.demands})
        open_here = [r for r in unpublished if r not in group.acked and r not in group.leases]
        self._raise_if_lost_for_good(job, open_here)
        if all(owner == client.info.client_id for owner, _ in group.leases.values()):  # else one may still come back
            if put_aside and job.producer is not None and not job.producer.attached:
                raise Refused(
                    f"rollouts {put_aside} of job {job.job_id} cannot be handed out, because their records are "
                    "damaged, and nobody is there to generate them again: drop them (slime-cross-job drop) and start "
                    "the rollout job again"
                )
            self.membership.raise_if_producer_over(job, grace_s)
        return None

    def _free_of_the_silent(self, group: Group, client: Client) -> bool:
        """Whether `ready` has something to look at: what a silent member holds goes there, if nothing lower is."""
        others = [(r, self.registry.clients[o]) for r, (o, _) in group.leases.items() if o != client.info.client_id]
        silent = [(r, holder) for r, holder in others if holder.state == SILENT]
        for rollout_id, holder in sorted(silent, key=lambda pair: pair[0])[:1]:
            if not group.ready or rollout_id < group.ready[0]:
                self._taken_from(holder, client)
        return bool(group.ready)

    def _check_owner(self, group: Group, client: Client, rollout_id: int) -> None:
        owner = group.leases.get(rollout_id)
        if owner is None:
            raise NotOwner(f"rollout {rollout_id} is not leased by anyone of group {group.name!r}: claim it first")
        if owner[0] != client.info.client_id:
            raise NotOwner(f"rollout {rollout_id} is leased by the {who(self.registry.clients[owner[0]])}")

    def _note_claimed(self, job: Job, group: Group, client: Client, located: Located) -> None:
        self.history.count_bytes(job, "claimed", located.payload.nbytes)
        if not self.pacing.drives(job, group.name):
            return
        known, made, now = job.progress.get(located.rollout_id), located.payload.made_by, job.weights_now
        facts: dict[str, Any] = {"claims": (known.claims if known else 0) + 1, "claimed": self.registry.wall()}
        facts["consumer_waited_s"] = client.waited_s
        if made is not None and now is not None:
            facts["staleness"] = now - made
        client.waited_s = 0.0
        self.history.note(job, located.rollout_id, CLAIMED, **facts)

    def _not_wanted(self, job: Job, state: str = DEMANDED) -> None:
        """Those that stand there are not generated, at least not now; demanded ones of a producer that ended are."""
        for rollout_id in [r for r, known in job.progress.items() if known.state == state]:
            if state == GENERATING and rollout_id in job.demands:
                self.history.note(job, rollout_id, DEMANDED)
            elif rollout_id in job.lost:
                self.history.note(job, rollout_id, LOST)
            else:
                del job.progress[rollout_id]


def _acked_and_freed(job: Job, rollout_id: int) -> bool:
    return rollout_id in job.freed and rollout_id not in job.skipped
