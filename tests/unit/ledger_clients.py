"""A ledger and its model, side by side, and the clients that come and go; see test_ledger_model.py."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from slime.cross_job.errors import Forgotten, JobIdTaken, JobNotFound, Refused
from slime.cross_job.ledger import Ledger
from slime.cross_job.types import ClientInfo, Located, LocatedValue, Payload
from tests.unit.ledger_model import SETTINGS, Error, Life, Someone

JOB = "exp"
GROUPS = ("train", "train", "archive")  # as often as they are drawn
KEYS = ("weights", "tokenizer")
VAULTS = ("vault0", "vault1")
DEAD_AFTER_S = 30.0
MOST_CONSUMERS = 3

INDEX = st.integers(0, 5)
ROLLOUT_IDS = st.integers(0, 5)
GRACE = st.sampled_from([0.0, 10.0])
FEW = st.integers(0, 2)
PERHAPS_FEW = st.none() | FEW
SETTINGS_OF_A_JOB = st.fixed_dictionaries(
    {
        "max_ahead": FEW,
        "retain": PERHAPS_FEW,
        "retain_s": st.none() | st.none() | st.sampled_from([0.0, 3.0, 15.0]),
        "retain_bytes": st.none() | st.none() | st.integers(1, 6),
        "max_bytes": st.none() | st.none() | st.integers(1, 8),
        "max_staleness": st.sampled_from([None, 0, 1]),
        "on_stale": st.sampled_from(["drop", "regenerate", "wait"]),
    }
)


class Clients(RuleBasedStateMachine):
    """See the module."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.ledger = Ledger(lambda: self.now, wall=lambda: self.now)
        self.people: dict[str, Someone] = {}  # known to the ledger
        self.life: Life | None = None
        self.serial = 0
        self.incarnations = dict.fromkeys(VAULTS, 0)
        self.payloads: dict[str, Payload] = {}  # by token: everything that was ever recorded
        self.records: dict[str, Located | LocatedValue] = {}  # by token: what its vault remembers of it
        self.recent: list[tuple[str, int, int, Payload]] = []  # producer, id, version of what was published last
        self.lost: set[str] = set()  # tokens
        self.told: Counter[str] = Counter()  # tokens, by take_drops
        self.shed: set[str] = set()  # tokens that were told, and can be had from the durable store all the same

    # ------------------------------------------------------------------ members

    @initialize(stated=SETTINGS_OF_A_JOB, second=st.none() | st.sampled_from(GROUPS))
    def a_job_begins(self, stated: dict[str, Any], second: str | None) -> None:
        self.attach("producer", "", "", None, **stated)
        for group in (GROUPS[0], *([second] if second else [])):
            self.attach("consumer", group, "", None)

    @rule(takes_over=st.booleans(), max_ahead=PERHAPS_FEW, stated=SETTINGS_OF_A_JOB)
    def attach_producer(self, takes_over: bool, max_ahead: int | None, stated: dict[str, Any]) -> None:
        old = self.producer()
        holds = old is not None and old.attached
        begins = self.life is None or self.life.complete
        takes_over |= holds and old is not None and old.state == "silent"
        stated = stated if begins else {"max_ahead": None if holds and takes_over else max_ahead}
        ray_job = old.ray_job if old and takes_over else ""
        refused = JobIdTaken if holds and not takes_over else None
        self.attach("producer", "", ray_job, refused, replaces=old if holds else None, **stated)

    @precondition(lambda self: self.alive("consumer") < MOST_CONSUMERS)
    @rule(group=st.sampled_from(GROUPS), max_ahead=st.none() | st.none() | FEW, shared=st.booleans())
    def attach_consumer(self, group: str, max_ahead: int | None, shared: bool) -> None:
        self.attach("consumer", group, f"ray-{group}" if shared else "", None, max_ahead=max_ahead)

    @precondition(lambda self: self.alive("writer") < 2)
    @rule()
    def attach_writer(self) -> None:
        self.attach("writer", "", "", None)

    @precondition(lambda self: not self.alive("producer") or not self.alive("consumer"))
    @rule(group=st.sampled_from(GROUPS))
    def whoever_is_missing_comes_back(self, group: str) -> None:
        for role in ("producer", "consumer"):
            if not self.alive(role):
                self.attach(role, group if role == "consumer" else "", "", None)

    @rule(who=INDEX)
    def attach_again(self, who: int) -> None:
        """A client asks a second time, because the broker's answer was lost."""
        person = self.choose(who, live=True)
        if person is not None:
            assert self.ledger.membership.attach(self.info(person), dead_after_s=DEAD_AFTER_S)["epoch"] == person.epoch

    def attach(
        self,
        role: str,
        group: str,
        ray_job: str,
        refused: type[Refused] | None,
        replaces: Someone | None = None,
        **stated: Any,
    ) -> None:
        self.serial += 1
        name = f"{role}{self.serial}"
        said = {key: value for key, value in stated.items() if value is not None}
        person = Someone(name, role, group, ray_job or f"ray-{name}", 0, self.now, said)
        begins = self.life is None or self.life.complete
        others = [other for other in self.people.values() if other.attached and other is not replaces]
        disagree = [o for o in others if any(o.stated.get(key, value) != value for key, value in said.items())]
        others = [other for other in others if other.there(self.now)]
        if any(other in others for other in disagree):
            refused = refused or Refused
        granted = self.compare(
            lambda: self.ledger.membership.attach(self.info(person), dead_after_s=DEAD_AFTER_S, **stated), refused
        )
        if refused:
            return
        if begins:
            self.end_of_life()
            self.life = Life()
        life = self.the_life()
        for other in (replaces, *disagree):
            self.leave(other, "dead")
        if life.control == "draining" and not others:
            life.control = "running"
        life.settings |= said
        {"producer": life.producers, "consumer": life.groups.setdefault(group, []) if group else []}.get(
            role, []
        ).append(person)
        self.people[name] = person
        person.epoch = granted["epoch"]
        assert {key: granted[key] for key in SETTINGS} == life.settings
        life.settle(self.now)

    @rule(who=INDEX, state=st.sampled_from(["finished", "finished", "stopped", "failed", "dead"]))
    def end(self, who: int, state: str) -> None:
        person = self.choose(who)
        if person is not None:
            self.end_as(person, state)

    @precondition(lambda self: self.life is not None and len(self.life.published) > 2)
    @rule(last_first=st.booleans(), state=st.sampled_from(["finished", "finished", "dead"]), spared=st.none() | INDEX)
    def all_end(self, last_first: bool, state: str, spared: int | None) -> None:
        """Both sides end, the last of them in `state`; perhaps somebody stays, or a writer, who writes."""
        leaving = [p for p in self.people.values() if p.attached and (p.role != "writer" or spared is None)]
        leaving = [p for number, p in enumerate(leaving) if number != spared]
        for person in leaving[::-1] if last_first else leaving:
            self.end_as(person, state if person is leaving[-1] else "finished")
        for person in self.people.values():
            if person.attached and person.role == "writer":
                self.put_value_as(person, KEYS[1], None, again=False)

    def end_as(self, person: Someone, state: str) -> None:
        self.ledger.end(person.name, state, "as the test wants")
        self.leave(person, state)

    def leave(self, person: Someone | None, state: str) -> None:
        life = self.life
        if person is None or not person.attached or life is None:
            return
        life.leave(person, state, self.now)
        if life.over():
            self.end_of_life()
            life.complete = True

    def end_of_life(self) -> None:
        if self.life is not None:
            self.life.end()

    @rule(
        seconds=st.sampled_from([1, 10, 20, 35]),
        asleep=st.sets(INDEX, max_size=2),
        awake=st.booleans(),
        vouched=st.booleans(),
        stopped=st.booleans(),
    )
    def time_passes(self, seconds: int, asleep: set[int], awake: bool, vouched: bool, stopped: bool) -> None:
        people = [person for person in self.people.values() if person.attached]
        for person in people if awake else [p for number, p in enumerate(people) if number not in asleep]:
            self.beat(person)
        if stopped:  # the broker was, so that it heard nobody
            self.now += seconds
            for person in self.people.values():
                person.last_beat += seconds
            assert self.ledger.membership.tick(stopped_s=float(seconds)) == []
            self.what_is_old_goes()
            return
        for person in people if vouched else []:
            self.ledger.membership.vouch(self.ledger.clients[person.name])
            person.vouched_at = self.now
        for _ in range(seconds):
            self.now += 1
            late = [p for p in people if p.state == "live" and self.now - p.last_beat > DEAD_AFTER_S]
            assert [client.info.client_id for client in self.ledger.membership.tick()] == [
                person.name for person in late
            ]
            for person in late:
                person.state, person.ended_at = "silent", self.now
            self.what_is_old_goes()

    def what_is_old_goes(self) -> None:
        if self.life is not None:
            before = [*self.life.settled]
            self.life.settle(self.now)
            freed, expired = self.life.settled != before, self.ledger.lifetime.expire()
            assert expired == ([JOB] if freed else [])

    @precondition(lambda self: any(person.state != "live" for person in self.people.values()))
    @rule(who=INDEX)
    def heartbeat(self, who: int) -> None:
        person = self.choose(who)
        if person is not None:
            self.beat(person)

    @precondition(lambda self: any(person.state == "silent" for person in self.people.values()))
    @rule(which=INDEX, takes=st.booleans())
    def somebody_who_was_silent_is_heard_again(self, which: int, takes: bool) -> None:
        """It goes on, under a new epoch, if nobody took what it held meanwhile."""
        silent = [person for person in self.people.values() if person.state == "silent"]
        person = silent[which % len(silent)]
        life = self.the_life()
        held = [rollout_id for (_, rollout_id), (owner, _) in life.leases.items() if owner == person.name]
        others = [p for p in self.people.values() if p.group == person.group and p is not person and p.attached]
        if takes and held and others and held[0] in life.readable:
            found = self.compare(lambda: self.ledger.claim(others[0].name, held[0]), None)
            error, expected = life.to_be_claimed(self.now, others[0], held[0], None, 0.0)
            assert (error, person.state) == (None, "dead")
            assert (found and (found.rollout_id, found.version)) == expected
            if found is not None:
                life.counts["claimed"] += 1
                life.leases[person.group, held[0]] = (others[0].name, found.version)
        self.beat(person)

    def beat(self, person: Someone) -> None:
        granted = self.compare(lambda: self.ledger.heartbeat(person.name, "at work"), person.barred)
        if granted is None:
            return
        assert (granted["epoch"] > person.epoch) == (person.state == "silent" and person.role != "writer")
        person.state, person.epoch = "live", granted["epoch"]
        person.last_beat, person.ended_at, person.vouched_at = self.now, 0.0, -1.0

    @precondition(lambda self: self.serial % 5 == 0 or not any(p.attached for p in self.people.values()))
    @rule()
    def forget(self) -> None:
        live = any(person.there(self.now) for person in self.people.values())
        if self.life is None or live:
            self.compare(lambda: self.ledger.forget(JOB), Refused if live else JobNotFound)
            return
        gone = [*self.people]
        self.ledger.forget(JOB)
        self.life, self.people = None, {}
        self.tell_of_drops()
        self.records.clear()  # every vault forgets what it held of the job
        for name in gone[-2:]:
            self.compare(lambda name=name: self.ledger.heartbeat(name, ""), Forgotten)

    # ------------------------------------------------------------------ values

    @rule(who=INDEX, key=st.sampled_from(KEYS), version=st.none() | st.integers(0, 5), again=st.booleans())
    def put_value(self, who: int, key: str, version: int | None, again: bool) -> None:
        person = self.choose(who)
        if person is not None:
            self.put_value_as(person, key, version, again)

    def put_value_as(self, person: Someone, key: str, version: int | None, again: bool) -> None:
        life = self.the_life()
        old_version, old, _ = life.values.get(key, (-1, None, None))
        again = again and old is not None
        payload = old if again and old is not None else self.new_payload(None)
        number = old_version if again else (old_version + 1 if version is None else version)
        error = person.barred or (None if again else life.may_put(person, key, number))
        located = self.compare(lambda: self.ledger.put_value(person.name, key, payload, version), error)
        if error is None:
            assert (located.version, located.payload) == (number, payload)
        if error is None and not again:
            life.values[key] = (number, payload, person)
            life.lost_values.pop(key, None)
            self.payloads[payload.token] = payload
            self.records[payload.token] = located

    # ------------------------------------------------------------------ helpers

    def choose(self, number: int, role: str | None = None, live: bool = False) -> Someone | None:
        """One of the latest clients of a role; mostly a live one, now and then one that has ended."""
        fitting = [p for p in self.people.values() if role in (None, p.role)]
        alive = [p for p in fitting if p.attached]
        fitting = alive if live or (number < 5 and alive) else fitting[-4:]
        return fitting[number % len(fitting)] if fitting else None

    def alive(self, role: str) -> int:
        return sum(person.role == role and person.attached for person in self.people.values())

    def info(self, person: Someone) -> ClientInfo:
        return ClientInfo(person.name, JOB, person.role, group=person.group, ray_job_id=person.ray_job)

    def the_life(self) -> Life:
        assert self.life is not None
        return self.life

    def producer(self) -> Someone | None:
        return self.life.producers[-1] if self.life and self.life.producers and not self.life.complete else None

    def versions(self, rollout_id: int) -> dict[int, Payload]:
        return self.life.readable.get(rollout_id, {}) if self.life else {}

    def lease(self, which: int) -> tuple[Someone, int]:
        (_, rollout_id), (owner, _) = [*self.the_life().leases.items()][which % len(self.the_life().leases)]
        return self.people[owner], rollout_id

    def incarnation_of(self, vault: str) -> str:
        return f"{vault}/{self.incarnations[vault]}"

    def new_payload(self, weight_version: int | None) -> Payload:
        self.serial += 1
        vault = self.incarnation_of(VAULTS[self.serial % 2])
        nbytes = 1 + self.serial % 3
        facts = {"weight_version": weight_version, "source": self.serial}
        return Payload(f"t{self.serial}", vault, nbytes, stored=f"n{self.serial}" * (self.serial % 3 == 0), **facts)

    def compare(self, do: Callable[[], Any], error: Error) -> Any:
        """Do it, and see that it ends as the model says."""
        if error is None:
            return do()
        with pytest.raises(error) as raised:
            do()
        assert type(raised.value) is error
        return None

    def tell_of_drops(self) -> None:
        for vault, token in self.ledger.garbage.take_drops():
            assert vault == self.payloads[token].vault
            self.told[token] += 1
        assert self.ledger.garbage.take_drops() == []
