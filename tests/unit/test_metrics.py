"""What the broker exports of its jobs, and how: the real ledger and exporter on a sink that writes down (it stands for
Ray's metrics and Prometheus behind them)."""

import asyncio
import re
from collections import defaultdict
from typing import Any

import pytest

from slime.cross_job.broker import exporter as exporter_module
from slime.cross_job.broker.actor import Broker
from slime.cross_job.broker.exporter import OVER_S, Exporter
from slime.cross_job.ledger.state import FINISHED, PAUSED
from slime.cross_job.metrics import COUNTER, GAUGE, METRICS, OTHERS, Latencies, RayMetrics, figures
from tests.support.ledger import attach, publish, restarted, train
from tests.support.ray_stand_in import attach_both, payload


class Written:
    """Stands for Ray's metrics: adds up, sets, counts; ready unless it is told otherwise."""

    def __init__(self, error: Exception | None = None) -> None:
        self.is_ready, self.error = True, error
        self.values: dict[tuple[str, tuple[str, ...]], float] = defaultdict(float)
        self.observed: list[tuple[str, tuple[str, ...], float]] = []

    def ready(self) -> bool:
        return self.is_ready

    def record(self, metric: Any, labels: tuple[str, ...], value: float) -> None:
        if self.error is not None:
            raise self.error
        assert len(labels) == len(metric.label_names)
        if metric.kind == COUNTER:
            assert value > 0, "Ray refuses this"
            self.values[metric.name, labels] += value
        elif metric.kind == GAUGE:
            self.values[metric.name, labels] = value
        else:
            self.observed.append((metric.name, labels, value))

    def of(self, name: str, *labels: str) -> Any:
        return pytest.approx(self.values[name, labels], abs=1e-6) if (name, labels) in self.values else None


@pytest.fixture
def sink() -> Written:
    return Written()


@pytest.fixture
def exporter(ledger, sink, clock) -> Exporter:
    return Exporter(ledger, sink, clock)


def test_names_and_labels_are_bounded_and_follow_the_rule():
    for metric in METRICS.values():
        suffix = {"counter": r".*_total", "gauge": r"[a-z_]+", "histogram": r".*_seconds"}[metric.kind]
        assert re.fullmatch(suffix, metric.name), metric.name
        assert set(metric.label_names) <= {"job_id", "what", "side", "kind", "state"}, metric.name
        assert all(len(values) < 30 for values in metric.labels.values())
        assert metric.help


def test_every_figure_is_a_metric_with_labels_that_it_may_have(pair):
    publish(pair, 0)
    for (name, labels), value in figures(pair.status("exp")["exp"]).items():
        assert isinstance(value, float)
        assert len(labels) == len(METRICS[name].labels)
        for label, among in zip(labels, METRICS[name].labels.values()):
            assert label in among, (name, label)


def test_counters_get_the_difference_and_gauges_the_value(pair, exporter, sink):
    exporter.export()
    assert sink.of("rollouts_total", "exp", "published") == 0, "it is there before it rises"
    publish(pair, 0)
    publish(pair, 1)
    exporter.export()
    assert sink.of("rollouts_total", "exp", "published") == 2
    assert sink.of("queue_rollouts", "exp") == 2
    pair.claim("c", 0)
    exporter.export()
    exporter.export()
    assert sink.of("rollouts_total", "exp", "published") == 2
    assert sink.of("rollouts_total", "exp", "claimed") == 1
    assert sink.of("leased_rollouts", "exp") == 1
    assert sink.of("clients", "exp", "producer", "live") == 1
    assert sink.of("jobs") == 1


def test_a_broker_that_restarts_goes_on_from_what_was_exported_before(pair, clock, sink):
    again = restarted(pair, publish(pair, 0))
    exporter = Exporter(again, sink, clock)
    again.note_event("exp", "restarted", "")
    exporter.export()
    assert sink.of("rollouts_total", "exp", "published") == 0
    assert sink.of("restarts_total", "exp", "broker") == 1
    publish(again, 1)
    exporter.export()
    assert sink.of("rollouts_total", "exp", "published") == 1


def test_a_job_that_was_kept_by_another_broker_brings_no_jump(ledger, exporter, sink, clock):
    attach(ledger, "p")
    publish(ledger, 0)
    clock.now += 31
    exporter.export()
    assert sink.of("rollouts_total", "exp", "published") == 0


def test_a_name_that_begins_a_new_job_counts_on(pair, exporter, sink, clock):
    publish(pair, 0)
    exporter.export()
    train(pair, 0)
    for name in ("p", "c"):
        pair.end(name, FINISHED)
    exporter.export()
    clock.now += 1
    for name in ("p2", "c2"):
        attach(pair, name)
    publish(pair, 0, producer="p2")
    exporter.export()
    assert sink.of("rollouts_total", "exp", "published") == 2


def test_a_job_with_metrics_off_leaves_no_trace(ledger, exporter, sink):
    attach(ledger, "p", metrics="off")
    publish(ledger, 0)
    exporter.export()
    assert not sink.values


def test_a_job_that_is_over_is_shown_for_a_while_and_then_rings_no_alarm(pair, exporter, sink, clock):
    publish(pair, 0)
    exporter.export()
    pair.end("p", "failed", "it burns")
    pair.end("c", "dead", "")
    exporter.export()
    assert sink.of("clients", "exp", "producer", "failed") == 1
    clock.now += OVER_S + 1
    exporter.export()
    told = {key: value for key, value in sink.values.items() if METRICS[key[0]].kind == GAUGE}
    assert set(told.values()) == {0.0}
    attach(pair, "p3")
    exporter.export()
    assert sink.of("clients", "exp", "producer", "live") == 1


def test_a_job_that_is_paused_is_not_idle(pair, exporter, sink, clock):
    publish(pair, 0)
    clock.now += 100
    exporter.export()
    assert sink.of("idle_seconds", "exp") == 100
    pair.control("exp", PAUSED)
    exporter.export()
    assert sink.of("idle_seconds", "exp") == 0


def test_a_forgotten_job_rings_no_alarm(pair, exporter, sink):
    publish(pair, 0)
    exporter.export()
    del pair.jobs["exp"]
    exporter.export()
    assert sink.of("queue_rollouts", "exp") == 0
    assert sink.of("jobs") == 0


def test_jobs_beyond_the_first_hundred_share_a_label(ledger, exporter, sink):
    for n in range(103):
        attach(ledger, f"p{n}", job=f"job{n}")
        for rollout_id in range(n - 98 if n > 99 else 0):
            publish(ledger, rollout_id, producer=f"p{n}")
    exporter.export()
    labels = {labels[0] for name, labels in sink.values if name == "queue_rollouts"}
    assert labels == {*(f"job{n}" for n in range(100)), OTHERS}
    assert sink.of("rollouts_total", OTHERS, "published") == 2 + 3 + 4
    assert sink.of("queue_rollouts", OTHERS) == 4, "the greatest of them"


def test_verdicts_are_counted_by_kind(pair, exporter, sink):
    pair.peer_verdict("c")
    pair.peer_verdict("p")
    pair.control("exp", PAUSED)
    pair.peer_verdict("c")
    exporter.export()
    assert sink.of("verdicts_total", "exp", "alive") == 2
    assert sink.of("verdicts_total", "exp", "paused") == 1


def test_who_waited_for_what_is_a_counter_of_seconds(pair, exporter, sink):
    pair.views.note_wait("p", "next_demand", 2.5)
    exporter.export()
    assert sink.of("wait_seconds_total", "exp", "producer", "demand") == 2.5


def test_whatever_goes_wrong_is_said_once_and_hurts_nobody(pair, clock, caplog):
    exporter = Exporter(pair, Written(ValueError("no agent")), clock)
    for _ in range(3):
        exporter.export()
    latencies = Latencies(Written(ValueError("no agent")))
    for _ in range(3):
        latencies.observe("publish_seconds", "exp", 0.1)
    assert [record.message.partition(" (")[0] for record in caplog.records] == [
        "figures cannot be exported",
        "latencies cannot be exported",
    ]


def test_latencies_carry_the_job_and_are_never_negative():
    sink = Written()
    latencies = Latencies(sink)
    latencies.observe("claim_seconds", "exp", -0.1)  # of clocks that do not agree
    latencies.observe("store_seconds", "exp", 0.5, "write")
    assert sink.observed == [("claim_seconds", ("exp",), 0.0), ("store_seconds", ("exp", "write"), 0.5)]


def test_without_ray_nothing_is_exported(pair, clock):
    assert not RayMetrics().ready()
    exporter = Exporter(pair, None, clock)
    exporter.export()
    Latencies().observe("publish_seconds", "exp", 0.1)
    assert not exporter._jobs


async def test_the_broker_exports_every_few_seconds(broker: Broker, loop, monkeypatch):
    sink = Written()
    monkeypatch.setattr(exporter_module, "RayMetrics", lambda: sink)
    await attach_both(broker)
    await asyncio.sleep(exporter_module.EVERY_S + 1)
    await broker.call("publish", "p", 0, payload("t0"))
    await asyncio.sleep(exporter_module.EVERY_S + 1)
    assert sink.of("rollouts_total", "exp", "published") == 1
