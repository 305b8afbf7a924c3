"""The ledger against a model of lists and dicts, step by step, in orders that nobody would think of.

The model says what ARCHITECTURE.md promises, not how the ledger keeps it: it derives everything anew from what
happened (who acked what, who was demanded) where the ledger keeps heaps, counters and an order of its own.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from slime.cross_job.errors import (
    BrokerLost,
    EndOfStream,
    Fenced,
    JobIdTaken,
    NotOwner,
    PeerFailed,
    Refused,
    RolloutNotFound,
)
from slime.cross_job.ledger import Ledger
from slime.cross_job.types import ClientInfo, Payload

JOB = "exp"
GROUPS = ("train", "train", "archive")  # as often as they are drawn
KEYS = ("weights", "tokenizer")
DEAD_AFTER_S = 30.0
MOST_CONSUMERS = 3

_index = st.integers(0, 5)
_rollout_ids = st.integers(0, 5)
_grace = st.sampled_from([0.0, 10.0])
_few = st.integers(0, 2)
_perhaps_few = st.none() | _few


@dataclass
class Someone:
    """A client as the model knows it."""

    name: str
    role: str
    group: str
    ray_job: str
    epoch: int
    last_beat: float
    stated: dict[str, int]
    state: str = "live"
    ended_at: float = 0.0


@dataclass
class Life:
    """A job from its first client until it is complete or forgotten."""

    max_ahead: int = 0
    retain: int = 0
    producers: list[Someone] = field(default_factory=list)
    groups: dict[str, list[Someone]] = field(default_factory=dict)  # members, in the order in which they came
    ended: list[Someone] = field(default_factory=list)  # in the order in which they ended
    rollouts: dict[int, list[Payload]] = field(default_factory=dict)  # what can be read, by first publication
    published: list[int] = field(default_factory=list)  # ids, each time again
    demanded: list[tuple[str, int]] = field(default_factory=list)  # (group, id)
    leases: dict[tuple[str, int], tuple[str, int]] = field(default_factory=dict)  # (group, id) -> (client, version)
    acked: list[tuple[str, int]] = field(default_factory=list)  # (group, id), for ever
    settled: list[int] = field(default_factory=list)  # readable, acked by every open group; by when
    values: dict[str, tuple[int, Payload]] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    complete: bool = False

    def live(self, group: str) -> list[Someone]:
        return [member for member in self.groups[group] if member.state == "live"]

    def left_last(self, group: str) -> Someone:
        return [who for who in self.ended if who.role == "consumer" and who.group == group][-1]

    def closed(self, group: str) -> bool:
        return not self.live(group) and self.left_last(group).state == "finished"

    def open_groups(self) -> list[str]:
        return [group for group in self.groups if not self.closed(group)]

    def freed(self) -> set[int]:
        return set(self.published) - set(self.rollouts)

    def is_settled(self, rollout_id: int) -> bool:
        acked_by = {group for group, acked in self.acked if acked == rollout_id}
        return bool(acked_by) and acked_by >= set(self.open_groups())


class LedgerAgainstModel(RuleBasedStateMachine):
    """Every rule does the same to both and compares what they say; the invariants compare what they hold."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.ledger = Ledger(lambda: self.now, wall=lambda: self.now)
        self.people: dict[str, Someone] = {}  # known to the ledger
        self.life: Life | None = None
        self.serial = 0
        self.dropped: list[Payload] = []  # by the model
        self.tokens: list[str] = []  # everything that was ever recorded
        self.told: list[str] = []  # by take_drops

    # ------------------------------------------------------------------ members

    @initialize(max_ahead=_few, retain=_few, second=st.none() | st.sampled_from(GROUPS))
    def a_job_begins(self, max_ahead: int, retain: int, second: str | None) -> None:
        self.attach_producer(takes_over=False, max_ahead=max_ahead, retain=retain)
        self.attach_consumer(group=GROUPS[0], max_ahead=None)
        if second is not None:
            self.attach_consumer(group=second, max_ahead=None)

    @rule(takes_over=st.booleans(), max_ahead=_perhaps_few, retain=st.none())
    def attach_producer(self, takes_over: bool, max_ahead: int | None, retain: int | None) -> None:
        old = self.producer()
        holds = old is not None and old.state == "live"
        if holds and takes_over:
            max_ahead = retain = None
        ray_job = old.ray_job if old and takes_over else ""
        refused = JobIdTaken if holds and not takes_over else None
        if self.attach("producer", "", ray_job, refused, max_ahead=max_ahead, retain=retain) and holds:
            self.leave(old, "dead")

    @precondition(
        lambda self: sum(p.role == "consumer" and p.state == "live" for p in self.people.values()) < MOST_CONSUMERS
    )
    @rule(group=st.sampled_from(GROUPS), max_ahead=st.none() | st.none() | _few)
    def attach_consumer(self, group: str, max_ahead: int | None) -> None:
        self.attach("consumer", group, "", None, max_ahead=max_ahead)

    @precondition(lambda self: sum(person.role == "writer" for person in self.people.values()) < 2)
    @rule()
    def attach_writer(self) -> None:
        self.attach("writer", "", "", None)

    @precondition(
        lambda self: not {"producer", "consumer"} <= {p.role for p in self.people.values() if p.state == "live"}
    )
    @rule(group=st.sampled_from(GROUPS))
    def whoever_is_missing_comes_back(self, group: str) -> None:
        roles = [person.role for person in self.people.values() if person.state == "live"]
        if "producer" not in roles:
            self.attach("producer", "", "", None)
        if "consumer" not in roles:
            self.attach("consumer", group, "", None)

    @rule(who=_index)
    def attach_again(self, who: int) -> None:
        """A client asks a second time, because the broker's answer was lost."""
        person = self.choose(who, live=True)
        if person is not None:
            granted = self.ledger.attach(self.info(person), dead_after_s=DEAD_AFTER_S)
            if person.role != "producer":  # which replaces itself: another epoch, the same client
                assert granted["epoch"] == person.epoch
            person.epoch, person.last_beat = granted["epoch"], self.ledger.clients[person.name].last_beat

    def attach(
        self, role: str, group: str, ray_job: str, refused: type[Refused] | None, **stated: int | None
    ) -> Someone | None:
        self.serial += 1
        name = f"{role}{self.serial}"
        said = {key: value for key, value in stated.items() if value is not None}
        person = Someone(name, role, group, ray_job or f"ray-{name}", 0, self.now, said)
        begins = self.life is None or self.life.complete
        others = [] if begins else [other for other in self.people.values() if other.state == "live"]
        if any(other.stated.get(key, value) != value for other in others for key, value in said.items()):
            refused = refused or Refused

        def do() -> dict[str, Any]:
            return self.ledger.attach(self.info(person), dead_after_s=DEAD_AFTER_S, **stated)

        if refused:
            self.compare(do, refused)
            return None
        granted = do()
        if begins:
            self.free_everything()
            self.life = Life()
        life = self.life
        assert life is not None
        for key, value in said.items():
            setattr(life, key, value)
        if role == "producer":
            life.producers.append(person)
        elif role == "consumer":
            life.groups.setdefault(group, []).append(person)
        self.people[name] = person
        person.epoch = granted["epoch"]
        assert (granted["max_ahead"], granted["retain"]) == (life.max_ahead, life.retain)
        self.settle()
        return person

    @rule(who=_index, state=st.sampled_from(["finished", "finished", "failed", "dead"]))
    def end(self, who: int, state: str) -> None:
        person = self.choose(who)
        if person is not None:
            self.end_as(person, state)

    @precondition(lambda self: self.life is not None and len(self.life.published) > 2)
    @rule(last_first=st.booleans(), state=st.sampled_from(["finished", "finished", "dead"]), spared=st.none() | _index)
    def all_end(self, last_first: bool, state: str, spared: int | None) -> None:
        """Both sides end, the last of them in `state`; perhaps somebody stays, or a writer, who writes."""
        leaving = [p for p in self.people.values() if p.state == "live" and (p.role != "writer" or spared is None)]
        leaving = [p for number, p in enumerate(leaving) if number != spared]
        for person in leaving[::-1] if last_first else leaving:
            self.end_as(person, state if person is leaving[-1] else "finished")
        for person in self.people.values():
            if person.state == "live" and person.role == "writer":
                self.put_value_as(person, KEYS[1], None, again=False)

    def end_as(self, person: Someone, state: str) -> None:
        self.ledger.end(person.name, state, "as the test wants")
        self.leave(person, state)

    @rule(seconds=st.sampled_from([1.0, 10.0, 19.5]), asleep=st.sets(_index, max_size=2), awake=st.booleans())
    def time_passes(self, seconds: float, asleep: set[int], awake: bool) -> None:
        self.now += seconds
        for number, person in enumerate(self.people.values()):
            if person.state == "live" and (awake or number % 6 not in asleep):
                self.ledger.heartbeat(person.name, "at work")
                person.last_beat = self.now
        late = [p for p in self.people.values() if p.state == "live" and self.now - p.last_beat > DEAD_AFTER_S]
        assert [client.info.client_id for client in self.ledger.tick()] == [person.name for person in late]
        for person in late:
            self.leave(person, "dead")

    @precondition(lambda self: any(person.state != "live" for person in self.people.values()))
    @rule(who=_index)
    def heartbeat(self, who: int) -> None:
        person = self.choose(who)
        if person is not None:
            self.compare(lambda: self.ledger.heartbeat(person.name, "at work"), self.barred(person))
            if person.state == "live":
                person.last_beat = self.now

    @precondition(lambda self: self.serial % 5 == 0 or not any(p.state == "live" for p in self.people.values()))
    @rule()
    def forget(self) -> None:
        live = any(person.state == "live" for person in self.people.values())
        if self.life is None:
            self.compare(lambda: self.ledger.forget(JOB), RolloutNotFound)
        elif live:
            self.compare(lambda: self.ledger.forget(JOB), Refused)
        else:
            gone = [*self.people]
            self.ledger.forget(JOB)
            self.free_everything()
            self.life, self.people = None, {}
            for name in gone[-2:]:
                self.compare(lambda name=name: self.ledger.heartbeat(name, ""), BrokerLost)

    # ------------------------------------------------------------------ producer

    @rule(who=_index, rollout_id=_rollout_ids, weight_version=_perhaps_few)
    def publish(self, who: int, rollout_id: int, weight_version: int | None) -> None:
        self.record(self.choose(who, "producer"), rollout_id, self.new_payload(weight_version))

    @rule(weight_version=_perhaps_few, start=_perhaps_few)
    def generate_what_is_demanded(self, weight_version: int | None, start: int | None) -> None:
        producer = self.producer()
        if producer is not None and producer.state == "live":
            try:
                wanted = self.ledger.next_demand(producer.name, start=start)
            except (EndOfStream, PeerFailed):
                return
            if wanted is not None:
                self.record(producer, wanted, self.new_payload(weight_version))

    @rule(who=_index, rollout_id=st.integers(0, 9), by_all_groups=st.booleans())
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

    @rule(who=_index, rollout_id=_rollout_ids, version=_few)
    def publish_again(self, who: int, rollout_id: int, version: int) -> None:
        """A retry: the token of some version that is there."""
        producer, life = self.choose(who, "producer"), self.life
        if producer is not None and producer.state == "live" and life is not None and rollout_id in life.rollouts:
            version = version % len(life.rollouts[rollout_id])
            payload = life.rollouts[rollout_id][version]
            recorded, located = self.ledger.publish(producer.name, rollout_id, payload)
            assert (recorded, located.version, located.payload) == (True, version + 1, payload)

    @rule(rollout_id=_rollout_ids, weight_version=_perhaps_few)
    def publish_what_may_be_equal(self, rollout_id: int, weight_version: int | None) -> None:
        producer, life = self.producer(), self.life
        if producer is None or producer.state != "live" or life is None or rollout_id not in life.rollouts:
            return
        payload, newest = self.new_payload(weight_version), life.rollouts[rollout_id][-1]
        if newest.weight_version == weight_version:
            recorded, located = self.ledger.publish(producer.name, rollout_id, payload, compare=True)
            assert (recorded, located.payload) == (False, newest)
        else:
            self.record(producer, rollout_id, payload, compare=True)

    def record(self, producer: Someone | None, rollout_id: int, payload: Payload, compare: bool = False) -> None:
        if producer is None:
            return
        error, life = self.barred(producer), self.life
        assert life is not None
        if error is None and rollout_id in life.freed():
            error = Refused
        found = self.compare(lambda: self.ledger.publish(producer.name, rollout_id, payload, compare), error)
        if error is not None:
            return
        recorded, located = found
        versions = life.rollouts.setdefault(rollout_id, [])
        versions.append(payload)
        assert recorded
        assert (located.rollout_id, located.version, located.epoch) == (rollout_id, len(versions), producer.epoch)
        life.published.append(rollout_id)
        life.counts["published"] += 1
        life.counts["republished"] += len(versions) > 1
        self.tokens.append(payload.token)

    @rule(who=_index, start=_perhaps_few, until=st.none() | st.integers(1, 7), grace_s=_grace)
    def next_demand(self, who: int, start: int | None, until: int | None, grace_s: float) -> None:
        producer, life = self.choose(who, "producer"), self.life
        if producer is None or life is None:
            return
        error, wanted = self.barred(producer), None
        if error is None:
            error, wanted = self.wanted(life, start, until, grace_s)
        found = self.compare(lambda: self.ledger.next_demand(producer.name, start, until, grace_s), error)
        if error is not None:
            return
        assert found == wanted
        if found is not None:
            demanded = max((r for _, r in life.demanded), default=-1 if start is None else start - 1)
            assert found not in life.published
            assert found <= demanded + life.max_ahead
            assert until is None or found < until

    def wanted(
        self, life: Life, start: int | None, until: int | None, grace_s: float
    ) -> tuple[type[Exception] | None, int | None]:
        missing = sorted({r for _, r in life.demanded} - set(life.published))
        for rollout_id in missing:
            if until is None or rollout_id < until:
                return None, rollout_id
        base = max((r for _, r in life.demanded), default=None if start is None else start - 1)
        if base is not None:
            ahead = max([base, *life.published]) + 1
            if until is not None and ahead >= until:
                return EndOfStream, None
            if ahead <= base + life.max_ahead:
                return None, ahead
        drivers = [group for group in life.groups if any(g == group for g, _ in life.demanded)] or [*life.groups]
        if drivers and not any(life.live(group) for group in drivers):
            failed = [group for group in drivers if not life.closed(group)]
            if not failed:
                return EndOfStream, None
            if self.now - life.left_last(failed[-1]).ended_at >= grace_s:
                return PeerFailed, None
        return None, None

    # ------------------------------------------------------------------ consumers

    @rule(who=_index, rollout_id=_rollout_ids)
    def demand(self, who: int, rollout_id: int) -> None:
        self.demand_as(self.choose(who, "consumer"), rollout_id)

    def demand_as(self, person: Someone | None, rollout_id: int) -> None:
        life = self.life
        if person is None or life is None:
            return
        error = self.barred(person)
        if error is None and rollout_id in life.freed():
            error = RolloutNotFound
        self.compare(lambda: self.ledger.demand(person.name, rollout_id), error)
        if error is None:
            life.demanded.append((person.group, rollout_id))

    @rule(who=_index, grace_s=_grace)
    def claim_next(self, who: int, grace_s: float) -> None:
        self.take(self.choose(who, "consumer"), None, None, grace_s)

    @rule(who=_index, rollout_id=_rollout_ids, grace_s=_grace)
    def claim(self, who: int, rollout_id: int, grace_s: float) -> None:
        self.take(self.choose(who, "consumer"), rollout_id, None, grace_s)

    @rule(who=_index, rollout_id=_rollout_ids, version=st.integers(-1, 4))
    def claim_version(self, who: int, rollout_id: int, version: int) -> None:
        self.take(self.choose(who, "consumer"), rollout_id, version, 0.0)

    def take(self, person: Someone | None, rollout_id: int | None, version: int | None, grace_s: float) -> None:
        life = self.life
        if person is None or life is None:
            return
        error: type[Exception] | None = self.barred(person)
        expected: tuple[int, int] | None = None
        if error is None:
            error, expected = self.to_be_claimed(life, person, rollout_id, version, grace_s)
        found = self.compare(lambda: self.ledger.claim(person.name, rollout_id, version, grace_s), error)
        if error is not None:
            return
        assert (found and (found.rollout_id, found.version)) == expected
        if found is None:
            return
        place = (person.group, found.rollout_id)
        assert place not in life.acked, "an acked rollout is never handed to its group again"
        assert life.leases.get(place, (person.name, 0))[0] == person.name, "one owner in a group"
        assert found.payload == life.rollouts[found.rollout_id][found.version - 1]
        life.counts["claimed"] += place not in life.leases
        life.leases[place] = (person.name, found.version)

    def to_be_claimed(
        self, life: Life, person: Someone, rollout_id: int | None, version: int | None, grace_s: float
    ) -> tuple[type[Exception] | None, tuple[int, int] | None]:
        group = person.group
        if rollout_id is None:
            untouched = [r for r in life.rollouts if (group, r) not in life.acked and (group, r) not in life.leases]
            if untouched:
                return None, (min(untouched), len(life.rollouts[min(untouched)]))
            others = [owner for (g, _), (owner, _) in life.leases.items() if g == group and owner != person.name]
            return (None if others else self.producer_over(life, grace_s)), None
        if (group, rollout_id) in life.acked or rollout_id in life.freed():
            return RolloutNotFound, None
        if rollout_id not in life.rollouts:
            return self.producer_over(life, grace_s), None
        newest = len(life.rollouts[rollout_id])
        owner, leased = life.leases.get((group, rollout_id), (person.name, newest))
        if owner != person.name:
            return None, None
        if version is not None and not 1 <= version <= newest:
            return RolloutNotFound, None
        return None, (rollout_id, leased if version is None else version)

    def producer_over(self, life: Life, grace_s: float) -> type[Exception] | None:
        last = life.producers[-1] if life.producers else None
        if last is None or last.state == "live":
            return None
        if last.state == "finished":
            return EndOfStream
        return PeerFailed if self.now - last.ended_at >= grace_s else None

    @rule(who=_index, rollout_id=_rollout_ids, release=st.booleans())
    def ack_or_release_what_may_not_be_mine(self, who: int, rollout_id: int, release: bool) -> None:
        person = self.choose(who, "consumer")
        if person is not None:
            (self.release_as if release else self.ack_as)(person, rollout_id)

    @precondition(lambda self: self.life is not None and self.life.leases)
    @rule(which=_index, twice=st.booleans())
    def ack(self, which: int, twice: bool) -> None:
        person, rollout_id = self.lease(which)
        for _ in range(1 + twice):
            self.ack_as(person, rollout_id)

    @precondition(lambda self: self.life is not None and self.life.leases)
    @rule(which=_index)
    def release(self, which: int) -> None:
        self.release_as(*self.lease(which))

    def lease(self, which: int) -> tuple[Someone, int]:
        assert self.life is not None
        (_, rollout_id), (owner, _) = [*self.life.leases.items()][which % len(self.life.leases)]
        return self.people[owner], rollout_id

    def ack_as(self, person: Someone, rollout_id: int) -> None:
        life = self.life
        assert life is not None
        place, error = (person.group, rollout_id), self.barred(person)
        over = place in life.acked or rollout_id in life.freed()
        if error is None and not over and life.leases.get(place, ("",))[0] != person.name:
            error = NotOwner
        self.compare(lambda: self.ledger.ack(person.name, rollout_id), error)
        if error is None and not over:
            del life.leases[place]
            life.acked.append(place)
            life.counts["acked"] += 1
            self.settle()

    def release_as(self, person: Someone, rollout_id: int) -> None:
        life = self.life
        assert life is not None
        place, error = (person.group, rollout_id), self.barred(person)
        if error is None and life.leases.get(place, ("",))[0] != person.name:
            error = NotOwner
        self.compare(lambda: self.ledger.release(person.name, rollout_id), error)
        if error is None:
            del life.leases[place]
            life.counts["requeued"] += 1

    # ------------------------------------------------------------------ anybody

    @rule(who=_index, key=st.sampled_from(KEYS), version=st.none() | st.integers(0, 5), again=st.booleans())
    def put_value(self, who: int, key: str, version: int | None, again: bool) -> None:
        person = self.choose(who)
        if person is not None:
            self.put_value_as(person, key, version, again)

    def put_value_as(self, person: Someone, key: str, version: int | None, again: bool) -> None:
        life = self.life
        assert life is not None
        old_version, old = life.values.get(key, (-1, None))
        again = again and old is not None
        payload = old if again and old is not None else self.new_payload(None)
        number = old_version if again else (old_version + 1 if version is None else version)
        error = self.barred(person)
        if error is None and old is not None and not again and number <= old_version:
            error = Refused
        located = self.compare(lambda: self.ledger.put_value(person.name, key, payload, version), error)
        if error is not None:
            return
        assert (located.version, located.payload) == (number, payload)
        if not again:
            life.values[key] = (number, payload)
            self.tokens.append(payload.token)
            if old is not None:
                self.dropped.append(old)

    @rule(key=st.sampled_from(KEYS), newer_than=_perhaps_few, rollout_id=_rollout_ids, version=st.integers(-1, 3))
    def look(self, key: str, newer_than: int | None, rollout_id: int, version: int) -> None:
        """Values, versions and verdicts, as everybody sees them."""
        life = self.life or Life()
        found = self.ledger.get_value(JOB, key, newer_than)
        number, payload = life.values.get(key, (-1, None))
        there = payload is not None and (newer_than is None or number > newer_than)
        assert (found and (found.version, found.payload)) == ((number, payload) if there else None)
        versions = life.rollouts.get(rollout_id, [])
        wanted = None if version < 0 else version
        there = bool(versions) and (wanted is None or 1 <= wanted <= len(versions))
        located = self.compare(lambda: self.ledger.get(JOB, rollout_id, wanted), None if there else RolloutNotFound)
        if there:
            assert (located.version, located.payload) == (wanted or len(versions), versions[(wanted or 0) - 1])
        for person in self.people.values():
            if person.state == "live" and person.role != "writer":
                self.hear_verdict(life, person, rollout_id)

    def hear_verdict(self, life: Life, person: Someone, rollout_id: int) -> None:
        kind = self.ledger.peer_verdict(person.name, rollout_id)["kind"]
        owner = life.leases.get((person.group, rollout_id), (person.name,))[0]
        members = [member for members in life.groups.values() for member in members]
        if person.role == "consumer":
            members = [self.people[owner]] if owner != person.name else life.producers[-1:]
        live = any(member.state == "live" for member in members)
        assert (kind in ("alive", "slow")) == live
        assert (kind == "absent") == (not members)

    # ------------------------------------------------------------------ invariants

    @invariant()
    def holds(self) -> None:
        self.nothing_is_lost_and_nothing_leaks()
        self.leases_belong_to_the_living_and_to_one_of_a_group()
        self.the_figures_agree()
        self.what_is_over_is_not_remembered()

    def nothing_is_lost_and_nothing_leaks(self) -> None:
        """Every recorded token can be read, or the vault was told once to free it; never both, never neither."""
        self.told += [token for _, token in self.ledger.take_drops()]
        assert self.ledger.take_drops() == []
        readable = [v.payload.token for r in self.ledger.catalog() for v in self.ledger.versions(JOB, r.rollout_id)]
        values = [self.ledger.get_value(JOB, key) for key in KEYS]
        readable += [value.payload.token for value in values if value is not None]
        assert sorted(readable + self.told) == sorted(self.tokens)
        assert Counter(self.told) == Counter(payload.token for payload in self.dropped)

    def leases_belong_to_the_living_and_to_one_of_a_group(self) -> None:
        held = {(g.name, r): lease for g in self.groups() for r, lease in g.leases.items()}
        assert held == (self.life.leases if self.life else {})
        for (group, rollout_id), (owner, version) in held.items():
            assert self.ledger.clients[owner].live
            assert self.ledger.clients[owner].info.group == group
            assert self.ledger.get(JOB, rollout_id, version).version == version

    def the_figures_agree(self) -> None:
        status = self.ledger.status()
        if self.life is None:
            assert status == {}
            return
        life, told = self.life, status[JOB]
        queue = [r for r in life.rollouts if r not in life.settled]
        oldest = life.rollouts[min(queue)][-1].weight_version if queue else None
        newest = life.values["weights"][0] if "weights" in life.values else None
        bytes_held = [p.nbytes for versions in life.rollouts.values() for p in versions]
        expected = {
            **{name: life.counts[name] for name in ("published", "republished", "claimed", "acked", "requeued")},
            "complete": life.complete,
            "max_ahead": life.max_ahead,
            "retain": life.retain,
            "freed": len(life.freed()),
            "retained": len(life.rollouts),
            "queue_depth": len(queue),
            "leased": len(life.leases),
            "last_demanded": max((r for _, r in life.demanded), default=-1),
            "last_published": max(life.published, default=-1),
            "weight_version": newest,
            "staleness": None if newest is None or oldest is None else newest - oldest,
            "held_bytes": sum(bytes_held) + sum(payload.nbytes for _, payload in life.values.values()),
        }
        assert {name: told[name] for name in expected} == expected
        assert expected["claimed"] - expected["requeued"] - expected["acked"] == len(life.leases)
        states = {group: members[-1].state for group, members in life.groups.items()}
        assert {group: shown["state"] for group, shown in told["consumers"].items()} == states

    def what_is_over_is_not_remembered(self) -> None:
        """Beyond ids and clients, nothing grows with what was freed or has ended."""
        job = self.ledger.jobs.get(JOB)
        assert (job is None) == (self.life is None)
        assert set(self.ledger.clients) == set(self.people)
        if job is None or self.life is None:
            return
        readable = set(job.rollouts)
        assert readable == set(self.life.rollouts)
        assert set(job.done) == set(self.life.settled)
        assert len(job.done) <= max(job.retain, 0)
        assert job.freed.isdisjoint(readable)
        assert job.demands.isdisjoint(readable | job.freed)
        for group in job.groups.values():
            assert group.acked <= readable or job.complete
            assert set(group.leases) <= readable
            assert group.acked.isdisjoint(group.leases)
            assert len(group.ready) <= job.published - job.republished + job.requeued

    # ------------------------------------------------------------------ the model

    def choose(self, number: int, role: str | None = None, live: bool = False) -> Someone | None:
        """One of the latest clients of a role; mostly a live one, now and then one that has ended."""
        fitting = [p for p in self.people.values() if role in (None, p.role)]
        alive = [p for p in fitting if p.state == "live"]
        fitting = alive if live or (number < 5 and alive) else fitting[-4:]
        return fitting[number % len(fitting)] if fitting else None

    def info(self, person: Someone) -> ClientInfo:
        return ClientInfo(person.name, JOB, person.role, group=person.group, ray_job_id=person.ray_job)

    def producer(self) -> Someone | None:
        return self.life.producers[-1] if self.life and self.life.producers and not self.life.complete else None

    def groups(self) -> Iterator[Any]:
        return iter(self.ledger.jobs[JOB].groups.values() if JOB in self.ledger.jobs else ())

    def new_payload(self, weight_version: int | None) -> Payload:
        self.serial += 1
        return Payload(f"t{self.serial}", f"vault{self.serial % 2}", 1, weight_version=weight_version)

    def barred(self, person: Someone) -> type[Exception] | None:
        return None if person.state == "live" else Fenced

    def compare(self, do: Callable[[], Any], error: type[Exception] | None) -> Any:
        """Do it, and see that it ends as the model says."""
        if error is None:
            return do()
        with pytest.raises(error) as raised:
            do()
        assert type(raised.value) is error
        return None

    def leave(self, person: Someone | None, state: str) -> None:
        life = self.life
        if person is None or person.state != "live" or life is None:
            return
        person.state, person.ended_at = state, self.now
        life.ended.append(person)
        mine = [place for place, (owner, _) in life.leases.items() if owner == person.name]
        life.counts["requeued"] += len(mine)
        for place in mine:
            del life.leases[place]
        self.settle()
        over = bool(life.producers) and life.producers[-1].state == "finished"
        if over and life.groups and not life.open_groups():
            self.free_everything()
            life.complete = True

    def settle(self) -> None:
        """Free the oldest of those that every open group has acked, beyond what is retained."""
        life = self.life
        assert life is not None
        life.settled = [r for r in life.settled if life.is_settled(r)]
        life.settled += [r for r in life.rollouts if r not in life.settled and life.is_settled(r)]
        for rollout_id in life.settled[: len(life.settled) - life.retain if life.retain < len(life.settled) else 0]:
            life.settled.remove(rollout_id)
            self.dropped += life.rollouts.pop(rollout_id)

    def free_everything(self) -> None:
        if self.life is None:
            return
        for versions in self.life.rollouts.values():
            self.dropped += versions
        self.dropped += [payload for _, payload in self.life.values.values()]
        self.life.rollouts.clear()
        self.life.values.clear()
        self.life.settled.clear()


TestLedgerAgainstModel = LedgerAgainstModel.TestCase
TestLedgerAgainstModel.settings = settings(
    max_examples=400, stateful_step_count=60, deadline=None, report_multiple_bugs=False
)
