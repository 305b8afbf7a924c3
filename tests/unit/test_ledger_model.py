"""The ledger against a model of lists and dicts (ledger_model.py), step by step, in orders that nobody would think of.

Every rule does the same to both and compares what they say; the invariants compare what they hold. Vaults die, clients
too, training goes back to checkpoints, and the ledger itself is made anew from what vaults remember.
"""

import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import invariant, precondition, rule

from slime.cross_job.errors import JobNotFound, NotOwner, Refused, RolloutNotFound
from slime.cross_job.ledger import Ledger
from slime.cross_job.ledger.records_json import decode, encode
from slime.cross_job.ledger.snapshot import Snapshot, restore, snapshot
from slime.cross_job.ledger.state import TABLES
from slime.cross_job.ledger.tables import Mark
from slime.cross_job.types import Payload
from tests.unit.ledger_clients import FEW, GRACE, INDEX, JOB, KEYS, PERHAPS_FEW, ROLLOUT_IDS, VAULTS
from tests.unit.ledger_invariants import Invariants
from tests.unit.ledger_model import Life, Someone


def as_json(found: Snapshot) -> Snapshot:
    """The same, as a durable store would give it back."""
    job, clients = decode(encode((found.job, found.clients)))
    return replace(found, job=job, clients=clients)


class LedgerAgainstModel(Invariants):
    """See the module."""

    steps = 0  # of all runs

    def __init__(self) -> None:
        super().__init__()
        self.copies: dict[str, dict[int, Any]] = {name: {} for name in TABLES}  # the tables, as a vault has them
        self.marks: dict[str, Mark] = {}

    # ------------------------------------------------------------------ producer

    @rule(who=INDEX, rollout_id=ROLLOUT_IDS, weight_version=PERHAPS_FEW)
    def publish(self, who: int, rollout_id: int, weight_version: int | None) -> None:
        self.record(self.choose(who, "producer"), rollout_id, self.new_payload(weight_version))

    @rule(weight_version=PERHAPS_FEW, start=PERHAPS_FEW)
    def generate_what_is_demanded(self, weight_version: int | None, start: int | None) -> None:
        producer = self.producer()
        if producer is not None and producer.attached:
            wanted = self.next_demand_of(producer, start, None, 0.0)
            if wanted is not None:
                self.record(producer, wanted, self.new_payload(weight_version))

    @rule(who=INDEX, rollout_id=st.integers(0, 9), by_all_groups=st.booleans())
    def a_step_of_training(self, who: int, rollout_id: int, by_all_groups: bool) -> None:
        """Demanded, published, claimed and acked, as far as each can be done."""
        self.demand_as(self.choose(who, "consumer"), rollout_id)
        self.record(self.producer(), rollout_id, self.new_payload(rollout_id))
        takers = [self.choose(who, "consumer")]
        if by_all_groups and self.life is not None:
            takers = [member for group in self.life.groups for member in self.life.live(group)[:1]]
        for taker in takers:
            if taker is not None:
                self.take(taker, rollout_id, None, 0.0)
                self.ack_as(taker, rollout_id)

    @precondition(lambda self: self.life is not None and self.life.settings["max_staleness"] is not None)
    @rule(who=INDEX, rollout_id=ROLLOUT_IDS, claimed_first=st.booleans(), by_id=st.booleans())
    def a_rollout_grows_old(self, who: int, rollout_id: int, claimed_first: bool, by_id: bool) -> None:
        """Published, perhaps claimed by one of a group, while training goes on; then another one asks for it."""
        self.record(self.producer(), rollout_id, self.new_payload(self.the_life().weights))
        first, then = self.choose(who, "consumer"), self.choose(who + 1, "consumer")
        if first is not None and then is not None:
            if claimed_first:
                self.take(first, rollout_id, None, 0.0)
            for _ in range(2):
                self.put_value_as(first, "weights", None, again=False)
            self.take(then, rollout_id if by_id else None, None, 0.0)

    @rule(who=INDEX, rollout_id=ROLLOUT_IDS, version=FEW)
    def publish_again(self, who: int, rollout_id: int, version: int) -> None:
        """A retry: the token of some version that is there."""
        producer, versions = self.choose(who, "producer"), self.versions(rollout_id)
        if producer is not None and producer.attached and versions:
            version = [*versions][version % len(versions)]
            recorded, located = self.ledger.publish(producer.name, rollout_id, versions[version])
            assert (recorded, located.version, located.payload) == (True, version, versions[version])

    @rule(which=st.integers(1, 4))
    def publish_one_of_the_newest_again(self, which: int) -> None:
        """A retry by one of some threads, because the answer was lost: its vault died since, or it was acked, or given
        up."""
        producer, life = self.producer(), self.the_life() if self.life else Life()
        if producer is None or not producer.attached or len(self.recent) < which:
            return
        name, rollout_id, version, payload = self.recent[-which]
        if name != producer.name:
            return
        payload = replace(payload, vault=self.incarnation_of(payload.vault.partition("/")[0]))
        recorded, located = self.ledger.publish(producer.name, rollout_id, payload)
        assert (recorded, located.version, located.payload.token) == (True, version, payload.token)
        if version in self.versions(rollout_id):
            self.payloads[payload.token] = payload
            if self.versions(rollout_id)[version].vault:
                self.versions(rollout_id)[version] = payload
                self.records[payload.token] = located
                life.ends[life.turns[rollout_id]].append(payload)
            else:  # this vault is told that nobody needs its copy
                self.told[payload.token] -= 1
            return
        token = payload.token
        self.told[token] -= token not in self.lost or token in self.shed  # the vault has it again: to be had, or freed
        self.shed.discard(token)
        life.shed_tokens = [other for other in life.shed_tokens if other != token]
        self.lost.discard(payload.token)
        self.payloads[payload.token], self.records[payload.token] = payload, located
        newer = [other for other in life.readable.get(rollout_id, {}) if other > version]
        if version and not newer and (rollout_id in life.lost or rollout_id in life.readable):
            life.shelve(rollout_id, version, payload)
            life.settle(self.now)

    @rule(rollout_id=ROLLOUT_IDS, weight_version=PERHAPS_FEW)
    def publish_what_may_be_equal(self, rollout_id: int, weight_version: int | None) -> None:
        producer, versions = self.producer(), self.versions(rollout_id)
        if producer is None or not producer.attached or not versions:
            return
        payload, newest = self.new_payload(weight_version), versions[max(versions)]
        if (newest.weight_version, newest.nbytes) == (weight_version, payload.nbytes):
            recorded, located = self.ledger.publish(producer.name, rollout_id, payload, compare=True)
            assert (recorded, located.payload) == (False, newest)
        else:
            self.record(producer, rollout_id, payload, compare=True)

    def record(self, producer: Someone | None, rollout_id: int, payload: Payload, compare: bool = False) -> None:
        if producer is None:
            return
        life = self.the_life()
        error = producer.barred or (Refused if rollout_id in life.freed else None)
        found = self.compare(lambda: self.ledger.publish(producer.name, rollout_id, payload, compare), error)
        if error is not None:
            return
        recorded, located = found
        assert recorded
        assert (located.rollout_id, located.epoch, located.payload) == (rollout_id, producer.epoch, payload)
        self.payloads[payload.token] = payload
        begun, resumed = life.begun.pop(rollout_id, (None, life.resumed))
        older = None not in (begun, payload.weight_version) and payload.weight_version < begun
        if older and resumed < life.resumed:
            assert located.version == 0, "generated by weights of a history that is void"
            self.recent.append((producer.name, rollout_id, 0, payload))
            return
        assert located.version == life.record(rollout_id, payload), "a number never means two contents"
        self.recent.append((producer.name, rollout_id, located.version, payload))
        self.records[payload.token] = located
        life.settle(self.now)

    @rule(who=INDEX, start=PERHAPS_FEW, until=st.none() | st.integers(1, 7), grace_s=GRACE)
    def next_demand(self, who: int, start: int | None, until: int | None, grace_s: float) -> None:
        producer = self.choose(who, "producer")
        if producer is not None:
            self.next_demand_of(producer, start, until, grace_s)

    def next_demand_of(self, producer: Someone, start: int | None, until: int | None, grace_s: float) -> int | None:
        life = self.the_life()
        error, wanted = producer.barred, None
        if error is None:
            error, wanted = life.next_wanted(self.now, start, until, grace_s)
        found = self.compare(lambda: self.ledger.next_demand(producer.name, start, until, grace_s), error)
        assert found == wanted
        if found is not None:
            assert found not in life.readable
            assert found not in life.freed
            assert until is None or found < until
            life.begun[found] = (life.weights, life.resumed)
        return found

    @rule(wanted=st.sampled_from(["running", "running", "paused", "draining"]))
    def control(self, wanted: str) -> None:
        if self.life is not None:
            assert self.ledger.control(JOB, wanted) == self.life.control
            self.life.control = wanted

    # ------------------------------------------------------------------ consumers

    @rule(who=INDEX, rollout_id=ROLLOUT_IDS)
    def demand(self, who: int, rollout_id: int) -> None:
        self.demand_as(self.choose(who, "consumer"), rollout_id)

    def demand_as(self, person: Someone | None, rollout_id: int) -> None:
        if person is None:
            return
        life = self.the_life()
        error = person.barred or (RolloutNotFound if rollout_id in life.freed else None)
        self.compare(lambda: self.ledger.demand(person.name, rollout_id), error)
        if error is None:
            life.demanded.append((person.group, rollout_id))
            life.drivers.append(person.group)
            if rollout_id not in life.readable and rollout_id not in life.settled:
                life.wanted.add(rollout_id)

    @rule(who=INDEX, grace_s=GRACE)
    def claim_next(self, who: int, grace_s: float) -> None:
        self.take(self.choose(who, "consumer"), None, None, grace_s)

    @rule(who=INDEX, token=st.sampled_from(["a", "b"]), grace_s=GRACE)
    def claim_next_with_token(self, who: int, token: str, grace_s: float) -> None:
        """As a thread of the client does, perhaps again because the answer was lost."""
        self.take(self.choose(who, "consumer"), None, None, grace_s, token)

    @rule(who=INDEX, rollout_id=ROLLOUT_IDS, grace_s=GRACE)
    def claim(self, who: int, rollout_id: int, grace_s: float) -> None:
        self.take(self.choose(who, "consumer"), rollout_id, None, grace_s)

    @rule(who=INDEX, rollout_id=ROLLOUT_IDS, version=st.integers(-1, 4))
    def claim_version(self, who: int, rollout_id: int, version: int) -> None:
        self.take(self.choose(who, "consumer"), rollout_id, version, 0.0)

    def take(
        self, person: Someone | None, rollout_id: int | None, version: int | None, grace_s: float, token: str = ""
    ) -> None:
        if person is None:
            return
        life = self.the_life()
        error, expected = person.barred, None
        if error is None:
            held = life.held_with(person, token)
            error, expected = life.to_be_claimed(
                self.now, person, rollout_id if held is None else held, version, grace_s
            )
        found = self.compare(lambda: self.ledger.claim(person.name, rollout_id, version, grace_s, token), error)
        assert (found and (found.rollout_id, found.version)) == expected
        if found is None:
            return
        place = (person.group, found.rollout_id)
        assert place not in life.acked, "an acked rollout is never handed to its group again"
        assert life.leases.get(place, (person.name, 0))[0] == person.name, "one owner in a group"
        assert found.payload == life.readable[found.rollout_id][found.version]
        life.counts["claimed"] += place not in life.leases
        life.leases[place] = (person.name, found.version)
        life.asked_with[place] = token

    @rule(who=INDEX, rollout_id=ROLLOUT_IDS, release=st.booleans())
    def ack_or_release_what_may_not_be_mine(self, who: int, rollout_id: int, release: bool) -> None:
        person = self.choose(who, "consumer")
        if person is not None:
            (self.release_as if release else self.ack_as)(person, rollout_id)

    @precondition(lambda self: self.life is not None and self.life.leases)
    @rule(which=INDEX, twice=st.booleans())
    def ack(self, which: int, twice: bool) -> None:
        person, rollout_id = self.lease(which)
        for _ in range(1 + twice):
            self.ack_as(person, rollout_id)

    @precondition(lambda self: self.life is not None and self.life.leases)
    @rule(which=INDEX)
    def release(self, which: int) -> None:
        self.release_as(*self.lease(which))

    def ack_as(self, person: Someone, rollout_id: int) -> None:
        life = self.the_life()
        error, over = life.may_ack(person, rollout_id)
        self.compare(lambda: self.ledger.ack(person.name, rollout_id), error)
        if error is None and not over:
            del life.leases[person.group, rollout_id]
            life.acked.add((person.group, rollout_id))
            life.counts["acked"] += 1
            life.settle(self.now)

    def release_as(self, person: Someone, rollout_id: int) -> None:
        life = self.the_life()
        place = (person.group, rollout_id)
        mine = life.leases.get(place, ("",))[0] == person.name
        error = person.barred or (None if mine else NotOwner)
        self.compare(lambda: self.ledger.release(person.name, rollout_id), error)
        if error is None:
            life.give_back(place)

    @rule(who=INDEX, rollout_id=st.integers(0, 7))
    def resume(self, who: int, rollout_id: int) -> None:
        """A consumer goes on from a checkpoint, which covers every rollout below."""
        person = self.choose(who, "consumer")
        if person is None:
            return
        life = self.the_life()
        error = person.barred or life.may_resume(person, rollout_id)
        found = self.compare(lambda: self.ledger.resume(person.name, rollout_id), error)
        if error is None:
            for other in life.live(person.group):
                if other is not person:
                    self.leave(other, "dead")
            assert found == life.resume(person, rollout_id, self.now)

    @rule(who=INDEX, rollout_id=ROLLOUT_IDS)
    def unreadable(self, who: int, rollout_id: int) -> None:
        person = self.choose(who, "consumer")
        if person is None:
            return
        life = self.the_life()
        self.compare(lambda: self.ledger.unreadable(person.name, rollout_id), person.barred)
        if person.attached:
            if life.leases.get((person.group, rollout_id), ("",))[0] == person.name:
                life.give_back((person.group, rollout_id))
            if rollout_id in life.lost and person.group in life.driving():
                life.wanted.add(rollout_id)

    # ------------------------------------------------------------------ anybody

    @rule(key=st.sampled_from(KEYS), newer_than=PERHAPS_FEW, rollout_id=ROLLOUT_IDS, version=st.integers(-1, 3))
    def look(self, key: str, newer_than: int | None, rollout_id: int, version: int) -> None:
        """Values, versions, sources and verdicts, as everybody sees them."""
        life = self.life or Life()
        found = self.ledger.get_value(JOB, key, newer_than)
        number, payload, _ = life.values.get(key, (-1, None, None))
        there = payload is not None and (newer_than is None or number > newer_than)
        assert (found and (found.version, found.payload)) == ((number, payload) if there else None)
        versions = self.versions(rollout_id)
        wanted = max(versions, default=0) if version < 0 else version
        located = self.compare(
            lambda: self.ledger.get(JOB, rollout_id, None if version < 0 else version),
            None if wanted in versions else RolloutNotFound if self.life else JobNotFound,
        )
        assert located is None or (located.version, located.payload) == (wanted, versions[wanted])
        for person in self.people.values():
            if person.attached and person.role != "writer":
                self.hear_verdict(life, person, rollout_id)
            if person.attached and person.role == "producer":
                turn, before = self.ledger.source_before(person.name, rollout_id)
                expected, sources = life.sources_before(rollout_id)
                assert turn == expected
                assert before in sources

    def hear_verdict(self, life: Life, person: Someone, rollout_id: int) -> None:
        kind = self.ledger.peer_verdict(person.name, rollout_id)["kind"]
        owner = life.leases.get((person.group, rollout_id), (person.name,))[0]
        members = [member for members in life.groups.values() for member in members]
        if person.role == "consumer":
            members = [self.people[owner]] if owner != person.name else life.producers[-1:]
        live = any(member.there(self.now) for member in members)
        held_back = "paused" if life.control == "paused" else "full" if life.full() else ""
        if held_back and (person.role == "producer" or (live and owner == person.name)):
            assert kind == held_back
            return
        assert (kind in ("alive", "slow", "silent")) == live
        assert (kind == "absent") == (not members)

    # ------------------------------------------------------------------ what dies besides clients

    @rule(which=st.sampled_from(VAULTS), restarts=st.booleans())
    def a_vault_dies(self, which: str, restarts: bool) -> None:
        self.incarnations[which] += 1
        told = self.ledger.rollouts.vault_lost(which, str(self.incarnations[which]) if restarts else "")
        gone = self.lose(lambda payload: payload.vault.startswith(which) and not payload.stored)
        assert {job: len(what) for job, what in told.items()} == ({JOB: len(gone)} if gone else {})
        assert self.ledger.rollouts.vault_lost(which, str(self.incarnations[which])) == {}, (
            "the new one holds what it holds"
        )

    @rule(which=st.integers(0, 30))
    def a_payload_is_lost(self, which: int) -> None:
        tokens = [*self.payloads][-12:]
        if tokens:
            token = tokens[which % len(tokens)]
            told = self.ledger.rollouts.payload_lost(JOB, token)
            assert (told is not None) == (self.lose(lambda payload: payload.token == token) == [token])

    def lose(self, gone: Callable[[Payload], bool]) -> list[str]:
        life = self.life or Life()
        tokens = [token for token in life.tokens() if gone(self.payloads[token])]
        for token in tokens:
            life.lose(token)
            self.lost.add(token)
            del self.records[token]
        return tokens

    @rule()
    def a_vault_is_told_what_changed(self) -> None:
        """Its copy of the tables of the job follows them."""
        for name in TABLES if JOB in self.ledger.jobs else ():
            table = getattr(self.ledger.jobs[JOB], name)
            table.since(self.marks.get(name)).apply(self.copies[name])
            self.marks[name] = table.mark()
            assert [*self.copies[name].items()] == [*table.items()], name

    @rule(dies_too=st.none() | st.none() | st.sampled_from(VAULTS), not_yet_freed=st.sets(st.integers(0, 7)))
    def the_broker_restarts(self, dies_too: str | None, not_yet_freed: set[int]) -> None:
        """Vaults still hold what is readable, and perhaps some of what they were to free."""
        self.a_vault_is_told_what_changed()
        kept = [
            pickle.dumps((as_json(snapshot(self.ledger, job_id, 1, self.serial)), self.copies))
            for job_id in self.ledger.jobs
        ]
        if dies_too:
            self.incarnations[dies_too] += 1
        living = {self.incarnation_of(vault) for vault in VAULTS}
        life = self.life or Life()
        to_be_freed = [token for token in self.records if token not in life.tokens()][-8:]
        told = [*life.tokens(), *(token for number, token in enumerate(to_be_freed) if number in not_yet_freed)]
        shed = [p.token for versions in life.readable.values() for p in versions.values() if not p.vault]
        told = [token for token in told if token not in shed]
        held = [record for token, record in self.records.items() if token in told and record.payload.vault in living]
        self.ledger = Ledger(lambda: self.now, wall=lambda: self.now)
        before = {*life.readable}
        missing = restore(
            self.ledger, [pickle.loads(one) for one in kept], [pickle.loads(pickle.dumps(r)) for r in held]
        )
        for record in held:
            if record.payload.token in to_be_freed:
                self.told[record.payload.token] -= 1  # and will be told again
        if dies_too:
            self.lose(lambda payload: payload.vault.startswith(dies_too) and not payload.stored)
        assert missing == ({JOB: sorted(before - {*life.readable})} if before - {*life.readable} else {})
        for person in self.people.values():
            person.last_beat = person.ended_at = self.now
            person.vouched_at = -1.0
            person.state = "live" if person.attached else person.state

    @invariant()
    def a_step_was_taken(self) -> None:
        LedgerAgainstModel.steps += 1


class TestLedgerAgainstModel(LedgerAgainstModel.TestCase):  # type: ignore[misc,name-defined]
    settings = settings(max_examples=1000, stateful_step_count=60, deadline=None, report_multiple_bugs=False)

    def runTest(self) -> None:
        LedgerAgainstModel.steps = 0
        super().runTest()
        assert LedgerAgainstModel.steps >= 10_000
