"""What the ledger promises, as lists and dicts: test_ledger_model.py does the same to both and compares.

The model says what ARCHITECTURE.md promises, not how the ledger keeps it: it derives everything anew from what
happened (who acked what, what was lost, what was demanded) where the ledger keeps heaps, counters and orders.
A question returns (error that is to be raised, answer); what happened is told afterwards.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from slime.cross_job.errors import (
    Drained,
    EndOfStream,
    Fenced,
    JobIdTaken,
    NotOwner,
    PayloadLost,
    PeerFailed,
    Refused,
    RolloutNotFound,
    ValueLost,
)
from slime.cross_job.types import Payload

Error = type[Exception] | None
VOUCHED_S = 60.0
SETTINGS = {
    **{"max_ahead": 0, "retain": None, "retain_s": None, "retain_bytes": None},
    **{"max_bytes": None, "max_staleness": None, "on_stale": "wait"},
}


@dataclass
class Someone:
    """A client as the model knows it."""

    name: str
    role: str
    group: str
    ray_job: str
    epoch: int
    last_beat: float
    stated: dict[str, Any]
    state: str = "live"
    ended_at: float = 0.0
    vouched_at: float = -1.0

    @property
    def attached(self) -> bool:
        return self.state in ("live", "silent")

    @property
    def barred(self) -> Error:
        return None if self.attached else Fenced

    def there(self, now: float) -> bool:
        """For its peers; of one that is silent Ray must have said lately that it is alive."""
        return self.state == "live" or (self.state == "silent" and now - self.vouched_at <= VOUCHED_S)

    def missed_since(self) -> float:
        return max(self.ended_at, self.vouched_at + VOUCHED_S if self.vouched_at >= 0 else 0.0)


@dataclass
class Life:
    """A job from its first client until it is complete or forgotten."""

    settings: dict[str, Any] = field(default_factory=lambda: {**SETTINGS})
    control: str = "running"
    producers: list[Someone] = field(default_factory=list)
    groups: dict[str, list[Someone]] = field(default_factory=dict)  # members, in the order in which they came
    ended: list[Someone] = field(default_factory=list)  # in the order in which they ended
    readable: dict[int, dict[int, Payload]] = field(default_factory=dict)  # id -> version -> payload
    numbers: Counter[int] = field(default_factory=Counter)  # id -> versions that there ever were
    lost: set[int] = field(default_factory=set)
    freed: set[int] = field(default_factory=set)
    demanded: list[tuple[str, int]] = field(default_factory=list)  # (group, id), since training last went back
    drivers: list[str] = field(default_factory=list)  # groups that ever demanded
    wanted: set[int] = field(default_factory=set)  # to be generated
    # given to the producer -> newest weights at that time, and how often somebody had resumed
    begun: dict[int, tuple[int | None, int]] = field(default_factory=dict)
    resumed: int = 0
    skipped: set[int] = field(default_factory=set)
    leases: dict[tuple[str, int], tuple[str, int]] = field(default_factory=dict)  # (group, id) -> (client, version)
    asked_with: dict[tuple[str, int], str] = field(
        default_factory=dict
    )  # (group, id) -> with which it was claimed last
    acked: set[tuple[str, int]] = field(default_factory=set)  # (group, id)
    starts: dict[str, int] = field(default_factory=dict)  # group -> where it resumed last
    settled: list[int] = field(default_factory=list)  # readable, acked by every open group; by when
    settled_at: dict[int, float] = field(default_factory=dict)
    shed_tokens: list[str] = field(default_factory=list)  # freed in the object store, there to be had all the same
    turns: dict[int, int] = field(default_factory=dict)  # id -> it was generated as the n-th
    ends: list[list[Payload]] = field(default_factory=list)  # n -> what tells where the source of prompts stood then
    values: dict[str, tuple[int, Payload, Someone]] = field(default_factory=dict)
    lost_values: dict[str, tuple[int, Someone]] = field(default_factory=dict)  # version, by whom they were published
    counts: Counter[str] = field(default_factory=Counter)
    complete: bool = False

    # ------------------------------------------------------------------ who

    def live(self, group: str) -> list[Someone]:
        return [member for member in self.groups[group] if member.attached]

    def left(self, group: str, now: float) -> tuple[str, float] | None:
        """(state, since when) as which a group is missed; None: somebody is there."""
        members = self.live(group)
        if any(member.there(now) for member in members):
            return None
        if members:
            return "silent", max(member.missed_since() for member in members)
        return self.left_last(group).state, self.left_last(group).ended_at

    def leave(self, person: Someone, state: str, now: float) -> None:
        person.state = "stopped" if state == "finished" and self.control == "draining" else state
        person.ended_at = now
        person.vouched_at = -1.0
        self.ended.append(person)
        for place in [place for place, (owner, _) in self.leases.items() if owner == person.name]:
            self.give_back(place)
        self.settle(now)

    def take_over(self, group: str, owner: str, now: float) -> bool:
        """What somebody holds whose lease is over is free for others of the group."""
        holder = next(member for member in self.groups[group] if member.name == owner)
        if holder.state == "silent":
            self.leave(holder, "dead", now)
        return holder.state == "dead"

    def left_last(self, group: str) -> Someone:
        return [who for who in self.ended if who.role == "consumer" and who.group == group][-1]

    def closed(self, group: str) -> bool:
        return not self.live(group) and self.left_last(group).state == "finished"

    def open_groups(self) -> list[str]:
        return [group for group in self.groups if not self.closed(group)]

    def driving(self) -> list[str]:
        return [group for group in self.groups if group in self.drivers] or [*self.groups]

    def producer_over(self, now: float, grace_s: float) -> Error:
        last = self.producers[-1] if self.producers else None
        if self.control == "draining" and (last is None or not last.attached):
            return Drained
        if last is None or last.there(now):
            return None
        if last.state == "finished":
            return EndOfStream
        return PeerFailed if now - last.missed_since() >= grace_s else None

    # ------------------------------------------------------------------ what

    @property
    def published(self) -> list[int]:
        return [*self.numbers]

    @property
    def last_demanded(self) -> int:
        return max((rollout_id for _, rollout_id in self.demanded), default=-1)

    @property
    def weights(self) -> int | None:
        known = self.values.get("weights") or self.lost_values.get("weights")
        return known[0] if known else None

    def newest(self, rollout_id: int) -> Payload:
        return self.readable[rollout_id][max(self.readable[rollout_id])]

    def held_bytes(self, rollouts: Any) -> int:
        """In the object store: what is settled, and stored durably, is not."""
        return sum(payload.nbytes for r in rollouts for payload in self.readable[r].values() if payload.vault)

    def beyond_retention(self, now: float) -> bool:
        """The oldest that is settled is one too many, too old, or among too many bytes."""
        most, seconds, nbytes = (self.settings[name] for name in ("retain", "retain_s", "retain_bytes"))
        if most is None:
            most = 0 if seconds is None and nbytes is None else 1_000_000
        kept = sum(payload.nbytes for r in self.settled for payload in self.readable.get(r, {}).values())
        too_old = seconds is not None and bool(self.settled) and now - self.settled_at[self.settled[0]] > seconds
        return len(self.settled) > most or too_old or (nbytes is not None and kept > nbytes)

    def unsettled(self) -> list[int]:
        return [r for r in self.readable if r not in self.settled]

    def full(self) -> bool:
        """What nobody may free yet, and one more like the newest, is more than the bound."""
        held, bound = self.unsettled(), self.settings["max_bytes"]
        return bool(held) and bound is not None and self.held_bytes(held) + self.newest(max(held)).nbytes > bound

    def too_many_bytes(self) -> bool:
        bound = self.settings["max_bytes"]
        return bound is not None and self.held_bytes(self.readable) > bound

    def too_far(self, newer: int | None, older: int | None) -> bool:
        bound = self.settings["max_staleness"]
        return None not in (bound, newer, older) and newer - older > bound

    def stale(self, rollout_id: int) -> bool:
        waits = self.settings["on_stale"] == "wait"
        return not waits and self.too_far(self.weights, self.newest(rollout_id).weight_version)

    def is_settled(self, rollout_id: int) -> bool:
        acked_by = {group for group, acked in self.acked if acked == rollout_id}
        return bool(acked_by) and acked_by >= set(self.open_groups())

    # ------------------------------------------------------------------ questions

    def next_wanted(
        self, now: float, start: int | None, until: int | None, grace_s: float
    ) -> tuple[Error, int | None]:
        if self.control == "draining":
            return EndOfStream, None
        if self.control == "running" and not self.full():
            wanted = [r for r in self.wanted if until is None or r < until]
            if wanted:
                return None, min(wanted)
            base = self.last_demanded if self.demanded else None if start is None else start - 1
            if base is not None:
                ahead = max([base, *self.published]) + 1
                if until is not None and ahead >= until:
                    return EndOfStream, None
                early = self.settings["on_stale"] == "wait" and self.too_far(ahead, self.weights)
                if ahead <= base + self.settings["max_ahead"] and not early:
                    return None, ahead
        left = [self.left(group, now) for group in self.driving()]
        if left and None not in left:
            failed = [since for state, since in left if state != "finished"]
            if not failed:
                return EndOfStream, None
            if now - max(failed) >= grace_s:
                return PeerFailed, None
        return None, None

    def to_be_claimed(
        self, now: float, person: Someone, rollout_id: int | None, version: int | None, grace_s: float
    ) -> tuple[Error, tuple[int, int] | None]:
        """Which (id, version) this consumer gets; what is too stale is given up, what is lost demanded."""
        group = person.group
        if rollout_id is None:
            for untouched in sorted({*self.readable, *(r for g, r in self.leases if g == group)}):
                owner, _ = self.leases.get((group, untouched), ("", 0))
                if (group, untouched) in self.acked or (
                    owner and (owner == person.name or not self.take_over(group, owner, now))
                ):
                    continue
                if untouched not in self.readable:
                    continue
                if not self.stale(untouched):
                    return None, (untouched, max(self.readable[untouched]))
                self.give_up(untouched, again=self.settings["on_stale"] == "regenerate")
            others = [owner for (g, _), (owner, _) in self.leases.items() if g == group and owner != person.name]
            held = {r for g, r in self.leases if g == group} | {r for g, r in self.acked if g == group}
            told = self.value_lost(person) or self.lost_for_good((self.lost | self.wanted) - held)
            return told or (None if others else self.producer_over(now, grace_s)), None
        if (group, rollout_id) in self.acked or rollout_id in self.freed or rollout_id < self.starts.get(group, 0):
            return RolloutNotFound, None
        owner, leased = self.leases.get((group, rollout_id), (person.name, 0))
        if rollout_id not in self.readable:
            if leased and owner == person.name:
                self.give_back((group, rollout_id))
            if rollout_id in self.lost and group in self.driving():
                self.wanted.add(rollout_id)
            told = self.value_lost(person) or self.lost_for_good([rollout_id])
            return told or self.producer_over(now, grace_s), None
        if owner != person.name and self.take_over(group, owner, now):
            owner, leased = person.name, 0
        if owner != person.name:
            return None, None
        if not leased and version is None and self.stale(rollout_id):
            self.give_up(rollout_id, again=True)
            return None, None
        versions = self.readable[rollout_id]
        if version is not None:
            return (None, (rollout_id, version)) if version in versions else (RolloutNotFound, None)
        return None, (rollout_id, leased if leased in versions else max(versions))

    def held_with(self, person: Someone, token: str) -> int | None:
        """What this consumer holds since it claimed the next one with this token: the answer to asking again. What it
        held and was lost is given back."""
        for place, (owner, _) in [*self.leases.items()]:
            if token and owner == person.name and self.asked_with[place] == token:
                if place[1] in self.readable:
                    return place[1]
                self.give_back(place)
                if place[1] in self.lost and person.group in self.driving():
                    self.wanted.add(place[1])
        return None

    def lost_for_good(self, wanted: Iterable[int]) -> Error:
        """Nobody is there who would generate again what is lost, or was given up after its publication."""
        if not self.producers or self.producers[-1].state != "finished":
            return None
        given_up = self.wanted.intersection(wanted, self.numbers)
        return PayloadLost if self.lost.intersection(wanted) else Refused if given_up else None

    def value_lost(self, person: Someone) -> Error:
        """Who waits for what its own lost value may hold up is told."""
        return ValueLost if any(author == person for _, author in self.lost_values.values()) else None

    def may_ack(self, person: Someone, rollout_id: int) -> tuple[Error, bool]:
        """(error, whether it has been acked before)."""
        place = (person.group, rollout_id)
        over = place in self.acked or rollout_id in self.freed
        mine = self.leases.get(place, ("",))[0] == person.name
        return person.barred or (None if over or mine else NotOwner), over

    def may_resume(self, person: Someone, rollout_id: int) -> Error:
        others = [other for other in self.live(person.group) if other is not person]
        if any(other.ray_job != person.ray_job and other.state == "live" for other in others):
            return JobIdTaken
        return RolloutNotFound if max(self.freed - self.skipped, default=-1) >= rollout_id else None

    def may_put(self, person: Someone, key: str, number: int) -> Error:
        version, _, author = self.values.get(key, (-1, None, person))
        watched = author is person or author.state == "live"
        return Refused if number <= version and watched and key in self.values else None

    def sources_before(self, rollout_id: int) -> tuple[int, list[Payload | None]]:
        """(n, what may tell where the n-th generation begins): any generation of the one before it."""
        turn = self.turns.get(rollout_id, len(self.ends))
        return turn, [*self.ends[turn - 1]] if turn else [None]

    # ------------------------------------------------------------------ what happened

    def record(self, rollout_id: int, payload: Payload) -> int:
        """Published; returns its version."""
        self.numbers[rollout_id] += 1
        if rollout_id not in self.turns:
            self.turns[rollout_id] = len(self.ends)
            self.ends.append([])
        self.shelve(rollout_id, self.numbers[rollout_id], payload)
        self.counts["published"] += 1
        self.counts["republished"] += self.numbers[rollout_id] > 1
        had = {(group, rollout_id) for group, start in self.starts.items() if rollout_id < start}
        self.counts["covered"] += len(had - self.acked)
        self.acked |= had
        return self.numbers[rollout_id]

    def shelve(self, rollout_id: int, version: int, payload: Payload) -> None:
        self.readable.setdefault(rollout_id, {})[version] = payload
        if rollout_id in self.turns:
            self.ends[self.turns[rollout_id]].append(payload)
        for outstanding in (self.lost, self.wanted):
            outstanding.discard(rollout_id)

    def give_back(self, place: tuple[str, int]) -> None:
        del self.leases[place]
        self.counts["requeued"] += 1

    def give_up(self, rollout_id: int, again: bool) -> None:
        """It is too stale."""
        del self.readable[rollout_id]
        drops = self.settings["on_stale"] == "drop"
        self.counts["dropped" if drops else "regenerated"] += 1
        if drops:
            self.turns.pop(rollout_id, None)
        if again:
            self.wanted.add(rollout_id)
        else:
            self.skipped.add(rollout_id)
            self.gone(rollout_id)

    def gone(self, rollout_id: int) -> None:
        """Nobody can ask for it any more."""
        self.freed.add(rollout_id)
        self.turns.pop(rollout_id, None)
        for records in (self.lost, self.wanted):
            records.discard(rollout_id)
        if rollout_id in self.settled:
            self.settled.remove(rollout_id)
        for place in [place for place in self.leases if place[1] == rollout_id]:
            self.give_back(place)

    def lose(self, token: str) -> None:
        """This payload is not to be had any more."""
        for key in [key for key, value in self.values.items() if value[1].token == token]:
            version, _, author = self.values.pop(key)
            self.lost_values[key] = (version, author)
        for rollout_id, versions in [*self.readable.items()]:
            if not (kept := {n: payload for n, payload in versions.items() if payload.token != token}):
                del self.readable[rollout_id]
                if rollout_id in self.settled:  # it has taken effect
                    continue
                self.lost.add(rollout_id)
                self.counts["losses"] += 1
            else:
                self.readable[rollout_id] = kept

    def resume(self, person: Someone, rollout_id: int, now: float) -> dict[str, list[int]]:
        """The group of this consumer goes on from there; other members have left."""
        group = person.group
        again = sorted(r for g, r in self.acked if g == group and r >= rollout_id and r not in self.freed)
        self.acked -= {(group, r) for r in again}
        for missed in [r for r in again if r in self.settled and r not in self.readable]:
            self.settled.remove(missed)
            self.lost.add(missed)
            self.counts["losses"] += 1
        for place in [place for place in self.leases if place[0] == group]:
            self.give_back(place)
        covered = sorted(r for r in {*self.readable, *self.lost} if r < rollout_id and (group, r) not in self.acked)
        self.acked |= {(group, r) for r in covered}
        self.counts["covered"] += len(covered)
        self.counts["rewound"] += bool(again)
        self.resumed += 1
        self.starts[group] = rollout_id
        if self.driving() == [group]:
            self.demanded.clear()
            self.wanted.clear()
        self.settle(now)
        return {"again": again, "acked": covered}

    def settle(self, now: float) -> None:
        """Free the oldest of those that every open group has acked, beyond what is retained or there is room for.

        Of what is acked at once the lowest id is the oldest.
        """
        missed = [r for r in self.settled if r not in self.readable and not self.is_settled(r)]
        for rollout_id in missed:  # lost since, and a group has come that never had it
            self.gone(rollout_id)
        self.settled = [r for r in self.settled if self.is_settled(r)]
        fresh = sorted(r for r in {*self.readable, *self.lost} if r not in self.settled and self.is_settled(r))
        self.lost -= {*fresh}
        self.wanted -= {*fresh}
        self.settled += fresh
        self.settled_at |= dict.fromkeys(fresh, now)
        for rollout_id in self.settled:
            self.shed(rollout_id)
        self.free_what_is_too_much(now)

    def shed(self, rollout_id: int) -> None:
        """What lies in the durable store, too, leaves the object store."""
        versions = self.readable.get(rollout_id, {})
        for version, payload in versions.items():
            if payload.stored and payload.vault:
                versions[version] = replace(payload, vault="")
                self.shed_tokens.append(payload.token)
                if rollout_id in self.turns:
                    self.ends[self.turns[rollout_id]].append(versions[version])

    def free_what_is_too_much(self, now: float) -> None:
        while self.settled:
            in_memory = [r for r in self.settled if not all(p.stored for p in self.readable.get(r, {}).values())]
            if self.beyond_retention(now):
                oldest = self.settled[0]
            elif self.too_many_bytes() and in_memory:
                oldest = in_memory[0]
            else:
                return
            self.readable.pop(oldest, None)
            self.gone(oldest)

    def end(self) -> None:
        """Nothing of it is kept."""
        self.freed |= set(self.readable)
        for records in (self.readable, self.values, self.lost_values, self.settled, self.lost, self.turns):
            records.clear()

    def over(self) -> bool:
        finished = bool(self.producers) and self.producers[-1].state == "finished"
        return finished and bool(self.groups) and not self.open_groups()

    # ------------------------------------------------------------------ figures

    def tokens(self) -> list[str]:
        """What can be read."""
        values = [payload.token for _, payload, _ in self.values.values()]
        return values + [payload.token for versions in self.readable.values() for payload in versions.values()]

    def figures(self) -> dict[str, Any]:
        """What the status says."""
        queue = self.unsettled()
        oldest = self.newest(min(queue)).weight_version if queue else None
        counted = ("published", "republished", "claimed", "acked", "requeued", "covered", "rewound")
        counted += ("dropped", "regenerated", "losses")
        return {
            **{name: self.counts[name] for name in counted},
            **self.settings,
            "control": self.control,
            "complete": self.complete,
            "lost": sorted(self.lost),
            "freed": len(self.freed),
            "retained": len(self.readable),
            "queue_depth": len(queue),
            "leased": len(self.leases),
            "last_demanded": self.last_demanded,
            "last_published": max(self.published, default=-1),
            "weight_version": self.weights,
            "staleness": None if self.weights is None or oldest is None else self.weights - oldest,
            "held_bytes": self.held_bytes(self.readable) + sum(p.nbytes for _, p, _ in self.values.values()),
        }
