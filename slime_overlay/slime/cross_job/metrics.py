"""Figures for Prometheus, through `ray.util.metrics`: which there are, and what a job's status says of them
(broker/exporter.py exports them). Nothing here changes what a job does, and no failure of it reaches whoever calls.

    counters, gauges   of a job, from its status (status.py): the broker exports them every EVERY_S seconds
    histograms         of what a vault or a consumer just did: each observes its own

A metric is `slime_cross_job_<name>`, `ray_slime_cross_job_<name>` in Prometheus. Its labels are bounded: `job_id` (the
first JOB_LABELS of a process have their own, those that come later share OTHERS), and others whose values are listed.
Jobs with --cross-job-metrics off are left out. A job that is over keeps its figures for OVER_S seconds; then its
gauges are 0, so that no alert goes on for ever.

Ray is imported where something is exported, and nothing is where this process is not connected to it.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Protocol

from .ledger.history import EVENTS, VERDICTS, WAITS
from .ledger.state import DEAD, FAILED, FINISHED, LIVE, RUNNING, SILENT, STOPPED

logger = logging.getLogger(__name__)

PREFIX = "slime_cross_job_"
JOB_LABELS = 100
OTHERS = "others"

COUNTER, GAUGE, HISTOGRAM = "counter", "gauge", "histogram"

_NOTHING = 1e-9
"""With which a counter begins: Prometheus sees no rise of what was not there before, and Ray takes no 0."""

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
                logger.warning("latencies cannot be exported (logged once): %s", error)
            self._failed = True
