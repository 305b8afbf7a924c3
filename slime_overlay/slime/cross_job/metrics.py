"""Figures for Prometheus, through `ray.util.metrics`: which there are, what a job's status says of them, and how the
broker exports them. Nothing here changes what a job does, and no failure of it reaches whoever calls.

    counters, gauges   of a job, from its status (status.py): the broker exports them every EVERY_S seconds
    histograms         of what a vault or a consumer just did: each observes its own

A metric is `slime_cross_job_<name>`, `ray_slime_cross_job_<name>` in Prometheus. Its labels are bounded: `job_id` (the
first JOB_LABELS of a process have their own, those that come later share OTHERS), and others whose values are listed.
Jobs with --cross-job-metrics off are left out. A job that is over keeps its figures for OVER_S seconds; then its
gauges are 0, so that no alert goes on for ever.

Ray is imported where something is exported, and nothing is where this process is not connected to it.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Protocol

from .ledger import Ledger
from .progress import EVENTS, VERDICTS, WAITS
from .records import DEAD, FAILED, FINISHED, LIVE, RUNNING, SILENT, STOPPED, Job

logger = logging.getLogger(__name__)

PREFIX = "slime_cross_job_"
EVERY_S = 5.0  # Ray passes on what it has every 10 s
OVER_S = 300.0
JOB_LABELS = 100
OTHERS = "others"

COUNTER, GAUGE, HISTOGRAM = "counter", "gauge", "histogram"

_NOTHING = 1e-9
"""With which a counter begins: Prometheus sees no rise of what was not there before, and Ray takes no 0."""
_LATE_S = 30.0  # a job that began longer ago when it is first seen was exported by the broker of another cluster

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_SIDES = ("producer", "consumer")
_BYTES = ("published", "claimed", "acked", "dropped")
_ROLLOUTS = {
    **{what: what for what in ("published", "republished", "claimed", "acked", "covered")},
    **{what: what for what in ("dropped", "regenerated", "delayed")},
    "lost": "losses",
}
"""Value of the label `what` -> the field of the status."""


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric; `labels` are those besides `job_id`, each with all the values that it can have."""

    name: str
    kind: str
    help: str
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    of_a_job: bool = True

    @property
    def label_names(self) -> tuple[str, ...]:
        return (*(("job_id",) if self.of_a_job else ()), *self.labels)


METRICS = {
    metric.name: metric
    for metric in (
        Metric(
            "rollouts_total",
            COUNTER,
            "Rollouts, by what happened to them; lost: with their vault, quarantined: damaged in the durable store",
            {"what": (*_ROLLOUTS, "quarantined")},
        ),
        Metric("bytes_total", COUNTER, "Bytes of rollouts, by what happened to them", {"what": _BYTES}),
        Metric(
            "wait_seconds_total",
            COUNTER,
            "Seconds that a side waited, by what it waited for",
            {"side": _SIDES, "what": ("demand", "space", "weights", "pause", "data", "peer")},
        ),
        Metric("leases_lost_total", COUNTER, "Leases that ended without an ack: the rollout is handed out again"),
        Metric(
            "restarts_total",
            COUNTER,
            "Later incarnations of a side; restarts of the broker; vaults that died with rollouts",
            {"side": (*_SIDES, "broker", "vault")},
        ),
        Metric("verdicts_total", COUNTER, "Verdicts on a peer, told to whoever waited for it", {"kind": VERDICTS}),
        Metric(
            "events_total", COUNTER, "What happened to the job that an operator may want to know", {"kind": EVENTS}
        ),
        Metric("queue_rollouts", GAUGE, "Published rollouts that some open group has not acked"),
        Metric("leased_rollouts", GAUGE, "Rollouts that a consumer holds"),
        Metric("demanded_rollouts", GAUGE, "Rollouts that are demanded and not published"),
        Metric("unstored_rollouts", GAUGE, "Rollouts that are not in the durable store yet (write-behind)"),
        Metric("held_bytes", GAUGE, "Bytes of the job's payloads in the object store"),
        Metric("oldest_queued_seconds", GAUGE, "Age of the oldest rollout in the queue"),
        Metric("idle_seconds", GAUGE, "Time since anything happened to a rollout; 0 unless the job is to run"),
        Metric("staleness_versions", GAUGE, "Weight versions that the oldest rollout in the queue is behind"),
        Metric("weights_version", GAUGE, "Newest weights"),
        Metric(
            "bottleneck_ratio",
            GAUGE,
            "Who is the bottleneck, lately: 1 generation (training waits for it), -1 training, 0 neither",
        ),
        Metric("waited_ratio", GAUGE, "Share of the time that a side waited for the other, lately", {"side": _SIDES}),
        Metric(
            "clients",
            GAUGE,
            "Producers and consumer groups, by the state of their newest client",
            {"side": _SIDES, "state": (LIVE, SILENT, FINISHED, STOPPED, FAILED, DEAD)},
        ),
        Metric("jobs", GAUGE, "Jobs whose figures this broker exports", of_a_job=False),
        Metric("publish_seconds", HISTOGRAM, "From a payload being there until the broker has recorded it"),
        Metric(
            "claim_seconds",
            HISTOGRAM,
            "From the claim of a rollout, or its publication if that is later, until its refs are there",
        ),
        Metric("store_seconds", HISTOGRAM, "A payload written to, or read from, a store", {"what": ("write", "read")}),
    )
}
"""Every metric, by its name without the prefix."""

Figure = tuple[str, tuple[str, ...]]
"""(name of the metric, values of its `labels`)."""


def figures(status: Mapping[str, Any]) -> dict[Figure, float]:
    """Counters (totals) and gauges that a job's status tells; a gauge that nobody knows yet is left out."""
    live = status["producer"] is not None and status["producer"]["state"] in (LIVE, SILENT)
    live |= any(group["live"] for group in status["groups"].values())
    running = live and status["control"] == RUNNING and not status["complete"]
    events, recent = status["events"], status["recent"]
    found: dict[Figure, float | None] = {
        **{("rollouts_total", (what,)): status[name] for what, name in _ROLLOUTS.items()},
        ("rollouts_total", ("quarantined",)): events.get("quarantined", 0),
        **{("bytes_total", (what,)): status["bytes"][what] for what in _BYTES},
        **{("wait_seconds_total", tuple(who.split())): status["waited"][who] for who in WAITS},
        ("leases_lost_total", ()): status["requeued"],
        ("restarts_total", ("producer",)): status["restarts"]["producer"],
        ("restarts_total", ("consumer",)): sum(n for who, n in status["restarts"].items() if who != "producer"),
        ("restarts_total", ("broker",)): events.get("restarted", 0),
        ("restarts_total", ("vault",)): events.get("vault died", 0),
        **{("verdicts_total", (kind,)): status["verdicts"].get(kind, 0) for kind in VERDICTS},
        **{("events_total", (kind,)): events.get(kind, 0) for kind in EVENTS},
        ("queue_rollouts", ()): status["queue_depth"],
        ("leased_rollouts", ()): status["leased"],
        ("demanded_rollouts", ()): status["demanded"],
        ("unstored_rollouts", ()): status["unstored"],
        ("held_bytes", ()): status["held_bytes"],
        ("oldest_queued_seconds", ()): status["oldest_queued_s"],
        ("idle_seconds", ()): status["idle_s"] if running else 0.0,
        ("staleness_versions", ()): status["staleness"],
        ("weights_version", ()): status["weight_version"],
        ("bottleneck_ratio", ()): status["bottleneck"],
        **{("waited_ratio", (side,)): recent[f"{side}_waited_share"] for side in _SIDES},
    }
    of_clients = dict.fromkeys(product(*METRICS["clients"].labels.values()), 0)
    for side, clients in (("producer", [status["producer"]]), ("consumer", [*status["consumers"].values()])):
        for client in clients:
            if client is not None:
                of_clients[side, DEAD if client["presumed_dead"] else client["state"]] += 1
    found |= {("clients", labels): count for labels, count in of_clients.items()}
    return {figure: float(value) for figure, value in found.items() if value is not None}


class Sink(Protocol):
    """Where figures go."""

    def ready(self) -> bool: ...

    def record(self, metric: Metric, labels: tuple[str, ...], value: float) -> None: ...


class RayMetrics:
    """`ray.util.metrics` of this process; ready while it is connected to Ray."""

    def __init__(self) -> None:
        self._made: dict[str, Callable[..., None]] = {}

    def ready(self) -> bool:
        import ray

        return bool(ray.is_initialized())

    def record(self, metric: Metric, labels: tuple[str, ...], value: float) -> None:
        """Add to a counter, set a gauge, observe in a histogram; `labels` are the values of its label_names."""
        if metric.name not in self._made:
            self._made[metric.name] = self._make(metric)
        self._made[metric.name](value, dict(zip(metric.label_names, labels)))

    def _make(self, metric: Metric) -> Callable[..., None]:
        from ray.util.metrics import Counter, Gauge, Histogram

        name, names = f"{PREFIX}{metric.name}", metric.label_names
        if metric.kind == COUNTER:
            return Counter(name, metric.help, names).inc
        if metric.kind == GAUGE:
            return Gauge(name, metric.help, names).set
        return Histogram(name, metric.help, [*_SECONDS], names).observe


class JobLabels:
    """The label of each job: its id, or OTHERS for those that come after the first JOB_LABELS."""

    def __init__(self, limit: int = JOB_LABELS):
        self._limit = limit
        self._known: set[str] = set()

    def of(self, job_id: str) -> str:
        if job_id not in self._known and len(self._known) < self._limit:
            self._known.add(job_id)
        return job_id if job_id in self._known else OTHERS


class Latencies:
    """Histograms of this process. Never raises."""

    def __init__(self, sink: Sink | None = None):
        self._sink = sink or RayMetrics()
        self._labels = JobLabels()
        self._failed = False

    def observe(self, name: str, job_id: str, seconds: float, *labels: str) -> None:
        """Something of this job took so many seconds; `labels` are the values of the metric's labels."""
        try:
            if self._sink.ready():
                self._sink.record(METRICS[name], (self._labels.of(job_id), *labels), max(0.0, seconds))
        except Exception as error:  # figures are for people: whoever did the work must not fail for them
            if not self._failed:
                logger.warning("latencies cannot be exported (said once): %s", error)
            self._failed = True


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
            self._base = {job_id: figures(status) for job_id, status in ledger.status().items()}
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
            logger.error("figures cannot be exported (said once)", exc_info=error)
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
        now = figures(self._ledger.status(job_id)[job_id])
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
        late = now if self._ledger.age(job) > _LATE_S else {}
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
            return job.complete and self._ledger.age(job) > OVER_S  # else it was short, or its clients may be back
        if known.over_since is None:
            known.over_since = self._clock()
        return self._clock() - known.over_since > OVER_S

    def _clear(self, known: _Known) -> None:
        """No more is said of this job: its gauges are 0."""
        for name, labels in known.gauges:
            self._sink.record(METRICS[name], (known.label, *labels), 0.0)
        known.gauges.clear()
