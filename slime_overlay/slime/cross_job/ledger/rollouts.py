"""What is published and where it lies: versions, values, losses.

It holds no payload: it knows tokens, and the garbage tells which ones vaults may free.
"""

import heapq
import json
import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import TypeVar

from ..errors import Refused, RolloutNotFound, WrongWeights
from ..types import (
    WEIGHTS_SAID,
    Located,
    LocatedValue,
    Payload,
    check_name,
    check_payload,
    check_rollout_id,
    check_version,
    source_name,
)
from .garbage import Garbage
from .history import History
from .operations import reads, writes
from .prompts import Prompts
from .registry import Registry
from .retention import Retention, is_unread
from .state import ACKED, DEMANDED, LOST, PUBLICATION, PUBLISHED, Job, in_memory

_Record = TypeVar("_Record", Located, LocatedValue)


@dataclass(eq=False)
class Rollouts:
    """See the module."""

    registry: Registry
    history: History
    prompts: Prompts
    retention: Retention
    garbage: Garbage

    @writes(proxied=True)
    def publish(
        self, client_id: str, rollout_id: int, payload: Payload, compare: bool = False
    ) -> tuple[bool, Located]:
        """Record a published payload; returns (True, its version).

        The same token again is the same version. With `compare`, a payload that may equal the newest version (same
        size, samples and metadata) is not recorded: (False, newest) asks the vault to compare the bytes first.

        Version 0 says that it was not taken: older weights generated it than there were when it was begun, those of a
        checkpoint to which the consumers went back meanwhile. It will be demanded again.

        Raises:
            Fenced: another producer took over. Refused: the rollout was acked and freed already.
            WrongWeights: the engines say that they generated it with other weights than the last update gave them.
        """
        client = self.registry.live(client_id, "producer")
        job, rollout_id = self.registry.jobs[client.info.job_id], check_rollout_id(rollout_id)
        payload = check_payload(payload)
        versions = job.rollouts.get(rollout_id, [])
        answer = client.answer("publish", payload.token)
        for at, located in enumerate(versions):
            if located.payload.token == payload.token:  # a retry, because the answer was lost
                payload = replace(payload, weight_version=located.payload.weight_version)  # the gate may have said it
                versions[at] = located = self._lies_at(job, located, payload)
                return True, located
        if answer is not None:  # so is this: its vault died, or it was acked
            answer = replace(answer, payload=replace(payload, weight_version=answer.payload.weight_version))
            newest = all(located.version < answer.version for located in versions)
            if answer.version and newest and (rollout_id in job.lost or rollout_id in job.rollouts):
                answer = replace(answer, serial=job.serial)
                job.serial += 1
                self._add_version(job, answer)
                self.history.note(job, rollout_id, "" if rollout_id in job.done else PUBLISHED)
                client.remember("publish", payload.token, _bare(answer))
                self.retention.make_room(job)
            else:
                self.garbage.drops.append((payload.vault, payload.token))
            return True, answer
        if wrong := job.gate.differs(payload.meta.get(WEIGHTS_SAID)):
            raise WrongWeights(
                f"rollout {rollout_id} of job {job.job_id} is not taken: the engines said weights "
                f"{', '.join(wrong)} while they generated it, and this job gave them weights {job.gate.stamp}: stop "
                "whatever else updates or restarts these engines, then start the rollout job again"
            )
        if rollout_id in job.freed:
            raise Refused(
                f"rollout {rollout_id} of job {job.job_id} was {_why_freed(job, rollout_id)}: it is not taken again"
            )
        if job.gate.generating == rollout_id:
            job.gate.generating = None
        if compare and versions and _alike(versions[-1].payload, payload):
            return False, versions[-1]
        begun, resumed = job.handed.pop(rollout_id, (None, job.resumed))
        if payload.weight_version is None and job.gate.engines:
            made_by = begun if begun is not None else job.gate.version if job.gate.open else None
            payload = replace(payload, weight_version=made_by)
        outdated = begun is not None and payload.weight_version is not None and payload.weight_version < begun
        if outdated and resumed < job.resumed:
            self.garbage.drops.append((payload.vault, payload.token))
            located = Located(job.job_id, rollout_id, 0, payload, self.registry.wall(), client.epoch)
            client.remember("publish", payload.token, _bare(located))
            why = f"not taken: weights {payload.weight_version} made it, it was begun for weights {begun}"
            self.history.event(job, "outdated", why, rollout_id)
            if rollout_id not in job.rollouts:
                self.note_open(job, rollout_id)
            return True, located
        number = job.again.get(rollout_id, 1) + 1 if rollout_id in job.ever else 1
        located = Located(job.job_id, rollout_id, number, payload, self.registry.wall(), client.epoch, job.serial)
        job.serial += 1
        self._add_version(job, located)
        self.prompts.take_position(job, rollout_id, payload)
        self._note_published(job, located)
        self.retention.cover(job, rollout_id)
        self.retention.make_room(job)
        job.published += 1
        job.refused = 0
        job.republished += number > 1
        client.remember("publish", payload.token, _bare(located))
        return True, located

    @writes(proxied=True)
    def put_value(self, client_id: str, key: str, payload: Payload, version: int | None = None) -> LocatedValue:
        """Record a value of the job (weights, say) under `key`; it replaces the older one, which is freed.

        Versions grow while their author lives; who comes after it may go back, as from an older checkpoint.

        Raises:
            Refused: `version` is not newer than what is there.
        """
        client = self.registry.live(client_id)
        job = self.registry.jobs[client.info.job_id]
        key, version = check_name(key, "a key"), check_version(version, "the version of a value")
        payload = check_payload(payload)
        answer = client.answer("put_value", payload.token)
        old = job.values.get(key)
        if old is not None and old.payload.token == payload.token:
            return old
        if answer is not None:  # a retry, because the answer was lost: with the value, if its vault died
            if old is not None and old.serial > answer.serial:
                self.garbage.drops.append((payload.vault, payload.token))
                return replace(answer, payload=payload)
            version = answer.version
        number = (old.version + 1 if old else 0) if version is None else version
        if (
            old is not None
            and number <= old.version
            and (old.author == client_id or self.registry.is_live(old.author))
        ):
            raise Refused(f"version {number} of {key!r} in job {job.job_id} is not newer than {old.version}")
        value = LocatedValue(job.job_id, key, number, payload, self.registry.wall(), client_id, job.serial)
        job.serial += 1
        job.values[key] = value
        self.retention.note_stored(job, value)
        job.lost_values.pop(key, None)
        if old is not None:
            self.retention.drop(job, old)
        client.remember("put_value", payload.token, _bare(value))
        return value

    @writes(of_job=True)
    def stored(self, job_id: str, serial: int, token: str, name: str) -> bool:
        """The payload `token`, published with this serial, lies in the durable store now, under this name. False:
        nobody needs it any more."""
        job = self.registry.known_job(job_id)
        for versions in job.rollouts.values():
            for at, located in enumerate(versions):
                if (located.serial, located.payload.token) == (serial, token):
                    versions[at] = found = replace(located, payload=replace(located.payload, stored=name))
                    self.retention.note_stored(job, found)
                    position = job.positions.get(found.rollout_id)
                    source = job.sources.get(-1 if position is None else position)
                    if position is not None and source is not None and source.token == found.payload.token:
                        job.sources[position] = found.payload
                    if found.rollout_id in job.done:
                        self.retention.shed(job, found.rollout_id)
                    return True
        for key, value in job.values.items():
            if (value.serial, value.payload.token) == (serial, token):
                job.values[key] = kept = replace(value, payload=replace(value.payload, stored=name))
                self.retention.note_stored(job, kept)
                return True
        if job.complete:  # else it may be of a vault that is taken back; what nobody needs is collected
            self.garbage.store_drops.append((job_id, name))
            job.closed = False  # its store is asked once more, to free that
        return False

    @reads(of_job=True)
    def get(self, job_id: str, rollout_id: int, version: int | None = None) -> Located:
        """Where a published version lies (default: the newest), without a lease. Raises RolloutNotFound."""
        return self.version(self.registry.known_job(job_id), check_rollout_id(rollout_id), version)

    @writes(of_job=True)
    def read(self, job_id: str, rollout_id: int) -> Located:
        """Like `get` of the newest version, for a reader that belongs to no group. Where none reads the job and
        retention begins with publication, it begins anew with this reading."""
        located = self.get(job_id, rollout_id)
        job = self.registry.jobs[job_id]
        if rollout_id in job.done and is_unread(job):
            job.done[rollout_id] = self.history.age(job)
            known = job.progress.get(rollout_id)
            if known is not None and known.state == PUBLISHED:
                job.claimed, job.acked = job.claimed + 1, job.acked + 1
                for what in ("claimed", "acked"):
                    self.history.count_bytes(job, what, located.payload.nbytes)
                self.history.note(job, rollout_id, ACKED, claimed=self.registry.wall(), acked=self.registry.wall())
        return located

    @reads(of_job=True)
    def catalog(self, job_id: str | None = None) -> list[Located]:
        """Newest version of every rollout that can be read, by job and id."""
        jobs = self.registry.jobs.values() if job_id is None else [self.registry.known_job(job_id)]
        return [job.rollouts[r][-1] for job in sorted(jobs, key=lambda j: j.job_id) for r in sorted(job.rollouts)]

    @reads(of_job=True)
    def listed(self, job_id: str | None = None) -> dict[str, list[int]]:
        """Ids of every rollout that can be read, in order, by job: the catalogue without its records, which for
        thousands of rollouts take longer to send than a client likes to wait."""
        jobs = self.registry.jobs.values() if job_id is None else [self.registry.known_job(job_id)]
        return {job.job_id: sorted(job.rollouts) for job in jobs}

    @reads(of_job=True)
    def versions(self, job_id: str, rollout_id: int) -> list[Located]:
        """Every version of a rollout that can be read, oldest first. Raises RolloutNotFound."""
        self.get(job_id, rollout_id)
        return [*self.registry.jobs[job_id].rollouts[rollout_id]]

    @reads(of_job=True)
    def store_uri(self, job_id: str) -> str | None:
        """URI of the job's durable store, with its password: for a reader of what lies there alone."""
        return self.registry.known_job(job_id).store

    @reads(of_job=True)
    def get_value(self, job_id: str, key: str, newer_than: int | None = None) -> LocatedValue | None:
        """Newest value of `key`; None if there is none, or none newer than `newer_than`."""
        job = self.registry.jobs.get(job_id)
        value = job.values.get(key) if job else None
        return value if value is not None and (newer_than is None or value.version > newer_than) else None

    def payload_lost(self, job_id: str, token: str) -> str | None:
        """A payload is gone with its vault. Returns what it was, in words; None: nobody knows it (any more)."""
        job = self.registry.jobs.get(job_id)
        if job is None:
            return None
        held: list[Located | LocatedValue] = [v for versions in job.rollouts.values() for v in versions]
        found = [one for one in [*held, *job.values.values()] if one.payload.token == token]
        return self._lose(job, found[0]) if found else None

    def not_stored(self, job_id: str, names: Collection[str]) -> tuple[list[str], list[Located | LocatedValue]]:
        """The durable store of a job has lost payloads of these names. What no vault holds is lost with them. Returns
        that, in words, and the newest version of what vaults hold, to be stored again."""
        job = self.registry.known_job(job_id)
        lost, held = list[str](), list[Located | LocatedValue]()
        for number, source in [*job.sources.items()]:
            if source.stored in names or source_name(source.stored) in names:
                if source.vault or not source.source_apart:
                    job.sources[number] = replace(source, stored="")
                else:
                    del job.sources[number]
                    lost.append(f"where the source of prompts stood after its generation {number}")
        for versions in [*job.rollouts.values()]:
            for at, located in reversed([*enumerate(versions)]):
                if located.payload.stored not in names:
                    continue
                if not located.payload.vault:
                    lost.append(self._lose(job, located, "its durable store lost it, and no vault holds it"))
                else:
                    versions[at] = kept = replace(located, payload=replace(located.payload, stored=""))
                    job.records.pop(kept.serial, None)
                    held.append(kept)
        for key, value in [*job.values.items()]:
            if value.payload.stored in names:
                job.values[key] = again = replace(value, payload=replace(value.payload, stored=""))
                job.records.pop(again.serial, None)
                held.append(again)
        return lost[::-1], held

    def vault_lost(self, name: str, incarnation: str = "") -> dict[str, list[str]]:
        """The vault `name` died; what it held is gone, but for its new `incarnation`. Returns job id -> what."""
        lost: dict[str, list[str]] = {}
        for job in self.registry.jobs.values():
            gone: list[Located | LocatedValue] = [v for versions in job.rollouts.values() for v in versions]
            gone += job.values.values()
            gone = [g for g in gone if not g.payload.stored]
            gone = [g for g in gone if _is_of(g.payload.vault, name) and g.payload.vault != f"{name}/{incarnation}"]
            if gone:
                lost[job.job_id] = [self._lose(job, one) for one in gone]
        return lost

    def vaults(self) -> set[str]:
        """Names of the vaults that hold something."""
        jobs = self.registry.jobs.values()
        held = [v.payload for job in jobs for versions in job.rollouts.values() for v in versions]
        held += [value.payload for job in jobs for value in job.values.values()]
        return {payload.vault.partition("/")[0] for payload in held if payload.vault}

    def put_back(self, job: Job, record: Located | LocatedValue) -> None:
        """A vault still holds this; records come in the order of their serials."""
        freed = isinstance(record, Located) and record.rollout_id in job.freed
        if record.serial in job.over or freed:  # the vault was not told yet, or was silent then
            self.retention.drop(job, record)
        elif isinstance(record, LocatedValue):
            old = job.values.get(record.key)
            if old is not None:
                self.retention.drop(job, old)
            job.values[record.key] = record
            self.retention.note_stored(job, record)
            job.lost_values.pop(record.key, None)
        else:
            known = record.rollout_id in job.positions or record.rollout_id in job.done
            self._add_version(job, record)
            if not known:
                self.prompts.take_position(job, record.rollout_id, record.payload)
            elif (position := job.positions.get(record.rollout_id)) is not None:
                if position == job.frontier or position in job.sources:
                    job.sources[position] = record.payload
                else:
                    self.prompts.drop_source(job, record.payload)
            self.retention.cover(job, record.rollout_id)
        job.serial = max(job.serial, record.serial + 1)

    def take_back(self, record: Located | LocatedValue) -> bool:
        """A vault that was given up answers again, and holds this. True: it is needed, and can be had again; False:
        nobody needs it, it was freed, or was generated again."""
        job, payload = self.registry.jobs.get(record.job_id), record.payload
        if job is None:
            return False
        if isinstance(record, LocatedValue):
            there = job.values.get(record.key)
            if there is not None:
                return there.payload.token == payload.token and there.payload.vault == payload.vault
            lost = job.lost_values.get(record.key)
            if lost is None or lost.payload.token != payload.token:
                return False
            self.put_back(job, record)
            return True
        versions = [v.payload for v in job.rollouts.get(record.rollout_id, [])]
        if versions or record.rollout_id not in job.lost:
            return any(v.token == payload.token and v.vault == payload.vault for v in versions)
        if record.serial in job.over or record.published_at < job.began:  # or of a job that had this name before
            return False
        self.put_back(job, record)
        self.history.note(job, record.rollout_id, "" if record.rollout_id in job.done else PUBLISHED)
        return True

    def reconcile(self, job: Job) -> list[int]:
        """After the last `put_back`: what no vault holds any more is lost; returned are the ids."""
        job.held_bytes = sum(in_memory(v.payload) for versions in job.rollouts.values() for v in versions)
        gone = [rollout_id for rollout_id in job.readable if rollout_id not in job.rollouts]
        for rollout_id in gone:
            self._missing(job, rollout_id)
        for group in job.groups.values():
            group.ready = sorted(r for r in job.rollouts if r not in group.acked and r not in group.leases)
        return gone

    def version(self, job: Job, rollout_id: int, version: int | None) -> Located:
        versions = job.rollouts.get(rollout_id)
        if versions is None:
            state = "is not published"
            if rollout_id in job.freed:
                state = f"was {_why_freed(job, rollout_id)}"
            elif rollout_id in job.lost:
                state = "was lost with its vault: demand it, and it is generated again"
            raise RolloutNotFound(f"rollout {rollout_id} of job {job.job_id} {state}")
        if version is None:
            return versions[-1]
        for located in versions:
            if located.version == version:
                return located
        there = ", ".join(str(v.version) for v in versions)
        raise RolloutNotFound(f"rollout {rollout_id} of job {job.job_id} has versions {there}, not {version}")

    def note_open(self, job: Job, rollout_id: int) -> None:
        """It was acked, or being generated, and is not any more."""
        state = PUBLISHED if rollout_id in job.rollouts else LOST if rollout_id in job.lost else DEMANDED
        if state == DEMANDED and rollout_id not in job.demands:
            job.progress.pop(rollout_id, None)
        else:
            self.history.note(job, rollout_id, state, acked=0.0)

    def _add_version(self, job: Job, located: Located) -> None:
        """A version is there to be had."""
        rollout_id = located.rollout_id
        if rollout_id not in job.rollouts:
            for group in job.groups.values():
                if rollout_id not in group.acked and rollout_id not in group.leases:
                    heapq.heappush(group.ready, rollout_id)
        job.rollouts.setdefault(rollout_id, []).append(located)
        self.retention.note_stored(job, located)
        job.held_bytes += in_memory(located.payload)
        job.ever.add(rollout_id)
        job.readable.add(rollout_id)
        if located.version > 1:
            job.again[rollout_id] = max(located.version, job.again.get(rollout_id, 0))
        job.demands.discard(rollout_id)
        job.lost.discard(rollout_id)
        if rollout_id in job.done:
            self.retention.shed(job, rollout_id)

    def _note_published(self, job: Job, located: Located) -> None:
        payload, reward = located.payload, located.payload.meta.get("reward")
        facts = {name: getattr(payload, name) for name in ("nbytes", "num_samples", "weight_version")}
        facts |= {"made": payload.made_at, "published": located.published_at, "version": located.version}
        if isinstance(reward, (int, float)) and math.isfinite(reward):
            facts["reward"] = float(reward)
        settled = located.rollout_id in job.done
        self.history.note(job, located.rollout_id, "" if settled else PUBLISHED, **facts)
        self.history.count_bytes(job, "published", payload.nbytes)

    def _lies_at(self, job: Job, located: Located, payload: Payload) -> Located:
        """The same version is handed over again, by the vault of `payload`: where it lies from now on."""
        old = located.payload
        if old.vault == payload.vault:
            return located
        shed = not old.vault  # acked since, and kept in the durable store alone
        over = payload if shed else old
        if shed or not _is_of(payload.vault, old.vault.partition("/")[0]):  # else that vault was restarted
            self.garbage.drops += [(over.vault, over.token), (over.vault, f"{over.token}.source")][
                : 1 + over.source_apart
            ]
        if over.stored and old.stored != payload.stored:
            names = [over.stored, source_name(over.stored)][: 1 + over.source_apart]
            self.garbage.store_drops += [(job.job_id, name) for name in names]
        if shed:
            return located
        position = job.positions.get(located.rollout_id, -1)
        if position in job.sources and job.sources[position].token == old.token:
            job.sources[position] = payload
        located = replace(located, payload=payload)
        self.retention.note_stored(job, located)
        return located

    def _lose(self, job: Job, gone: Located | LocatedValue, why: str = "it went with its vault") -> str:
        """A version is gone; the rollout with it, if that was the last one. Returns what it was."""
        job.over.add(gone.serial)
        job.records.pop(gone.serial, None)
        if isinstance(gone, LocatedValue):
            job.lost_values[gone.key] = job.values.pop(gone.key)
            return f"{gone.key} version {gone.version}"
        rollout_id = gone.rollout_id
        job.rollouts[rollout_id].remove(gone)
        job.held_bytes -= in_memory(gone.payload)
        if not job.rollouts[rollout_id]:
            del job.rollouts[rollout_id]
            self._missing(job, rollout_id, why)
        return f"rollout {rollout_id} version {gone.version}"

    def _missing(self, job: Job, rollout_id: int, why: str = "it went with its vault") -> None:
        """No version of it is left."""
        job.readable.discard(rollout_id)
        if rollout_id not in job.done:  # else it has taken effect: nobody misses it, unless training goes back
            job.lost.add(rollout_id)
            job.losses += 1
            known = job.progress.get(rollout_id)
            self.history.note(job, rollout_id, LOST, losses=(known.losses if known else 0) + 1)
            self.history.event(job, "lost", why, rollout_id)


def _why_freed(job: Job, rollout_id: int) -> str:
    if rollout_id not in job.skipped:
        known = job.progress.get(rollout_id)
        unread = known is not None and not known.acked
        return "freed without an ack, when its consumers had finished" if unread else "acked and freed"
    return "freed, as its retention says" if job.retain_from == PUBLICATION else "dropped, too stale"


def _is_of(vault: str, name: str) -> bool:
    return vault.partition("/")[0] == name


def _bare(record: _Record) -> _Record:
    """What is remembered of an answer: all but what the retry says again, which may be large."""
    return replace(record, payload=Payload("", "", 0, weight_version=record.payload.weight_version))


def _alike(old: Payload, new: Payload) -> bool:
    """Whether two payloads can be equal: all that can be told without their bytes."""
    same = all(getattr(old, f) == getattr(new, f) for f in ("nbytes", "parts", "num_samples", "weight_version"))
    return same and json.dumps(old.meta, sort_keys=True) == json.dumps(new.meta, sort_keys=True)  # NaN equals NaN here
