"""Which producers and consumers are attached, in which incarnation, on which terms, and when each was last heard.

A client that is silent for longer than its lease loses its place only where another takes it; who ends, ends once, and
`on_end` is told: leases are given back there.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import BadInput, Drained, EndOfStream, JobIdTaken, PeerFailed, Poisoned, Refused
from ..redaction import without_password
from ..settings import OF_JOB, check_setting, flag
from ..types import (
    MOST_ACTIVITY,
    MOST_REASON,
    ClientInfo,
    Ids,
    check_facts,
    check_job_id,
    check_name,
    check_names,
    check_seconds,
    ids_text,
    in_words,
    shortened,
)
from .history import History
from .operations import reads, writes
from .registry import Registry
from .retention import Retention
from .state import DEAD, DRAINING, FINISHED, LIVE, RUNNING, SILENT, STOP, STOPPED, Client, Group, Job
from .verdicts import presumed_dead, set_aside, verdict, who

_REMEMBERED = 50  # ended clients a job
_GIVEN_UP_S = 86_400.0  # after which nobody expects to hear a client again that counts as dead


@dataclass(eq=False)
class Membership:
    """See the module."""

    registry: Registry
    history: History
    retention: Retention
    on_end: Callable[[Job, Client, bool], None] = lambda job, client, crashed: None
    notices: dict[str, str] = field(default_factory=dict)  # client id -> what its next sign of life is answered

    def attach(
        self,
        info: ClientInfo,
        dead_after_s: float = 30.0,
        terms: dict[str, Any] | None = None,
        lasting: Sequence[str] = (),
        columns: Sequence[str] = (),
        **stated: Any,
    ) -> dict[str, Any]:
        """Let a client in; returns {"epoch"} and the settings of the job, as they hold now.

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
        if unknown := set(stated) - set(OF_JOB):
            raise BadInput(f"{', '.join(sorted(unknown))}: no setting of a job; there are {', '.join(OF_JOB)}")
        stated = {name: check_setting(name, value) for name, value in stated.items() if value is not None}
        dead_after_s = check_setting("dead_after_s", dead_after_s)
        terms, columns = check_facts(terms, "terms"), check_names(columns, "columns")
        if info.role == "consumer":
            check_name(info.group, "a consumer group")
        known = self.registry.clients.get(info.client_id)
        if known is not None and known.attached:  # the same call again, whose answer was lost
            return self._granted(known)
        job = self._job_for_attach(check_job_id(info.job_id))
        stops = stated.get("on_poison", job.on_poison) == STOP
        for rollout_id, letter in job.dead_letters.items():
            if info.of_slime and not letter["replaced"] and (stops or letter["stuck"]):
                raise Poisoned(set_aside(job, rollout_id))
        replaced = self._replaced_by(job, info)
        in_the_way = self._agree(job, info, stated, terms, replaced)
        self._agree_with_what_is_left(job, terms, lasting)
        self._agree_on_columns(job, info.role, columns)
        if replaced is not None:
            self.end(
                replaced.info.client_id, DEAD, f"replaced by a newer producer{self.registry.while_silent(replaced)}"
            )
        for other in in_the_way:
            self.end(other.info.client_id, DEAD, f"others agreed on other settings{self.registry.while_silent(other)}")
        if job.control == DRAINING and not self.registry.living_of(job.job_id):
            job.control = RUNNING  # it was drained; whoever comes now begins again
        for name, value in stated.items():
            setattr(job, name, value)
        now, wall = self.registry.clock(), self.registry.wall()
        if info.role == "producer":
            job.producer_epoch += 1
            client = Client(info, job.producer_epoch, dead_after_s, wall, now)
            job.producer = client
        elif info.role == "consumer":
            group = job.groups.get(info.group)
            if group is None:
                group = job.groups[info.group] = Group(info.group)
                group.ready = sorted(job.rollouts)
            for rollout_id in [r for r in job.done if r not in group.acked]:  # no longer acked by all open groups
                del job.done[rollout_id]
                if rollout_id not in job.rollouts:  # lost since: it is not generated for who comes so late
                    self.retention.gone(job, rollout_id)
            group.epoch += 1
            client = Client(info, group.epoch, dead_after_s, wall, now)
            group.last, group.live = client, group.live + 1
        else:  # a writer publishes values only; any number a job
            client = Client(info, 1, dead_after_s, wall, now)
        client.stated, client.terms, client.since, client.columns = stated, terms, now, columns
        client.attached_as = client.epoch
        self.registry.clients[info.client_id] = client
        self._forget_old(job)
        self.history.event(job, "attached", f"the {who(client)} attached")
        return self._granted(client)

    @reads()
    def heartbeat(
        self,
        client_id: str,
        activity: str,
        spans: Sequence[tuple[str, int, float, float]] = (),
        waits_s: float = 0.0,
    ) -> dict[str, Any]:
        """Record a sign of life, what the client did since (see history.Span), and for how many seconds it has only
        waited for others (0: it is at work); returns what `attach` did, which may have changed: a client whose lease
        was over goes on under a new epoch. `notice` is there, once, where another was refused because of this client.
        Raises Fenced when the client was replaced, another took what it held, or Ray said that it is gone."""
        client, waits_s = self.registry.live(client_id), check_seconds(waits_s, "waits_s")
        self.heard(client_id)
        client.waits_s = waits_s
        if spans:
            self.history.take_spans(client, spans)
        activity = shortened(activity, MOST_ACTIVITY)
        if activity != client.activity:
            client.activity, client.since = activity, client.last_beat
        notice = self.notices.pop(client_id, None)
        return {**self._granted(client), **({} if notice is None else {"notice": notice})}

    def heard(self, client_id: str) -> bool:
        """This client has just asked for something, whatever that is. Returns whether its lease was over: it goes on,
        as with `heartbeat`. Nothing happens where it is not attached."""
        client = self.registry.clients.get(client_id)
        if client is None or not client.attached:
            return False
        if wakes := client.state == SILENT:
            self._wake(client)
        client.last_beat, client.vouched_at = self.registry.clock(), None
        return wakes

    @writes()
    def agree(self, client_id: str, name: str, value: str) -> str:
        """What all clients of the job share under this name, as whoever came first said it: `value`, where nobody did.

        Raises:
            BadInput: no name and value of 1 to 200 characters.
        """
        job = self.registry.jobs[self.registry.live(client_id).info.job_id]
        return job.agreed.setdefault(check_name(name, "a name"), check_name(value, f"the value of {name!r:.100}"))

    @writes(proxied=True)
    def end(self, client_id: str, state: str, reason: str = "", crashed: bool = False) -> None:
        """A client ends as `finished`, `stopped`, `failed` or `dead`. Its leases are given back. Twice is once.

        In a job that is being drained nobody is through: who finishes has stopped, and may be started again.

        Args:
            crashed: it died by itself, as who failed did: not with its node, nor because it was stopped or replaced.
        """
        client = self.registry.clients.get(client_id)
        if client is None or not client.attached:
            return
        job = self.registry.jobs[client.info.job_id]
        if state == FINISHED and job.control == DRAINING:
            state, reason = STOPPED, reason or "the job was drained"
        reason = shortened(reason, MOST_REASON)
        client.state, client.reason, client.ended_at = state, reason, self.registry.clock()
        if client.info.role == "consumer":
            group = job.groups[client.info.group]
            group.live, group.ended = group.live - 1, client
        self.history.event(job, state, f"the {who(client)} {state}: {reason or 'as planned'}")
        self.on_end(job, client, crashed)

    def silent(self, longer_than_s: float) -> list[Client]:
        """Live clients without a sign of life for `longer_than_s` seconds: those that are worth asking Ray about."""
        now = self.registry.clock()
        return [c for c in self.registry.clients.values() if c.attached and now - c.last_beat > longer_than_s]

    def silent_s(self, client: Client) -> float:
        """Seconds since its last sign of life."""
        return max(0.0, self.registry.clock() - client.last_beat)

    def vouch(self, client: Client) -> None:
        """Ray calls this client alive: however long it is silent, its peers wait for it within their deadlines."""
        if client.attached:
            client.vouched_at = self.registry.clock()

    def tick(self, stopped_s: float = 0.0) -> list[Client]:
        """End the leases of clients whose silence exceeds their own limit; returns them. To be called every second.

        Args:
            stopped_s: for so long this very process stood still since the last call, as measured: that nobody was
                heard meanwhile says nothing.
        """
        now = self.registry.clock()
        if stopped_s > 0:
            for client in self.registry.clients.values():
                client.last_beat = min(now, client.last_beat + stopped_s)
        late = [c for c in self.registry.clients.values() if c.state == LIVE and now - c.last_beat > c.dead_after_s]
        for client in late:
            client.state, client.ended_at = SILENT, now
            client.reason = f"no sign of life for {now - client.last_beat:.1f} s"
            self.history.event(self.registry.jobs[client.info.job_id], SILENT, f"the {who(client)}: {client.reason}")
        for client in [c for c in self.registry.clients.values() if presumed_dead(c, now)]:
            if now - client.last_beat > _GIVEN_UP_S:
                self.end(client.info.client_id, DEAD, client.reason)
        return late

    def take_clients(self, clients: list[Client]) -> None:
        """Know these clients, of a ledger of another process: their clocks begin anew."""
        now = self.registry.clock()
        for client in clients:
            client.last_beat = client.ended_at = client.since = now
            client.vouched_at = None
            if client.state == SILENT:
                client.state, client.reason = LIVE, ""
            self.registry.clients[client.info.client_id] = client

    def may_replace(self, old: Client, new: ClientInfo) -> None:
        """Raises JobIdTaken unless both belong to the same Ray job, or the lease of the old one is over."""
        if old.state == SILENT:
            return
        if new.ray_job_id and old.info.ray_job_id == new.ray_job_id:
            return
        silent_s = self.registry.clock() - old.last_beat
        raise JobIdTaken(
            f"job id {new.job_id} is taken: the {who(old)} is alive (last sign of life {silent_s:.1f} s ago). "
            "Stop that job, or choose another --job-id",
            silent_s,
        )

    def raise_if_producer_over(self, job: Job, grace_s: float) -> None:
        """Nothing more will be published: the job is drained, or its producer ended and stays away."""
        producer = job.producer
        if job.control == DRAINING and (producer is None or not producer.attached):
            raise Drained(f"job {job.job_id} was drained: nothing more is generated, what is not acked is kept")
        if producer is None or self.registry.is_there(producer):
            return
        if producer.state == FINISHED:
            why = f" ({producer.reason})" if producer.reason else ""
            raise EndOfStream(f"the {who(producer)} finished{why}: job {job.job_id} has nothing more to claim")
        self.raise_peer(producer, grace_s)

    def raise_peer(self, peer: Client, grace_s: float) -> None:
        if self.registry.clock() - self.registry.ended_at(peer) >= grace_s:
            found = verdict(peer, peer.info.role, peer.info.job_id, self.registry.clock())
            self.history.count_verdict(peer.info.job_id, found)
            raise PeerFailed(found["message"], found)

    def _job_for_attach(self, job_id: str) -> Job:
        job = self.registry.jobs.get(job_id)
        if job is None or job.complete:  # a complete job holds nothing; its name begins a new one
            serial = revision = 0
            if job is not None:
                self.retention.free_all(job)  # but a writer that lives on may have put a value since
                serial, revision = job.serial, job.revision
            job = Job(job_id, serial=serial, over=Ids.below(serial), revision=revision, began=self.registry.wall())
            self.registry.jobs[job_id] = job
            self.history.spans.pop(job_id, None)  # those of the job of before
            self.history.age(job)
        return job

    def _granted(self, client: Client) -> dict[str, Any]:
        job = self.registry.jobs[client.info.job_id]
        return {"epoch": client.epoch, **{name: getattr(job, name) for name in OF_JOB}}

    def _wake(self, client: Client) -> None:
        """It is heard again, and nobody took its place nor what it holds."""
        job, silent_s = self.registry.jobs[client.info.job_id], self.registry.clock() - client.last_beat
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
        self.history.event(job, "woke", f"the {who(client)} is heard again after {silent_s:.1f} s, and goes on")

    def _forget_old(self, job: Job) -> None:
        """Clients that ended long ago are forgotten, or a job that is restarted for weeks would remember them all."""
        kept = [job.producer, *(c for g in job.groups.values() for c in (g.last, g.ended))]
        ended = [
            i
            for i, c in self.registry.clients.items()
            if c.info.job_id == job.job_id and not c.attached and c not in kept
        ]
        for client_id in ended[:-_REMEMBERED]:
            del self.registry.clients[client_id]

    def _agree_with_what_is_left(self, job: Job, terms: dict[str, Any], lasting: Sequence[str]) -> None:
        author = job.producer
        left = sorted(r for r in job.rollouts if r not in job.done)
        if author is None or not left:
            return
        if found := _differences({name: terms[name] for name in lasting if name in terms}, author.terms):
            raise Refused(
                f"this job and the {who(author)}, which has left {ids_text(left)}, disagree: "
                f"{'; '.join(found)}. Give it the same, or begin anew under another --job-id"
            )

    def _agree_on_columns(self, job: Job, role: str, columns: Sequence[str]) -> None:
        if not columns:
            return
        if role == "producer":
            for other in self.registry.living_of(job.job_id):
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
        for other in [c for c in self.registry.clients.values() if c.attached and c.info.job_id == job.job_id]:
            if other is leaving:
                continue
            found = [
                f"{flag(name)} is {_both(value, other.stated[name])}"
                for name, value in stated.items()
                if other.stated.get(name, value) != value
            ]
            found += _differences(terms, other.terms)
            if found and self.registry.is_there(other):
                self.notices[other.info.client_id] = (
                    f"a {info.role} was refused (Ray job {info.ray_job_id or '?'}, pid {info.pid} on "
                    f"{info.host or '?'}), because it and this job disagree: {'; '.join(found)} (there: this job)"
                )
                self.history.event(job, "refused", f"a {info.role}, by the {who(other)}: {'; '.join(found)}")
                raise Refused(f"this job and the {who(other)} disagree: {'; '.join(found)}. Give both the same")
            if found:
                in_the_way.append(other)
        return in_the_way

    def _replaced_by(self, job: Job, info: ClientInfo) -> Client | None:
        """The live producer that `info` takes over from, if any. Raises JobIdTaken."""
        old = job.producer
        if info.role != "producer" or old is None or not old.attached:
            return None
        self.may_replace(old, info)
        return old


def _differences(mine: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    return [
        f"{name} is {in_words(value)} here and {in_words(theirs[name])} there"
        for name, value in sorted(mine.items())
        if theirs.get(name, value) != value
    ]


def _both(here: Any, there: Any) -> str:
    one, other = (without_password(value) if isinstance(value, str) else value for value in (here, there))
    return f"{one} here and {other} there" if one != other else f"{one} in both, with different credentials"
