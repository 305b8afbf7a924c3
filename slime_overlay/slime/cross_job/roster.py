"""The roster: which producers and consumers are attached, in which incarnation, and when each was last heard.

The membership half of the ledger (ledger.py); pure state with an injected clock, like it.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

from .errors import BadInput, Drained, EndOfStream, Fenced, Forgotten, JobIdTaken, PeerFailed, Poisoned, Refused
from .progress import Chronicle
from .records import (
    DEAD,
    DRAINING,
    FAILED,
    FINISHED,
    LIVE,
    RUNNING,
    SETTINGS,
    SILENT,
    STOP,
    STOPPED,
    Client,
    Group,
    Job,
)
from .settings import check_setting, flag
from .stores.base import without_password
from .types import (
    MOST_ACTIVITY,
    MOST_REASON,
    ClientInfo,
    Ids,
    check_facts,
    check_job_id,
    check_name,
    check_names,
    check_seconds,
    shortened,
)
from .verdicts import VOUCHED_S, presumed_dead, set_aside, verdict, who

_REMEMBERED = 50  # ended clients a job
_GIVEN_UP_S = 86_400.0  # after which nobody expects to hear a client again that counts as dead


class Roster(Chronicle):
    """Jobs and clients of one namespace.

    Args:
        clock: monotonic seconds, for everything that is waited for.
        wall: wall-clock seconds, for what is shown to people.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time):
        super().__init__(clock, wall)
        self.jobs: dict[str, Job] = {}
        self.clients: dict[str, Client] = {}
        self._notices: dict[str, str] = {}  # client id -> what its next sign of life is answered

    def attach(
        self,
        info: ClientInfo,
        dead_after_s: float = 30.0,
        terms: dict[str, Any] | None = None,
        lasting: Sequence[str] = (),
        columns: Sequence[str] = (),
        **stated: Any,
    ) -> dict[str, Any]:
        """Let a client in; returns {"epoch"} and the settings as they hold for the job (see records.SETTINGS).

        A producer replaces an earlier one that ended; also one of the same Ray job, or whose lease is over, which is
        fenced.

        Args:
            dead_after_s: its lease: silence after which others may take its place and what it holds.
            terms: what it takes for granted (JSON-able values by name): the same as whoever else states it.
            lasting: names of those terms that hold for what is published, too: also a producer that ended is heard,
                as long as rollouts of it are not acked.
            columns: those that every batch will have (of a producer), or must have (of a consumer).
            stated: settings of the job; None: as the others say.

        Raises:
            JobIdTaken: a producer of another Ray job is alive under this job id.
            Refused: settings, terms or columns were stated otherwise by a client that is alive, or left rollouts.
            Poisoned: one of slime's jobs cannot go on, because a rollout is set aside.
        """
        if info.role not in ("producer", "consumer", "writer"):
            raise BadInput(f"role {info.role!r} is none of 'producer', 'consumer', 'writer'")
        if unknown := set(stated) - set(SETTINGS):
            raise BadInput(f"{', '.join(sorted(unknown))}: no setting of a job; there are {', '.join(SETTINGS)}")
        stated = {name: check_setting(name, value) for name, value in stated.items() if value is not None}
        dead_after_s = check_setting("dead_after_s", dead_after_s)
        terms, columns = check_facts(terms, "terms"), check_names(columns, "columns")
        if info.role == "consumer":
            check_name(info.group, "a consumer group")
        known = self.clients.get(info.client_id)
        if known is not None and known.attached:  # the same call again, whose answer was lost
            return self._granted(known)
        job = self._job_for_attach(check_job_id(info.job_id))
        stops = stated.get("on_poison", job.on_poison) == STOP
        for rollout_id, letter in job.dead_letters.items():
            if info.one_cluster and not letter["replaced"] and (stops or letter["stuck"]):
                raise Poisoned(set_aside(job, rollout_id))
        replaced = self._replaced_by(job, info)
        in_the_way = self._agree(job, info, stated, terms, replaced)
        self._agree_with_what_is_left(job, terms, lasting)
        self._agree_on_columns(job, info.role, columns)
        if replaced is not None:
            self.end(replaced.info.client_id, DEAD, f"replaced by a newer producer{self._while_silent(replaced)}")
        for other in in_the_way:
            self.end(other.info.client_id, DEAD, f"others agreed on other settings{self._while_silent(other)}")
        if job.control == DRAINING and not self._living(job.job_id):
            job.control = RUNNING  # it was drained; whoever comes now begins again
        for name, value in stated.items():
            setattr(job, name, value)
        now, wall = self._clock(), self._wall()
        if info.role == "producer":
            job.producer_epoch += 1
            client = Client(info, job.producer_epoch, dead_after_s, wall, now, wall)
            job.producer = client
        elif info.role == "consumer":
            group = job.groups.get(info.group)
            if group is None:
                group = job.groups[info.group] = Group(info.group)
                group.ready = sorted(job.rollouts)
            for rollout_id in [r for r in job.done if r not in group.acked]:  # no longer acked by all open groups
                del job.done[rollout_id]
                if rollout_id not in job.rollouts:  # lost since: it is not generated for who comes so late
                    self._gone(job, rollout_id)
            group.epoch += 1
            client = Client(info, group.epoch, dead_after_s, wall, now, wall)
            group.last, group.live = client, group.live + 1
        else:  # a writer publishes values only; any number a job
            client = Client(info, 1, dead_after_s, wall, now, wall)
        client.stated, client.terms, client.since, client.columns = stated, terms, now, columns
        client.attached_as = client.epoch
        self.clients[info.client_id] = client
        self._forget_old(job)
        self._event(job, "attached", f"the {who(client)} attached")
        return self._granted(client)

    def heartbeat(
        self,
        client_id: str,
        activity: str,
        spans: Sequence[tuple[str, int, float, float]] = (),
        waits_s: float = 0.0,
    ) -> dict[str, Any]:
        """Record a sign of life, what the client did since (see progress.Span), and for how many seconds it has only
        waited for others (0: it is at work); returns what `attach` did, which may have changed: a client whose lease
        was over goes on under a new epoch. `notice` is there, once, where another was refused because of this client.
        Raises Fenced when the client was replaced, another took what it held, or Ray said that it is gone."""
        client, waits_s = self._live(client_id), check_seconds(waits_s, "waits_s")
        self.heard(client_id)
        client.waits_s = waits_s
        if spans:
            self._take_spans(client, spans)
        activity = shortened(activity, MOST_ACTIVITY)
        if activity != client.activity:
            client.activity, client.since = activity, client.last_beat
        notice = self._notices.pop(client_id, None)
        return {**self._granted(client), **({} if notice is None else {"notice": notice})}

    def heard(self, client_id: str) -> bool:
        """This client has just asked for something, whatever that is. Returns whether its lease was over: it goes on,
        as with `heartbeat`. Nothing happens where it is not attached."""
        client = self.clients.get(client_id)
        if client is None or not client.attached:
            return False
        if wakes := client.state == SILENT:
            self._wake(client)
        client.last_beat, client.last_beat_wall, client.vouched_at = self._clock(), self._wall(), None
        return wakes

    def agree(self, client_id: str, name: str, value: str) -> str:
        """What all clients of the job share under this name, as whoever came first said it: `value`, where nobody did.

        Raises:
            BadInput: no name and value of 1 to 200 characters.
        """
        job = self.jobs[self._live(client_id).info.job_id]
        return job.agreed.setdefault(check_name(name, "a name"), check_name(value, f"the value of {name!r:.100}"))

    def end(self, client_id: str, state: str, reason: str = "", crashed: bool = False) -> None:
        """A client ends as `finished`, `stopped`, `failed` or `dead`. Its leases are given back. Twice is once.

        In a job that is being drained nobody is through: who finishes has stopped, and may be started again.

        Args:
            crashed: it died by itself, as who failed did: not with its node, nor because it was stopped or replaced.
        """
        client = self.clients.get(client_id)
        if client is None or not client.attached:
            return
        job = self.jobs[client.info.job_id]
        if state == FINISHED and job.control == DRAINING:
            state, reason = STOPPED, reason or "the job was drained"
        reason = shortened(reason, MOST_REASON)
        client.state, client.reason, client.ended_at = state, reason, self._clock()
        if client.info.role == "consumer":
            group = job.groups[client.info.group]
            group.live, group.ended = group.live - 1, client
        self._event(job, state, f"the {who(client)} {state}: {reason or 'as planned'}")
        self._ended(job, client)
        if (crashed or state == FAILED) and client.training is not None:
            self._ended_in(job, client.training, reason)

    def silent(self, longer_than_s: float) -> list[Client]:
        """Live clients without a sign of life for `longer_than_s` seconds: those that are worth asking Ray about."""
        now = self._clock()
        return [c for c in self.clients.values() if c.attached and now - c.last_beat > longer_than_s]

    def silent_s(self, client: Client) -> float:
        """Seconds since its last sign of life."""
        return max(0.0, self._clock() - client.last_beat)

    def vouch(self, client: Client) -> None:
        """Ray calls this client alive: however long it is silent, its peers wait for it within their deadlines."""
        if client.attached:
            client.vouched_at = self._clock()

    def tick(self, stopped_s: float = 0.0) -> list[Client]:
        """End the leases of clients whose silence exceeds their own limit; returns them. To be called every second.

        Args:
            stopped_s: for so long this very process stood still since the last call, as measured: that nobody was
                heard meanwhile says nothing.
        """
        now = self._clock()
        if stopped_s > 0:
            for client in self.clients.values():
                client.last_beat = min(now, client.last_beat + stopped_s)
        late = [c for c in self.clients.values() if c.state == LIVE and now - c.last_beat > c.dead_after_s]
        for client in late:
            client.state, client.ended_at = SILENT, now
            client.reason = f"no sign of life for {now - client.last_beat:.1f} s"
            self._event(self.jobs[client.info.job_id], SILENT, f"the {who(client)}: {client.reason}")
        for client in [c for c in self.clients.values() if presumed_dead(c, now)]:
            if now - client.last_beat > _GIVEN_UP_S:
                self.end(client.info.client_id, DEAD, client.reason)
        return late

    def take_clients(self, clients: list[Client]) -> None:
        """Know these clients, of a ledger of another process: their clocks begin anew."""
        now = self._clock()
        for client in clients:
            client.last_beat = client.ended_at = client.since = now
            client.vouched_at = None
            if client.state == SILENT:
                client.state, client.reason = LIVE, ""
            self.clients[client.info.client_id] = client

    # ------------------------------------------------------------------ inside

    def _ended(self, job: Job, client: Client) -> None:
        """Called when a client has ended, whatever the way; the ledger gives its leases back."""

    def _ended_in(self, job: Job, rollout_id: int, reason: str) -> None:
        """Called when a train job ended while it trained on this rollout; the ledger counts."""

    def _job_for_attach(self, job_id: str) -> Job:
        job = self.jobs.get(job_id)
        if job is None or job.complete:  # a complete job holds nothing; its name begins a new one
            serial = revision = 0
            if job is not None:
                self._free_all(job)  # but a writer that lives on may have put a value since
                serial, revision = job.serial, job.revision
            job = Job(job_id, serial=serial, over=Ids.below(serial), revision=revision, began=self._wall())
            self.jobs[job_id] = job
            self.spans.pop(job_id, None)  # those of the job of before
            self.age(job)
        return job

    def _gone(self, job: Job, rollout_id: int) -> None:
        """Called when nobody can have a rollout any more; the ledger forgets it."""

    def _free_all(self, job: Job) -> None:
        """Called when a job is replaced; the ledger drops what it holds."""

    def _granted(self, client: Client) -> dict[str, Any]:
        job = self.jobs[client.info.job_id]
        return {"epoch": client.epoch, **{name: getattr(job, name) for name in SETTINGS}}

    def _wake(self, client: Client) -> None:
        """It is heard again, and nobody took its place nor what it holds."""
        job, silent_s = self.jobs[client.info.job_id], self._clock() - client.last_beat
        client.state, client.reason, client.ended_at = LIVE, "", 0.0
        if client is job.producer:
            job.producer_epoch += 1
            job.producer_woken += 1
            client.epoch = job.producer_epoch
        elif client.info.role == "consumer":
            group = job.groups[client.info.group]
            group.epoch += 1
            group.woken += 1
            client.epoch = group.epoch
        self._event(job, "woke", f"the {who(client)} is heard again after {silent_s:.1f} s, and goes on")

    def _while_silent(self, client: Client) -> str:
        return f" after {self._clock() - client.last_beat:.1f} s without a sign of life" * (client.state == SILENT)

    def _is_there(self, client: Client | None) -> bool:
        """Whether it is attached, and its peers do not take it for dead."""
        return client is not None and client.attached and not presumed_dead(client, self._clock())

    def _members(self, group: Group, job: Job) -> list[Client]:
        """Those that are attached, heard or not."""
        mine = [c for c in self.clients.values() if c.attached and c.info.job_id == job.job_id]
        return [c for c in mine if c.info.role == "consumer" and c.info.group == group.name]

    def _left(self, group: Group, job: Job) -> Client | None:
        """The member with which this group ended; None: one is there, or there never was one."""
        if group.live == 0:
            return group.ended
        if group.last is not None and group.last.state == LIVE:
            return None
        members = self._members(group, job)
        if any(self._is_there(member) for member in members):
            return None
        return max(members, key=self._ended_at, default=None)

    def _ended_at(self, client: Client) -> float:
        """Since when its peers miss it (monotonic)."""
        if client.state == SILENT and client.vouched_at is not None:
            return max(client.ended_at, client.vouched_at + VOUCHED_S)
        return client.ended_at

    def _living(self, job_id: str) -> list[Client]:
        """The clients of a job that are there."""
        return [c for c in self.clients.values() if c.info.job_id == job_id and self._is_there(c)]

    def _forget_old(self, job: Job) -> None:
        """Clients that ended long ago are forgotten, or a job that is restarted for weeks would remember them all."""
        kept = [job.producer, *(c for g in job.groups.values() for c in (g.last, g.ended))]
        ended = [
            i for i, c in self.clients.items() if c.info.job_id == job.job_id and not c.attached and c not in kept
        ]
        for client_id in ended[:-_REMEMBERED]:
            del self.clients[client_id]

    def _agree_with_what_is_left(self, job: Job, terms: dict[str, Any], lasting: Sequence[str]) -> None:
        author = job.producer
        left = sorted(r for r in job.rollouts if r not in job.done)
        if author is None or not left:
            return
        if found := _differences({name: terms[name] for name in lasting if name in terms}, author.terms):
            raise Refused(
                f"this job and the {who(author)}, of which rollouts {left[0]} to {left[-1]} are left, disagree: "
                f"{'; '.join(found)}. Give it the same, or begin anew under another --job-id"
            )

    def _agree_on_columns(self, job: Job, role: str, columns: Sequence[str]) -> None:
        if not columns:
            return
        if role == "producer":
            for other in self._living(job.job_id):
                if other.info.role == "consumer" and (missing := [c for c in other.columns if c not in columns]):
                    raise Refused(
                        f"this producer's batches have columns {', '.join(columns)}; the {who(other)} needs "
                        f"{', '.join(other.columns)}: {', '.join(missing)} missing"
                    )
            return
        left = [r for r in job.rollouts if r not in job.done]
        newest = job.rollouts[max(left)][-1].payload.columns if left else ()
        has = newest or (job.producer.columns if job.producer is not None and job.producer.attached else ())
        if has and (missing := [c for c in columns if c not in has]):
            raise Refused(
                f"the rollouts of job {job.job_id} have columns {', '.join(has)}; this consumer needs "
                f"{', '.join(columns)}: {', '.join(missing)} missing"
            )

    def _agree(
        self, job: Job, info: ClientInfo, stated: dict[str, Any], terms: dict[str, Any], leaving: Client | None
    ) -> list[Client]:
        """Returns those that disagree and count as dead: they have to go. Raises Refused where others disagree."""
        in_the_way = []
        for other in [c for c in self.clients.values() if c.attached and c.info.job_id == job.job_id]:
            if other is leaving:
                continue
            found = [
                f"{flag(name)} is {_both(value, other.stated[name])}"
                for name, value in stated.items()
                if other.stated.get(name, value) != value
            ]
            found += _differences(terms, other.terms)
            if found and self._is_there(other):
                self._notices[other.info.client_id] = (
                    f"a {info.role} was refused (Ray job {info.ray_job_id or '?'}, pid {info.pid} on "
                    f"{info.host or '?'}), because it and this job disagree: {'; '.join(found)} (there: this job)"
                )
                self._event(job, "refused", f"a {info.role}, by the {who(other)}: {'; '.join(found)}")
                raise Refused(f"this job and the {who(other)} disagree: {'; '.join(found)}. Give both the same")
            if found:
                in_the_way.append(other)
        return in_the_way

    def _replaced_by(self, job: Job, info: ClientInfo) -> Client | None:
        """The live producer that `info` takes over from, if any. Raises JobIdTaken."""
        old = job.producer
        if info.role != "producer" or old is None or not old.attached:
            return None
        self._may_replace(old, info)
        return old

    def _may_replace(self, old: Client, new: ClientInfo) -> None:
        """Raises JobIdTaken unless both belong to the same Ray job, or the lease of the old one is over."""
        if old.state == SILENT:
            return
        same_cluster = old.info.cluster == new.cluster  # each counts its Ray jobs from 1
        if new.ray_job_id and old.info.ray_job_id == new.ray_job_id and same_cluster:
            return
        silent_s = self._clock() - old.last_beat
        raise JobIdTaken(
            f"job id {new.job_id} is taken: the {who(old)} is alive (last sign of life {silent_s:.1f} s ago). "
            "Stop that job, or choose another --job-id",
            silent_s,
        )

    def _live(self, client_id: str, role: str | None = None) -> Client:
        client = self.clients.get(client_id)
        if client is None:
            raise Forgotten(
                "the broker does not know this client: it ended long ago, or no vault that remembers it is left (they "
                "died, or were given up); start this job again"
            )
        if not client.attached:
            raise Fenced(
                f"this {who(client)} was ended ({client.state}: {client.reason or 'closed'}): it can do nothing more"
            )
        if role is not None and client.info.role != role:
            raise BadInput(f"only a {role} can do this, not a {client.info.role}")
        return client

    def _raise_if_producer_over(self, job: Job, grace_s: float) -> None:
        """Nothing more will be published: the job is drained, or its producer ended and stays away."""
        producer = job.producer
        if job.control == DRAINING and (producer is None or not producer.attached):
            raise Drained(f"job {job.job_id} was drained: nothing more is generated, what is not acked is kept")
        if producer is None or self._is_there(producer):
            return
        if producer.state == FINISHED:
            why = f" ({producer.reason})" if producer.reason else ""
            raise EndOfStream(f"the {who(producer)} finished{why}: job {job.job_id} has nothing more to claim")
        self._raise_peer(producer, grace_s)

    def _raise_peer(self, peer: Client, grace_s: float) -> None:
        if self._clock() - self._ended_at(peer) >= grace_s:
            found = verdict(peer, peer.info.role, peer.info.job_id, self._clock(), self._wall())
            self._count_verdict(peer.info.job_id, found)
            raise PeerFailed(found["message"], found)


def _differences(mine: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    return [
        f"{name} is {value!r} here and {theirs[name]!r} there"
        for name, value in sorted(mine.items())
        if theirs.get(name, value) != value
    ]


def _both(here: Any, there: Any) -> str:
    one, other = (without_password(value) if isinstance(value, str) else value for value in (here, there))
    return f"{one} here and {other} there" if one != other else f"{one} in both, with different credentials"
