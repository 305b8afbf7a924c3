"""The command that ends a namespace, without a cluster: what it says, when it refuses, and whom it kills."""

from types import SimpleNamespace
from typing import Any

import pytest
import ray
from typer.testing import CliRunner

from slime.cross_job.errors import BrokerLost, NoBroker, Refused, Unreachable
from slime.cross_job.ops import steer, viewer
from slime.cross_job.ops.app import app
from slime.cross_job.types import BROKER_NAME, VAULT_NAME

V1, V2 = f"{VAULT_NAME}_1", f"{VAULT_NAME}_2"
STATS = {"payloads": 2, "nbytes": 3_000_000, "behind": 1}
STATUS = {"queue_depth": 2, "store": None, "producer": None, "consumers": {}}


class Cluster:
    """Stands in for `ray`: named actors of two namespaces; vaults that hold something, or are silent."""

    exceptions = ray.exceptions

    def __init__(self) -> None:
        self.there = {("ns", V1), ("ns", BROKER_NAME), ("ns", V2), ("other", BROKER_NAME), ("ns", "somebody")}
        self.silent: set[str] = set()
        self.killed: list[str] = []
        self.comes_back: list[str] = []
        self.slept_s: list[float] = []
        self.util = SimpleNamespace(
            list_named_actors=lambda all_namespaces: [{"namespace": n, "name": a} for n, a in sorted(self.there)]
        )

    def get_actor(self, name: str, namespace: str) -> Any:
        if (namespace, name) not in self.there:
            raise ValueError(name)
        return SimpleNamespace(key=(namespace, name), stats=SimpleNamespace(remote=lambda: name))

    def kill(self, handle: Any, no_restart: bool) -> None:
        assert no_restart
        self.there.discard(handle.key)
        self.killed.append(handle.key[1])
        if self.comes_back:
            self.there.add(("ns", self.comes_back.pop()))


@pytest.fixture
def cluster(monkeypatch) -> Cluster:
    cluster, now = Cluster(), SimpleNamespace(s=0.0)

    def get(name: str, deadline: Any, what: str) -> Any:
        if name in cluster.silent:
            raise ray.exceptions.ActorUnavailableError("silent", b"1" * 16)
        return STATS

    class Deadline:
        def __init__(self, timeout_s: float):
            self.at = now.s + timeout_s

        def __bool__(self) -> bool:
            return now.s < self.at

    def sleep(seconds: float) -> None:
        now.s += seconds
        cluster.slept_s.append(seconds)

    monkeypatch.setattr(viewer, "ray", cluster)
    monkeypatch.setattr(viewer, "get", get)
    monkeypatch.setattr(viewer, "Deadline", Deadline)
    for module in (viewer, steer):
        monkeypatch.setattr(module, "time", SimpleNamespace(sleep=sleep))
    return cluster


@pytest.fixture
def jobs(monkeypatch) -> SimpleNamespace:
    """What the broker says: `living` and `status`, or an `error`; `ended` are clients that it was told to end."""
    said = SimpleNamespace(living={}, status={"exp": {**STATUS}}, ended=[], error=None)

    def connected(address: str | None, namespace: str) -> Any:
        if said.error is not None:
            raise said.error
        return SimpleNamespace(
            living=lambda: said.living,
            jobs=lambda: said.status,
            end_client=lambda client_id, why: said.ended.append((client_id, why)),
        )

    monkeypatch.setattr(steer, "connected", connected)
    return said


def shutdown(*words: str) -> tuple[str, BaseException | None]:
    result = CliRunner().invoke(app, ["shutdown", "--namespace", "ns", *words])
    return result.output, result.exception


def test_it_says_what_goes_and_kills_the_broker_first_and_nobody_else(cluster, jobs):
    said, error = shutdown("--yes")
    assert error is None
    assert "namespace ns ends: 4 payloads are freed, 6.0 MB" in said
    assert "rollouts that are not acked are among them, of exp" in said
    assert "2 are not in their durable store yet, and are lost" in said
    assert "how 1 jobs without a durable store stand is forgotten; what lies in durable stores stays" in said
    assert "3 actors ended, 6.0 MB freed" in said
    assert cluster.killed == [BROKER_NAME, V1, V2]
    assert cluster.there == {("other", BROKER_NAME), ("ns", "somebody")}


def test_nobody_is_killed_unasked(cluster, jobs):
    assert "add --yes" in str(shutdown()[1])
    assert cluster.killed == []


def test_clients_that_are_attached_end_with_force_only(cluster, jobs):
    jobs.living = {"p": "producer of job exp", "c": "consumer of job exp"}
    _, error = shutdown("--yes")
    assert isinstance(error, Refused)
    assert "2 clients are attached in namespace 'ns', the first is the producer of job exp" in str(error)
    assert (cluster.killed, jobs.ended) == ([], [])
    cluster.comes_back = [V1, BROKER_NAME]
    said, error = shutdown("--yes", "--force")
    assert error is None
    assert "2 clients end with an error" in said
    assert [client for client, _ in jobs.ended] == ["p", "c"]
    assert len(cluster.killed) == 5, "what came back, too"
    assert not {name for namespace, name in cluster.there if namespace == "ns"} - {"somebody"}


def test_clients_hear_of_their_end_before_the_broker_goes(cluster, jobs):
    """Or they would find none, and make another one: a sign of life comes within a third of the lease."""
    jobs.living = {"p": "producer of job exp", "c": "consumer of job exp"}
    jobs.status["exp"] |= {
        "producer": {"state": "live", "dead_after_s": 30.0},
        "consumers": {
            "train": {"state": "live", "dead_after_s": 180.0},
            "eval": {"state": "dead", "dead_after_s": 1e9},
        },
    }
    assert shutdown("--yes", "--force")[1] is None
    assert 60.0 < cluster.slept_s[0] < 70.0


def test_actors_that_come_back_all_the_time_are_said(cluster, jobs):
    cluster.comes_back = [BROKER_NAME] * 10_000
    _, error = shutdown("--yes")
    assert isinstance(error, Unreachable)
    assert "made by clients that live: end their jobs first" in str(error)


def test_a_broker_that_does_not_answer_needs_force(cluster, jobs):
    jobs.error, cluster.silent = BrokerLost("it waits for a vault"), {V2}
    _, error = shutdown("--yes")
    assert error is jobs.error
    said, error = shutdown("--yes", "--force")
    assert error is None
    assert "does not say which clients are attached" in said
    assert "1 vaults are silent, and do not say what they hold" in said
    assert cluster.killed == [BROKER_NAME, V1, V2]


@pytest.mark.parametrize("vaults", [True, False])
def test_vaults_without_a_broker_end_too(cluster, jobs, vaults):
    jobs.error = NoBroker("there is none")
    cluster.there = {("ns", V1)} if vaults else set()
    _, error = shutdown("--yes")
    assert (error is None) == vaults
    assert cluster.killed == [V1][: int(vaults)]
