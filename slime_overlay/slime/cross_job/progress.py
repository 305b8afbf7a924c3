"""What people want to know of a job: how far each rollout came, what happened, who waited for what. No decision hangs
on it. The base of the ledger; pure state, like it.

    demanded ──► generating ──► published ──► claimed ──► acked ──► freed
                                   └── lost, dropped

The newest PROGRESS rollouts and EVENTS_KEPT events are remembered, and outlive the broker with the rest of the job. Of
a job that has been complete for SMALL_AFTER_S, few are kept, and no spans.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from .records import DEMANDED, PAUSED, Client, Event, Job, Progress
from .types import shortened

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

_WAITS_OF = {
    **{"claim": "consumer data", "begin_update": "consumer weights", "loaded": "consumer weights"},
    "facts": "consumer peer",
}

Span = tuple[str, int, float, float, str]
"""(what, rollout id, begin, end (wall clock of the client, s), role of the client)."""


class Chronicle:
    """See the module."""

    jobs: dict[str, Job]
    clients: dict[str, Client]

    def __init__(self, clock: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time):
        self._clock = clock
        self._wall = wall
        self.spans: dict[str, deque[Span]] = {}

    def note_wait(self, client_id: str, operation: str, waited_s: float) -> None:
        """A client waited in this operation for so long, and waits still, or just got what it wanted."""
        client = self.clients.get(client_id)
        job = self.jobs.get(client.info.job_id) if client is not None else None
        if client is None or job is None:
            return
        if client.info.role == "producer":
            what = self._producer_waits_for(job) if operation == "next_demand" else ""
        elif client.info.role == "consumer" and self._drives(job, client.info.group):
            what = _WAITS_OF.get(operation, "")
        else:
            what = ""
        if what:
            job.waited[what] = job.waited.get(what, 0.0) + waited_s
            client.waited_s += waited_s

    def age(self, job: Job) -> float:
        """Seconds for which brokers have kept this job. No step of the wall clock changes it, and a broker that
        restarts goes on with it."""
        now = self._clock()
        if job.aged_at is not None:
            job.aged_s += now - job.aged_at
        job.aged_at = now
        return job.aged_s

    def note_event(self, job_id: str, kind: str, text: str) -> None:
        """Something happened to a job that the ledger does not see."""
        if job_id in self.jobs:
            self._event(self.jobs[job_id], kind, text)

    def take_age(self, job: Job) -> None:
        """This ledger keeps the job from now on. Times that lie ahead of its age are those of an earlier version, by
        the wall clock: they begin anew."""
        age = self.age(job)
        for rollout_id in [r for r, since in job.done.items() if since > age]:
            job.done[rollout_id] = age

    # ------------------------------------------------------------------ inside

    def _make_small(self, job: Job) -> bool:
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

    def _note(self, job: Job, rollout_id: int, state: str = "", **facts: Any) -> None:
        """What happened to a rollout; its state stays where none is given."""
        job.seq += 1
        old = job.progress.get(rollout_id)
        if old is None:
            old = Progress(state or DEMANDED, job.seq)
        job.progress[rollout_id] = replace(old, state=state or old.state, seq=job.seq, **facts)
        if len(job.progress) > PROGRESS:
            del job.progress[next(iter(job.progress))]

    def _event(self, job: Job, kind: str, text: str, rollout_id: int = -1) -> None:
        job.counts[kind] = job.counts.get(kind, 0) + 1
        number = sum(job.counts.values())
        job.events[number] = Event(self._wall(), kind, shortened(text, 1000), rollout_id)
        if len(job.events) > EVENTS_KEPT:
            del job.events[next(iter(job.events))]

    def _count_verdict(self, job_id: str, verdict: dict[str, Any]) -> dict[str, Any]:
        """This verdict is told to somebody who waited."""
        told, kind = self.jobs[job_id].verdicts, verdict["kind"]
        told[kind] = told.get(kind, 0) + 1
        return verdict

    def _count_bytes(self, job: Job, what: str, nbytes: int) -> None:
        job.nbytes[what] = job.nbytes.get(what, 0) + nbytes

    def _take_spans(self, client: Client, spans: Iterable[tuple[str, int, float, float]]) -> None:
        kept = self.spans.setdefault(client.info.job_id, deque(maxlen=SPANS_KEPT))
        kept.extend((*span, client.info.role) for span in spans)

    def _producer_waits_for(self, job: Job) -> str:
        if job.control == PAUSED:
            return "producer pause"
        if self._full(job):
            return "producer space"
        if job.gate.engines and not job.gate.open:
            return "producer weights"
        return "producer demand"

    def _drives(self, job: Job, group: str) -> bool:
        """Whether the producer works for this group."""
        return job.groups[group].demanded or not any(g.demanded for g in job.groups.values())

    def _full(self, job: Job) -> bool:
        """Whether the next rollout would exceed a bound; the pacing knows."""
        return False
