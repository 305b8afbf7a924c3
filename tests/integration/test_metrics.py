"""What really happened is what a real Prometheus says of it, and every panel and alert of docker/ has data."""

import json
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import yaml

from slime.cross_job import Consumer, Producer
from slime.cross_job.client.connection import Connection
from slime.cross_job.errors import WaitTimeout
from slime.cross_job.metrics import METRICS
from slime.cross_job.types import BROKER_NAME, VAULT_NAME
from tests.integration.jobs.speak import columns
from tests.integration.prometheus import BOARD, DOCKER, RULES, Prometheus, program
from tests.support.actors import kill
from tests.support.patience import patient
from tests.support.ray_jobs import wait_for

ALERTS = [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]
UNIT_TESTS = Path(__file__).with_name("alerts_test.yml")
PANELS = [panel for panel in json.loads(BOARD.read_text())["panels"] if panel["type"] != "row"]
TARGETS = [(panel["title"], target["expr"]) for panel in PANELS for target in panel["targets"]]
SEEN_S = 60.0  # Ray passes on what it has every 10 s


def data_of(expr: str) -> str:
    """An alert's expression without its condition: what is compared, or what stands before `unless`."""
    found = re.fullmatch(r"(?P<data>.+?)\s+(?:(?:[<>]=?|==|!=)\s+-?[\d.e]+|unless\s+.+)", expr, re.DOTALL)
    assert found, f"this alert ends neither in a comparison with a number nor in `unless`: {expr}"
    return found["data"]


def for_a_job(expr: str, job_id: str) -> str:
    """A panel's expression, with what Grafana would put in."""
    expr = expr.replace("$job_id", job_id).replace("$__rate_interval", "5m")
    assert "$" not in expr, expr
    return expr


# ---------------------------------------------------------------------- without a cluster


@pytest.mark.ci
def test_the_rules_are_well_formed_and_each_fires_when_it_should_only():
    for command in (["check", "rules", RULES], ["test", "rules", UNIT_TESTS]):
        done = subprocess.run(
            [program("promtool"), *command], capture_output=True, text=True, timeout=patient(60), check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
    (trouble,), (well,) = (test["promql_expr_test"] for test in yaml.safe_load(UNIT_TESTS.read_text())["tests"])
    assert {sample["labels"] for sample in trouble["exp_samples"]} == {f'{{alertname="{r["alert"]}"}}' for r in ALERTS}
    assert (well["expr"], well["exp_samples"]) == ("count by (alertname) (ALERTS)", [])


@pytest.mark.ci
def test_panels_and_alerts_name_metrics_that_there_are():
    used = {name for expr in (*(e for _, e in TARGETS), *(r["expr"] for r in ALERTS)) for name in names_in(expr)}
    known = {f"ray_slime_cross_job_{m.name}{'_bucket' * (m.kind == 'histogram')}" for m in METRICS.values()}
    assert used == known, "the board leaves a metric out, or names one that is not there"


def names_in(expr: str) -> set[str]:
    return set(re.findall(r"ray_\w+", expr))


def test_the_board_is_whole():
    board = json.loads(BOARD.read_text())
    assert {variable["name"] for variable in board["templating"]["list"]} == {"datasource", "job_id"}
    numbers = [panel["id"] for panel in board["panels"]]
    assert len({*numbers}) == len(numbers)
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        at = panel["gridPos"]
        places = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not taken & places, f"{panel['title']} lies on another panel"
        assert max(x for x, _ in places) < 24
        taken |= places
    for panel in PANELS:
        assert all(t["datasource"]["uid"] == "${datasource}" for t in (panel, *panel["targets"])), panel["title"]


def test_compose_gives_prometheus_and_grafana_what_lies_in_docker():
    services = yaml.safe_load((DOCKER / "docker-compose.yml").read_text())["services"]
    for name in ("prometheus", "grafana"):
        assert services[name]["profiles"] == ["metrics"]
        mounted = [v.partition(":")[0] for v in services[name]["volumes"] if v.startswith("./")]
        assert mounted
        assert all((DOCKER / path).exists() for path in mounted), mounted
    source = yaml.safe_load((DOCKER / "grafana/provisioning/datasources/prometheus.yml").read_text())["datasources"]
    assert source[0]["url"] == "http://prometheus:9090"
    (provider,) = yaml.safe_load((DOCKER / "grafana/provisioning/dashboards/slime-cross-job.yml").read_text())[
        "providers"
    ]
    assert f"./grafana/dashboards:{provider['options']['path']}:ro" in services["grafana"]["volumes"]


def test_every_alert_says_what_to_do():
    for rule in ALERTS:
        assert rule["annotations"].keys() == {"summary", "description"}, rule
        assert rule["labels"]["severity"] in ("critical", "warning")


# ---------------------------------------------------------------------- with one


@ray.remote(num_cpus=0)
class Holder:
    """A consumer in a process of its own, to be killed."""

    def hold(self, job_id: str, rollout_id: int, **settings: Any) -> int:
        self.consumer = Consumer(job_id, **settings)
        return self.consumer.claim(rollout_id, timeout_s=20).rollout_id


def wait_for_each_other(producer: Producer, consumer: Consumer) -> None:
    """Rollout 0: the producer waits for its demand, then the consumer for the data."""
    asked: list[int] = []
    producing = threading.Thread(target=lambda: asked.append(producer.next_demand(20)))
    producing.start()
    time.sleep(1.2)
    consumer.demand(0)
    producing.join()
    assert asked == [0]
    claiming = threading.Thread(target=lambda: consumer.claim(0, timeout_s=20).ack())
    claiming.start()
    time.sleep(1.2)
    producer.publish(0, columns(0), weight_version=0)
    claiming.join()


def lose_a_lease(producer: Producer, consumer: Consumer, **settings: Any) -> None:
    """Rollout 1: its consumer dies, another one gets it."""
    producer.publish(1, columns(1), weight_version=0)
    holder = Holder.remote()
    assert ray.get(holder.hold.remote(consumer.job_id, 1, **settings)) == 1
    ray.kill(holder)
    consumer.claim(1, timeout_s=30).ack()


def become_stale(producer: Producer, consumer: Consumer) -> None:
    """Rollout 2 is generated by weights that are too old when it is claimed; 3 waits in the queue, one behind."""
    producer.publish(2, columns(2), weight_version=0)
    consumer.publish_weights(5, {"w": np.array([1.0])})
    with pytest.raises(WaitTimeout):  # which is a verdict, too
        consumer.claim(2, timeout_s=0.5)
    producer.publish(2, columns(2), weight_version=5)
    consumer.claim(2, timeout_s=20).ack()
    producer.publish(3, columns(3), weight_version=4)


def damage(store: Path, job_id: str) -> None:
    """Change a byte of every payload of this job in its store."""
    parts = [path for path in (store / job_id / "payload").rglob("*") if path.is_file() and path.suffix != ".json"]
    assert parts
    for part in parts:
        found = bytearray(part.read_bytes())
        found[len(found) // 2] ^= 1
        part.write_bytes(found)


def wait_for_value(prometheus: Prometheus, expr: str, value: float) -> None:
    def is_so() -> bool:
        return prometheus.value(expr) == pytest.approx(value, abs=0.01)

    wait_for(is_so, SEEN_S, lambda: f"{expr}: {prometheus.query(expr)}, not {value}")


def wait_for_count(prometheus: Prometheus, metric: str, least: int) -> None:
    expr = f"sum(ray_slime_cross_job_{metric})"
    wait_for(
        lambda: (prometheus.value(expr) or 0) >= least,
        SEEN_S,
        lambda: f"{expr}: {prometheus.query(expr)}; scraped: {prometheus.query('up')}",
    )


@pytest.fixture(scope="module")
def prometheus(driver: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    with Prometheus(tmp_path_factory.mktemp("prometheus"), driver.api) as prometheus:
        yield prometheus


@pytest.fixture(scope="module")
def jobs(prometheus: Prometheus, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, dict[str, Any]]]:
    """Job id -> its status, after all that a metric tells has happened to `kept`, whose payloads are stored, `bare`,
    and `off`, which has metrics off. Their clients live on, and rollout 3 waits."""
    store = tmp_path_factory.mktemp("store")
    namespace = {"namespace": "metrics", "heartbeat_s": 0.3, "dead_after_s": 20.0}
    settings: dict[str, dict[str, Any]] = {
        "kept": {"store": f"file://{store}", "max_staleness": 1, "on_stale": "regenerate", "retain": 5, **namespace},
        "bare": {"max_staleness": 1, "on_stale": "drop", **namespace},
        "off": {"metrics": "off", **namespace},
    }
    producers = {job_id: Producer(job_id, **given) for job_id, given in settings.items()}
    consumers = {job_id: Consumer(job_id, **given) for job_id, given in settings.items()}
    for job_id in settings:
        wait_for_each_other(producers[job_id], consumers[job_id])
        lose_a_lease(producers[job_id], consumers[job_id], **settings[job_id])
        if job_id != "off":
            become_stale(producers[job_id], consumers[job_id])
    producers["bare"] = Producer("bare", **settings["bare"])  # which takes over from the first
    wait_for_count(prometheus, 'store_seconds_count{job_id="kept",what="write"}', 5)  # else they die with the vault
    kill("metrics", VAULT_NAME)
    consumers["kept"].claim(3, timeout_s=40).release()  # read from the store
    wait_for_count(prometheus, 'store_seconds_count{job_id="kept",what="read"}', 1)
    damage(store, "kept")
    kill("metrics", VAULT_NAME)
    with pytest.raises(WaitTimeout):
        consumers["kept"].claim(3, timeout_s=5)
    wait_for(lambda: Connection("metrics").call("status", "bare")["bare"]["losses"], 30)
    for job_id in ("kept", "bare"):
        producers[job_id].publish(3, columns(3), weight_version=4)
        consumers[job_id].demand(4)
    yield Connection("metrics").call("status")
    for client in (*producers.values(), *consumers.values()):
        client.stop()


@pytest.mark.ci
def test_prometheus_says_what_the_ledger_says(prometheus, jobs):
    for job_id in ("kept", "bare"):
        status = jobs[job_id]
        totals = {("rollouts_total", f'what="{what}"'): status[what] for what in ("published", "claimed", "acked")}
        totals |= {("rollouts_total", f'what="{what}"'): status[what] for what in ("dropped", "regenerated")}
        totals |= {
            ("rollouts_total", 'what="lost"'): status["losses"],
            ("rollouts_total", 'what="quarantined"'): status["events"].get("quarantined", 0),
            **{("bytes_total", f'what="{what}"'): nbytes for what, nbytes in status["bytes"].items()},
            ("leases_lost_total", ""): status["requeued"],
            ("restarts_total", 'side="producer"'): status["restarts"]["producer"],
            ("restarts_total", 'side="consumer"'): status["restarts"]["consumer train"],
            ("verdicts_total", ""): sum(status["verdicts"].values()),
        }
        for (name, labels), total in totals.items():
            wait_for_value(prometheus, f'sum(ray_slime_cross_job_{name}{{job_id="{job_id}",{labels}}})', total)


def test_all_of_it_happened(prometheus, jobs):
    kept, bare = jobs["kept"], jobs["bare"]
    assert kept["regenerated"] == bare["dropped"] == 1
    assert kept["events"]["quarantined"] == 1
    assert bare["losses"] >= 1
    assert kept["requeued"] >= 1
    assert bare["restarts"] == {"producer": 1, "consumer train": 1}
    assert min(kept["waited"]["producer demand"], kept["waited"]["consumer data"]) > 1
    assert jobs["off"]["published"] == 2
    wait_for_count(prometheus, 'publish_seconds_count{job_id="kept"}', 5)
    wait_for_count(prometheus, 'claim_seconds_count{job_id="kept"}', 4)


def test_a_job_with_metrics_off_is_not_to_be_seen(prometheus, jobs):
    assert wait_for(lambda: prometheus.query('{job_id="kept"}'), SEEN_S)
    assert prometheus.query('{job_id="off"}') == []


@pytest.mark.parametrize(("title", "expr"), TARGETS, ids=[f"{i}-{title}" for i, (title, _) in enumerate(TARGETS)])
def test_every_panel_has_data(prometheus, jobs, title, expr):
    expr = for_a_job(expr, "kept")
    found = wait_for(lambda: prometheus.query(expr), SEEN_S, lambda: f"{title}: {expr}")
    assert all(row["value"][1] != "NaN" for row in found) or "quantile" in expr, found


@pytest.mark.parametrize("rule", ALERTS, ids=[rule["alert"] for rule in ALERTS])
def test_every_alert_has_data(prometheus, jobs, rule):
    expr = data_of(rule["expr"])
    wait_for(lambda: prometheus.query(expr), SEEN_S, lambda: expr)
    known = {r["name"]: r for group in prometheus.ask("rules")["groups"] for r in group["rules"]}
    assert known[rule["alert"]]["health"] == "ok", known[rule["alert"]]


def test_a_broker_that_restarts_exports_no_jump(prometheus, jobs):
    published = 'ray_slime_cross_job_rollouts_total{job_id="bare",what="published"}'
    before = {row["metric"]["WorkerId"] for row in prometheus.query(published)}
    kill("metrics", BROKER_NAME)
    found = wait_for(
        lambda: [row for row in prometheus.query(published) if row["metric"]["WorkerId"] not in before], SEEN_S
    )
    assert [float(row["value"][1]) for row in found] == [pytest.approx(0, abs=0.01)]
    wait_for_value(prometheus, 'sum(ray_slime_cross_job_restarts_total{job_id="bare",side="broker"})', 1)
