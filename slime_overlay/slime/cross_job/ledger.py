"""The ledger: who published, demanded, leased and acked what. The broker's whole logic, without Ray.

Pure state with an injected clock: every method returns at once; waiting is the broker's business, which asks again
when something changed. A method that finds nothing *yet* returns None; one that can never succeed raises.
The ledger holds no payload: it knows tokens, and tells through `take_drops` which ones the vaults may free.
"""

import heapq
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from .engines import Engines
from .errors import EndOfStream, NotOwner, Refused, RolloutNotFound
from .records import FINISHED, Client, Group, Job
from .status import job_status
from .types import Located, LocatedValue, Payload, check_job_id, check_rollout_id
from .verdicts import verdict, who


class Ledger(Engines):
    """State of every job of one namespace; who is attached, and whose engines have which weights, are its bases."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time):
        super().__init__(clock, wall)
        self._drops: list[tuple[str, str]] = []

    # ------------------------------------------------------------------ producer

    def publish(
        self, client_id: str, rollout_id: int, payload: Payload, compare: bool = False
    ) -> tuple[bool, Located]:
        """Record a published payload; returns (True, its version).

        The same token again is the same version. With `compare`, a payload that may equal the newest version (same
        size, samples and metadata) is not recorded: (False, newest) asks the vault to compare the bytes first.

        Raises:
            Fenced: another producer took over. Refused: the rollout was acked and freed already.
        """
        client = self._live(client_id, "producer")
        job, rollout_id = self.jobs[client.info.job_id], check_rollout_id(rollout_id)
        versions = job.rollouts.get(rollout_id, [])
        token, answer = client.answered.get("publish", ("", None))
        if token == payload.token:  # a retry, because the answer was lost; it may have been acked and freed since
            return True, answer
        for located in versions:
            if located.payload.token == payload.token:
                return True, located
        if rollout_id in job.freed:
            raise Refused(
                f"rollout {rollout_id} of job {job.job_id} was trained on, acked and freed: it is not taken again"
            )
        if job.gate.generating == rollout_id:
            job.gate.generating = None
        if compare and versions and _alike(versions[-1].payload, payload):
            return False, versions[-1]
        if payload.weight_version is None and job.gate.open:
            payload = replace(payload, weight_version=job.gate.version)
        located = Located(job.job_id, rollout_id, len(versions) + 1, payload, self._wall(), client.epoch)
        if job.newest is None or rollout_id >= job.newest[0]:
            job.newest = (rollout_id, payload.meta)
        job.rollouts.setdefault(rollout_id, []).append(located)
        job.demands.discard(rollout_id)
        job.last_published = max(job.last_published, rollout_id)
        job.published += 1
        if versions:
            job.republished += 1
        else:
            for group in job.groups.values():
                heapq.heappush(group.ready, rollout_id)
        client.answered["publish"] = (payload.token, located)
        return True, located

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
                weights are unknown or change (see gate.py), and reaching `until` does not end the stream, because the
                engines are still needed: only the consumers' end does.

        Raises:
            EndOfStream: the consumers finished, or `until` is reached. PeerFailed: they failed.
        """
        client = self._live(client_id, "producer")
        job = self.jobs[client.info.job_id]
        if gated:
            job.gate.producer_is(client.epoch)
        found = self._next_wanted(job, start, until, gated)
        if found is not None:
            if gated:
                job.gate.generating = found
            return found
        drivers = [g for g in job.groups.values() if g.demanded] or list(job.groups.values())
        if drivers and not any(g.live for g in drivers):
            broken = [g.ended for g in drivers if g.ended is not None and g.ended.state != FINISHED]
            if not broken:
                raise EndOfStream(f"job {job.job_id}: the consumers finished, nothing more is wanted")
            self._raise_peer(broken[-1], grace_s)
        return None

    def _next_wanted(self, job: Job, start: int | None, until: int | None, gated: bool) -> int | None:
        gate = job.gate
        if gated and gate.generating is not None:
            return gate.generating  # the same call again, whose answer was lost
        if gated and not gate.open:
            return None
        wanted = [r for r in job.demands if until is None or r < until]
        if wanted:
            return min(wanted)
        last = job.last_demanded if job.last_demanded >= 0 else (None if start is None else start - 1)
        if last is None:
            return None
        ahead = max(last, job.last_published) + 1
        if until is not None and ahead >= until:
            if gated:
                return None
            raise EndOfStream(f"job {job.job_id}: {until - 1} is the last rollout, nothing more is generated")
        # while somebody waits to update the weights, only what he waits for is begun
        allowed = min(job.max_ahead, 1) if gated and gate.wanted_by else job.max_ahead
        return ahead if ahead <= last + allowed else None

    # ------------------------------------------------------------------ consumer

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
        if rollout_id not in job.rollouts:
            job.demands.add(rollout_id)

    def claim(
        self,
        client_id: str,
        rollout_id: int | None = None,
        version: int | None = None,
        grace_s: float = 0.0,
        token: str = "",
    ) -> Located | None:
        """Lease a rollout to this consumer: `rollout_id`, or the lowest that nobody of its group has; None: not yet.

        Claiming again what one holds is the same lease, and so is asking for the next one with the same `token` again.
        The lease stays with the version that was claimed.

        Raises:
            EndOfStream, PeerFailed: the producer ended, and what is asked for was not published.
            RolloutNotFound: acked before, freed, or no such version.
        """
        client = self._live(client_id, "consumer")
        job = self.jobs[client.info.job_id]
        group = job.groups[client.info.group]
        if rollout_id is None:
            if token and client.answered.get("claim", ("", None))[0] == token:
                return client.answered["claim"][1]
            located = self._claim_next(job, group, client, grace_s)
            if located is not None:
                client.answered["claim"] = (token, located)
            return located
        rollout_id = check_rollout_id(rollout_id)
        if rollout_id in group.acked or rollout_id in job.freed:
            state = "freed" if rollout_id in job.freed else "still readable with get()"
            raise RolloutNotFound(
                f"rollout {rollout_id} of job {job.job_id} was acked by group {group.name!r} before ({state})"
            )
        if rollout_id not in job.rollouts:
            self._raise_if_producer_over(job, grace_s)
            return None
        owner, leased = group.leases.get(rollout_id, (client_id, None))
        if owner != client_id:
            return None
        located = self._version(job, rollout_id, leased if version is None else version)
        if leased is None:
            job.claimed += 1
        group.leases[rollout_id] = (client_id, located.version)
        return located

    def ack(self, client_id: str, rollout_id: int) -> None:
        """The rollout has taken effect for good. Acking twice changes nothing.

        Raises:
            NotOwner: this consumer does not hold it.
        """
        client = self._live(client_id, "consumer")
        job, rollout_id = self.jobs[client.info.job_id], check_rollout_id(rollout_id)
        group = job.groups[client.info.group]
        if rollout_id in group.acked or rollout_id in job.freed:
            return
        self._check_owner(group, client, rollout_id)
        del group.leases[rollout_id]
        group.acked.add(rollout_id)
        job.acked += 1
        self._settle(job, rollout_id)

    def release(self, client_id: str, rollout_id: int) -> None:
        """Give a leased rollout back: others of the group may claim it. Raises NotOwner."""
        client = self._live(client_id, "consumer")
        job, rollout_id = self.jobs[client.info.job_id], check_rollout_id(rollout_id)
        group = job.groups[client.info.group]
        self._check_owner(group, client, rollout_id)
        self._give_back(job, group, rollout_id)

    # ------------------------------------------------------------------ anybody

    def get(self, job_id: str, rollout_id: int, version: int | None = None) -> Located:
        """Where a published version lies (default: the newest), without a lease. Raises RolloutNotFound."""
        job = self._known_job(job_id)
        return self._version(job, check_rollout_id(rollout_id), version)

    def catalog(self, job_id: str | None = None) -> list[Located]:
        """Newest version of every rollout that can be read, by job and id."""
        jobs = self.jobs.values() if job_id is None else [self._known_job(job_id)]
        return [job.rollouts[r][-1] for job in sorted(jobs, key=lambda j: j.job_id) for r in sorted(job.rollouts)]

    def versions(self, job_id: str, rollout_id: int) -> list[Located]:
        """Every version of a rollout that can be read, oldest first. Raises RolloutNotFound."""
        self.get(job_id, rollout_id)
        return [*self.jobs[job_id].rollouts[rollout_id]]

    def put_value(self, client_id: str, key: str, payload: Payload, version: int | None = None) -> LocatedValue:
        """Record a value of the job (weights, say) under `key`; it replaces the older one, which is freed.

        Raises:
            Refused: `version` is not newer than what is there.
        """
        client = self._live(client_id)
        job = self.jobs[client.info.job_id]
        token, answer = client.answered.get("put_value", ("", None))
        if token == payload.token:
            return answer
        old = job.values.get(key)
        if old is not None and old.payload.token == payload.token:
            return old
        number = (old.version + 1 if old else 0) if version is None else version
        if old is not None and number <= old.version:
            raise Refused(f"version {number} of {key!r} in job {job.job_id} is not newer than {old.version}")
        job.values[key] = LocatedValue(job.job_id, key, number, payload, self._wall())
        if old is not None:
            self._drop(old.payload)
        client.answered["put_value"] = (payload.token, job.values[key])
        return job.values[key]

    def get_value(self, job_id: str, key: str, newer_than: int | None = None) -> LocatedValue | None:
        """Newest value of `key`; None if there is none, or none newer than `newer_than`."""
        job = self.jobs.get(job_id)
        value = job.values.get(key) if job else None
        return value if value is not None and (newer_than is None or value.version > newer_than) else None

    def forget(self, job_id: str) -> None:
        """Free everything a job holds and forget it. Raises Refused while a client of it is alive."""
        job = self._known_job(job_id)
        alive = [c for c in self.clients.values() if c.live and c.info.job_id == job_id]
        if alive:
            raise Refused(f"job {job_id} is in use: {who(alive[0])} is alive")
        self._free_all(job)
        del self.jobs[job_id]
        self.clients = {k: c for k, c in self.clients.items() if c.info.job_id != job_id}

    def peer_verdict(self, client_id: str, rollout_id: int | None = None) -> dict[str, Any]:
        """Say how the one stands for whom this client waits: its producer, its consumers, or another lease holder."""
        client = self._live(client_id)
        job, info = self.jobs[client.info.job_id], client.info
        if info.role == "producer":
            mine = [c for c in self.clients.values() if c.info.job_id == job.job_id and c.info.role == "consumer"]
            candidates = [c for c in mine if c.live] or [g.last for g in job.groups.values() if g.last is not None]
            peer = max(candidates, key=lambda c: c.attached_at, default=None)
            return verdict(peer, "consumer", job.job_id, self._clock(), self._wall())
        owner = job.groups[info.group].leases.get(-1 if rollout_id is None else rollout_id)
        if owner is not None and owner[0] != client_id:
            found = verdict(self.clients[owner[0]], "consumer", job.job_id, self._clock(), self._wall())
            return {**found, "message": f"it is leased: {found['message']}"}
        return verdict(job.producer, "producer", job.job_id, self._clock(), self._wall())

    def status(self, job_id: str | None = None) -> dict[str, dict[str, Any]]:
        """Figures of one job, or of all, by job id (see status.py). Raises RolloutNotFound for an unknown job."""
        jobs = self.jobs.values() if job_id is None else [self._known_job(job_id)]
        return {job.job_id: job_status(job, self._clock()) for job in jobs}

    def take_drops(self) -> list[tuple[str, str]]:
        """(vault, token) of payloads that nobody can ask for any more; each is told once."""
        drops, self._drops = self._drops, []
        return drops

    # ------------------------------------------------------------------ inside

    def _ended(self, job: Job, client: Client) -> None:
        if client.info.role == "producer" and client is job.producer:
            job.gate.producer_gone()
        if client.info.role == "consumer":
            job.gate.gone(client.info.client_id, who(client))
            group = job.groups[client.info.group]
            for rollout_id in [r for r, (owner, _) in group.leases.items() if owner == client.info.client_id]:
                self._give_back(job, group, rollout_id)
            if group.closed:
                for rollout_id in list(job.rollouts):
                    self._settle(job, rollout_id)
        self._complete_if_over(job)

    def _known_job(self, job_id: str) -> Job:
        if check_job_id(job_id) not in self.jobs:
            known = ", ".join(sorted(self.jobs)) or "none"
            raise RolloutNotFound(f"no job {job_id!r} here; jobs of this namespace: {known}")
        return self.jobs[job_id]

    def _version(self, job: Job, rollout_id: int, version: int | None) -> Located:
        versions = job.rollouts.get(rollout_id)
        if versions is None:
            state = "was acked and freed" if rollout_id in job.freed else "is not published"
            raise RolloutNotFound(f"rollout {rollout_id} of job {job.job_id} {state}")
        if version is None:
            return versions[-1]
        if not 1 <= version <= len(versions):
            raise RolloutNotFound(
                f"rollout {rollout_id} of job {job.job_id} has versions 1 to {len(versions)}, not {version}"
            )
        return versions[version - 1]

    def _claim_next(self, job: Job, group: Group, client: Client, grace_s: float) -> Located | None:
        while group.ready:
            rollout_id = heapq.heappop(group.ready)
            if rollout_id in job.rollouts and rollout_id not in group.acked and rollout_id not in group.leases:
                return self.claim(client.info.client_id, rollout_id)
        if all(owner == client.info.client_id for owner, _ in group.leases.values()):  # else one may still come back
            self._raise_if_producer_over(job, grace_s)
        return None

    def _check_owner(self, group: Group, client: Client, rollout_id: int) -> None:
        owner = group.leases.get(rollout_id)
        if owner is None:
            raise NotOwner(f"rollout {rollout_id} is not leased by anyone of group {group.name!r}: claim it first")
        if owner[0] != client.info.client_id:
            raise NotOwner(f"rollout {rollout_id} is leased by the {who(self.clients[owner[0]])}")

    def _give_back(self, job: Job, group: Group, rollout_id: int) -> None:
        del group.leases[rollout_id]
        heapq.heappush(group.ready, rollout_id)
        job.requeued += 1

    def _settle(self, job: Job, rollout_id: int) -> None:
        """Move a rollout that every open group has acked towards being freed."""
        acked_by = [g for g in job.groups.values() if rollout_id in g.acked]
        if not acked_by or any(rollout_id not in g.acked for g in job.groups.values() if not g.closed):
            return
        job.done.setdefault(rollout_id)
        while len(job.done) > job.retain:
            oldest = next(iter(job.done))
            del job.done[oldest]
            for located in job.rollouts.pop(oldest):
                self._drop(located.payload)
            job.freed.add(oldest)
            for group in job.groups.values():
                group.acked.discard(oldest)

    def _complete_if_over(self, job: Job) -> None:
        over = job.producer is not None and job.producer.state == FINISHED
        if over and job.groups and all(g.closed for g in job.groups.values()):
            self._free_all(job)
            job.complete = True

    def _free_all(self, job: Job) -> None:
        for versions in job.rollouts.values():
            for located in versions:
                self._drop(located.payload)
        job.freed.update(job.rollouts)
        job.rollouts.clear()
        job.done.clear()
        for value in job.values.values():
            self._drop(value.payload)
        job.values.clear()

    def _drop(self, payload: Payload) -> None:
        self._drops.append((payload.vault, payload.token))


def _alike(old: Payload, new: Payload) -> bool:
    """Whether two payloads can be equal: all that can be told without their bytes."""
    return all(
        getattr(old, f) == getattr(new, f) for f in ("nbytes", "parts", "num_samples", "weight_version", "meta")
    )
