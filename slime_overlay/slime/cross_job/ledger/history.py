"""What people want to know of a job: how far each rollout came, what happened, who waited for what. No decision hangs
on it.

    demanded ──► generating ──► published ──► claimed ──► acked ──► freed
                                   └── lost, dropped

The newest PROGRESS rollouts and EVENTS_KEPT events are remembered, and outlive the broker with the rest of the job. Of
a job that has been complete for SMALL_AFTER_S, few are kept, and no spans.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from ..types import shortened
from .operations import writes
from .registry import Registry
from .state import DEMANDED, Client, Event, Job, Progress

PROGRESS = 10_000
EVENTS_KEPT = 500
SPANS_KEPT = 20_000
SMALL_AFTER_S = 3600.0
SMALL_PROGRESS, SMALL_EVENTS = 200, 50
EVENTS = (
    *("attached", "silent", "woke", "finished", "stopped", "failed", "dead", "refused", "differs"),  # clients
    *("paused", "running", "draining", "requeued", "discarded", "closed"),  # its operator
    *("lost", "dropped", "regenerated", "outdated", "resumed", "rewound", "quarantined", "set aside"),  # rollouts
    *("restarted", "vault died", "store emptied"),  # its broker, and what it found
)
"""Kinds of events: they label a metric, so there is no other."""
WAITS = (
    *("producer demand", "producer space", "producer weights", "producer pause"),
    *("consumer data", "consumer weights", "consumer peer"),
)
"""Who waited for what."""
VERDICTS = (
    *("absent", "slow", "silent", "alive", "finished", "stopped", "failed", "dead"),  # on a peer
    *("paused", "full"),  # on what holds it back
)
"""Kinds of verdicts."""

Span = tuple[str, int, float, float, str]
"""(what, rollout id, begin, end (wall clock of the client, s), role of the client)."""


@dataclass(eq=False)
class History:
    """See the module."""

    registry: Registry
    spans: dict[str, deque[Span]] = field(default_factory=dict)

    @writes(of_job=True)
    def note_event(self, job_id: str, kind: str, text: str) -> None:
        """Something happened to a job that the ledger does not see."""
        if job_id in self.registry.jobs:
            self.event(self.registry.jobs[job_id], kind, text)

    def age(self, job: Job) -> float:
        """Seconds for which brokers have kept this job. No step of the wall clock changes it, and a broker that
        restarts goes on with it."""
        now = self.registry.clock()
        if job.aged_at is not None:
            job.aged_s += now - job.aged_at
        job.aged_at = now
        return job.aged_s

    def take_age(self, job: Job) -> None:
        """This ledger keeps the job from now on. Times that lie ahead of its age are those of an earlier version, by
        the wall clock: they begin anew."""
        age = self.age(job)
        for rollout_id in [r for r, since in job.done.items() if since > age]:
            job.done[rollout_id] = age

    def make_small(self, job: Job) -> bool:
        """Keep of a job what is for people small. Whether anything went."""
        self.spans.pop(job.job_id, None)
        if len(job.progress) <= SMALL_PROGRESS and len(job.events) <= SMALL_EVENTS:
            return False
        over = [*job.progress][:-SMALL_PROGRESS], [*job.events][:-SMALL_EVENTS]
        for rollout_id in over[0]:
            del job.progress[rollout_id]
        for number in over[1]:
            del job.events[number]
        return True

    def note(self, job: Job, rollout_id: int, state: str = "", **facts: Any) -> None:
        """What happened to a rollout; its state stays where none is given."""
        job.seq += 1
        old = job.progress.get(rollout_id)
        if old is None:
            old = Progress(state or DEMANDED, job.seq)
        job.progress[rollout_id] = replace(old, state=state or old.state, seq=job.seq, **facts)
        if len(job.progress) > PROGRESS:
            del job.progress[next(iter(job.progress))]

    def event(self, job: Job, kind: str, text: str, rollout_id: int = -1) -> None:
        job.counts[kind] = job.counts.get(kind, 0) + 1
        number = sum(job.counts.values())
        job.events[number] = Event(self.registry.wall(), kind, shortened(text, 1000), rollout_id)
        if len(job.events) > EVENTS_KEPT:
            del job.events[next(iter(job.events))]

    def count_verdict(self, job_id: str, verdict: dict[str, Any]) -> dict[str, Any]:
        """This verdict is told to somebody who waited."""
        told, kind = self.registry.jobs[job_id].verdicts, verdict["kind"]
        told[kind] = told.get(kind, 0) + 1
        return verdict

    def count_bytes(self, job: Job, what: str, nbytes: int) -> None:
        job.nbytes[what] = job.nbytes.get(what, 0) + nbytes

    def take_spans(self, client: Client, spans: Iterable[tuple[str, int, float, float]]) -> None:
        kept = self.spans.setdefault(client.info.job_id, deque(maxlen=SPANS_KEPT))
        kept.extend((*span, client.info.role) for span in spans)
