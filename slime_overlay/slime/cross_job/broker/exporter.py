"""How the broker exports the figures of its jobs to Prometheus, see metrics.py."""

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from ..ledger import Ledger
from ..ledger.state import Job
from ..metrics import _NOTHING, COUNTER, METRICS, OTHERS, Figure, JobLabels, RayMetrics, Sink, figures

logger = logging.getLogger(__name__)

EVERY_S = 5.0  # Ray passes on what it has every 10 s
OVER_S = 300.0
_LATE_S = 30.0  # a job that began longer ago when it is first seen was exported by another broker


@dataclass(slots=True)
class _Known:
    """What was exported of a job."""

    label: str
    began: float
    totals: dict[Figure, float] = field(default_factory=dict)
    gauges: set[Figure] = field(default_factory=set)
    over_since: float | None = None


class Exporter:
    """Exports what a ledger says of its jobs. Never raises.

    Counters get the difference since the last round. What the ledger knew when this was made is a base: a broker that
    restarts exports no jump. What happened in the last seconds before its death is in no counter then.
    """

    def __init__(
        self,
        ledger: Ledger,
        sink: Sink | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._ledger = ledger
        self._sink = sink or RayMetrics()
        self._clock = clock
        self._labels = JobLabels()
        self._jobs: dict[str, _Known] = {}
        self._of_others: set[Figure] = set()
        self._used = False  # some job had metrics on
        self._failed = False
        self._base: dict[str, dict[Figure, float]] = {}
        try:
            self._base = {job_id: figures(status) for job_id, status in ledger.views.status().items()}
        except Exception as error:
            self._complain(error)

    async def watch(self) -> None:
        """One round, after a while; the event loop gets its turn after every job."""
        await asyncio.sleep(EVERY_S)
        for _ in self._round():
            await asyncio.sleep(0)

    def export(self) -> None:
        """One round."""
        for _ in self._round():
            pass

    def _round(self) -> Iterator[None]:
        try:
            if not self._sink.ready():
                return
            of_others: dict[Figure, float] = {}
            shown = 0
            for job_id in [*self._ledger.jobs]:
                shown += self._export(job_id, of_others)
                yield
            for job_id in [job_id for job_id in self._jobs if job_id not in self._ledger.jobs]:
                self._clear(self._jobs.pop(job_id))
            self._of_others |= of_others.keys()
            for name, labels in self._of_others:
                self._sink.record(METRICS[name], (OTHERS, *labels), of_others.get((name, labels), 0.0))
            self._used |= shown > 0
            if self._used:
                self._sink.record(METRICS["jobs"], (), shown)
        except Exception as error:  # figures are for people: the broker must not fail for them
            self._complain(error)

    def _complain(self, error: Exception) -> None:
        if not self._failed:
            logger.error("figures cannot be exported (logged once)", exc_info=error)
        self._failed = True

    def _export(self, job_id: str, of_others: dict[Figure, float]) -> bool:
        """Whether this job is shown."""
        job = self._ledger.jobs.get(job_id)
        if job is None:
            return False  # forgotten since the round began
        known = self._jobs.get(job_id)
        if job.metrics != "on" or self._over(job, known):
            if known is not None:
                self._clear(known)
            return False
        now = figures(self._ledger.views.status(job_id)[job_id])
        if known is None:
            known = self._jobs[job_id] = self._begin(job, now)
        elif known.began != job.began:  # a new job of the same name
            known.began, known.totals = job.began, {}
        for figure, value in now.items():
            name, labels = figure
            if METRICS[name].kind == COUNTER:
                if (more := value - known.totals.get(figure, 0.0)) > 0:
                    self._sink.record(METRICS[name], (known.label, *labels), more)
                known.totals[figure] = value
            elif known.label == OTHERS:
                of_others[figure] = max(of_others.get(figure, value), value)
            else:
                self._sink.record(METRICS[name], (known.label, *labels), value)
                known.gauges.add(figure)
        for unknown in known.gauges - now.keys():  # as the staleness of an empty queue
            self._sink.record(METRICS[unknown[0]], (known.label, *unknown[1]), 0.0)
        return True

    def _begin(self, job: Job, now: dict[Figure, float]) -> _Known:
        known = _Known(self._labels.of(job.job_id), job.began)
        for name, labels in now:
            if METRICS[name].kind == COUNTER:
                self._sink.record(METRICS[name], (known.label, *labels), _NOTHING)
        late = now if self._ledger.history.age(job) > _LATE_S else {}
        known.totals = dict(self._base.pop(job.job_id, late))
        return known

    def _over(self, job: Job, known: _Known | None) -> bool:
        """Whether it has been over for so long that nobody looks at it: complete, or without a living client."""
        live = job.producer is not None and job.producer.attached
        if not job.complete and (live or any(group.live for group in job.groups.values())):
            if known is not None:
                known.over_since = None
            return False
        if known is None:
            return (
                job.complete and self._ledger.history.age(job) > OVER_S
            )  # else it was short, or its clients may be back
        if known.over_since is None:
            known.over_since = self._clock()
        return self._clock() - known.over_since > OVER_S

    def _clear(self, known: _Known) -> None:
        """No more is said of this job: its gauges are 0."""
        for name, labels in known.gauges:
            self._sink.record(METRICS[name], (known.label, *labels), 0.0)
        known.gauges.clear()
