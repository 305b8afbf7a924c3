"""When slime's weights may go into the engines: the rules are in gate.py. What the two jobs tell each other for it."""

from dataclasses import dataclass
from typing import Any

from ..errors import NotOwner
from ..types import check_number, check_stamp
from .membership import Membership
from .operations import reads, writes
from .pacing import Pacing
from .registry import Registry
from .state import Job, is_full
from .verdicts import who


@dataclass(eq=False)
class WeightGate:
    """See the module."""

    registry: Registry
    membership: Membership
    pacing: Pacing

    @writes()
    def announce(self, client_id: str, facts: Any) -> None:
        """Tell the peer what it needs to know of this client (actor handles, layout); the newest statement holds."""
        self.registry.live(client_id).facts = facts

    @reads()
    def facts(self, client_id: str, grace_s: float = 0.0) -> tuple[int, Any] | None:
        """(epoch as which it attached, what it announced) of the producer, or for a producer of the newest consumer;
        None: not yet.

        Raises:
            EndOfStream, PeerFailed: the producer ended.
        """
        client = self.registry.live(client_id)
        job = self.registry.jobs[client.info.job_id]
        if client.info.role == "producer":
            told = [g.last for g in job.groups.values() if g.last is not None and g.last.facts is not None]
            peer = max(told, key=lambda c: c.attached_at, default=None)
        else:
            peer = job.producer if self.registry.is_there(job.producer) else None
            if peer is None:
                self.membership.raise_if_producer_over(job, grace_s)
        return None if peer is None or peer.facts is None else (peer.attached_as, peer.facts)

    @writes()
    def begin_update(self, client_id: str, until: int | None = None, grace_s: float = 0.0) -> int | None:
        """Hold the engines for a weight update; returns the epoch of the producer that has them, None: not yet.

        Granted when nothing is being generated, and when every rollout that is still to be generated with the weights
        of before is published: those demanded, and with `max_ahead` the one after the last demanded. So which weights
        a rollout sees does not depend on who was faster (up to `max_ahead` 1; beyond that, no rollout sees two).

        Args:
            until: the number of rollouts of the run. It holds for the producer, too, which may have been started with
                another one.

        Raises:
            EndOfStream, PeerFailed: the producer ended.
        """
        client = self.registry.live(client_id, "consumer")
        job = self.registry.jobs[client.info.job_id]
        gate = job.gate
        gate.until = gate.until if until is None else until
        client.training = None  # it is through with that
        if gate.holder and gate.holder != client_id:
            return None
        producer = job.producer
        if producer is None or not self.registry.is_there(producer) or producer.facts is None:
            self.membership.raise_if_producer_over(job, grace_s)
            return None
        gate.producer_is(producer.attached_as)
        if not gate.unknown and self._owed(job, until):
            gate.wanted_by = client_id
            return None
        return producer.attached_as if gate.begin(client_id) else None

    @writes()
    def end_update(self, client_id: str, version: int, epoch: int, stamp: str = "") -> None:
        """The engines of the producer with `epoch` have the weights `version`, all of them, and say `stamp` of them.

        Raises:
            NotOwner: this consumer does not hold the engines (it never did, or they are gone).
        """
        client, version = self.registry.live(client_id, "consumer"), check_number(version, "version")
        stamp = check_stamp(stamp)
        job = self.registry.jobs[client.info.job_id]
        if client.answer("end_update", "") == (version, epoch) and not job.gate.holder:
            return  # the same call again, whose answer was lost
        if job.gate.engines != epoch or not job.gate.end(client_id, version, stamp):
            raise NotOwner(f"weights {version} went to engines that are gone: update the weights again")
        client.remember("end_update", "", (version, epoch))

    @writes()
    def break_update(self, client_id: str) -> None:
        """The update that this consumer began did not come to its end: the engines' weights are unknown."""
        client = self.registry.live(client_id, "consumer")
        self.registry.jobs[client.info.job_id].gate.gone(client_id, who(client))

    @reads()
    def loaded(self, client_id: str, grace_s: float = 0.0) -> int | None:
        """Version of the weights that the engines have; None while they have none, or change.

        Raises:
            EndOfStream, PeerFailed: the producer ended.
        """
        job = self.registry.jobs[self.registry.live(client_id, "consumer").info.job_id]
        if job.producer is not None and not self.registry.is_there(job.producer):
            self.membership.raise_if_producer_over(job, grace_s)
            return None
        return job.gate.version if job.gate.open else None

    @reads()
    def unloaded(self, client_id: str, since: int = 0) -> int | None:
        """Epoch of a live producer after `since` whose engines have no known weights; None: there is none."""
        job = self.registry.jobs[self.registry.live(client_id, "consumer").info.job_id]
        producer = job.producer
        if (
            producer is None
            or not self.registry.is_there(producer)
            or producer.facts is None
            or producer.attached_as <= since
            or job.gate.holder
        ):
            return None
        return producer.attached_as if job.gate.engines != producer.attached_as or job.gate.unknown else None

    def _owed(self, job: Job, until: int | None) -> bool:
        """Whether a rollout is still to be generated with the weights that the engines have."""
        following = max(job.last_demanded, job.ever.last()) + 1
        ahead = job.max_ahead > 0 and job.last_demanded >= 0 and following <= job.last_demanded + 1
        if ahead and (is_full(job) or self.pacing.too_early(job, following)):
            ahead = False  # it is begun after the update only
        return bool(job.demands) or (ahead and (until is None or following < until))
