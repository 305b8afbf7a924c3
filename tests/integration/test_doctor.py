"""`doctor` against what it is there for, each fault caused for real: clusters, brokers, jobs and stores that are ill.

Stand-ins: the clock of the sick cluster (see sick_cluster.py), and the version of this process's Ray in the test of
another version, which stands for a machine with another Ray; it is Ray's own check that refuses.
"""

import contextlib
import http.server
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import ray

from job_api import job_client
from local_cluster import command_of
from slime.cross_job.broker.actor import Broker
from slime.cross_job.errors import PayloadDamaged
from slime.cross_job.ops.doctor import CHECKS, Finding, diagnose
from slime.cross_job.ops.doctor.stores import look_at_store
from slime.cross_job.ops.viewer import Viewer
from slime.cross_job.storage import open_store
from slime.cross_job.storage.payloads import Archive
from slime.cross_job.types import BROKER_NAME, VAULT_NAME
from tests.integration.sick_cluster import STORE_BYTES, TOKEN, SickCluster
from tests.support.actors import pid_of, stopped
from tests.support.patience import patient, within
from tests.support.ray_jobs import JOBS, Job, wait_for

NOWHERE = "127.0.0.1:1"  # nobody listens there: what needs no cluster is looked at all the same
FEW = {*CHECKS} - {"versions", "slime", "cluster", "durable store"}


def of(found: list[Finding], check: str) -> list[Finding]:
    return [one for one in found if one.check == check]


def worst(found: list[Finding], check: str) -> Finding:
    order = ("error", "warning", "note", "ok")
    return min(of(found, check), key=lambda one: order.index(one.severity))


def shown(found: list[Finding]) -> str:
    return "\n".join(map(str, found))


def helpful(one: Finding) -> bool:
    """Whoever reads it knows what is the case, and what to do."""
    return all([one.what, one.do])


# ------------------------------------------------------------------ no cluster


@contextlib.contextmanager
def listener(says: bytes) -> Iterator[str]:
    """The address of somebody who takes connections, says this, and nothing more."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken: list[socket.socket] = []

        def take() -> None:
            with contextlib.suppress(OSError):
                while True:
                    taken.append(server.accept()[0])
                    taken[-1].sendall(says)

        threading.Thread(target=take, daemon=True).start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)
        assert taken, "nobody connected: this is no witness"
        for connection in taken:
            connection.close()


def assert_no_cluster(found: list[Finding], words: str) -> None:
    assert words in worst(found, "cluster").what, shown(found)
    assert worst(found, "cluster").severity == "error"
    assert helpful(worst(found, "cluster"))
    assert {worst(found, check).severity for check in FEW} == {"note"}, shown(found)
    assert all("not looked at" in worst(found, check).what for check in FEW)
    assert worst(found, "versions").severity in ("ok", "warning")


@pytest.mark.ci
def test_where_nobody_listens():
    assert_no_cluster(diagnose(NOWHERE, "ns"), "nobody listens there")


def test_somebody_who_is_no_ray():
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        found = diagnose(f"127.0.0.1:{server.server_port}", "ns")
        server.shutdown()
    assert_no_cluster(found, "no Ray: it says b'")


def test_somebody_who_begins_like_ray_and_hangs():
    with within(30), listener(bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])) as address:
        assert_no_cluster(diagnose(address, "ns"), "no answer within 15 s")


def test_the_time_of_all_is_kept_and_what_was_not_looked_at_is_said(tmp_path, monkeypatch):
    (tmp_path / "ray.py").write_text("import time\ntime.sleep(600)\n")  # stands for whatever hangs
    monkeypatch.syspath_prepend(tmp_path)
    limit_s, began = min(patient(10), 13.0), time.monotonic()  # the check itself is given up after 15 s
    found = diagnose(NOWHERE, "ns", timeout_s=limit_s)
    assert time.monotonic() - began < limit_s + patient(8)
    assert f"the time of {limit_s:g} s was over" in worst(found, "cluster").what, shown(found)
    assert worst(found, "cluster").severity == "error"
    assert worst(found, "versions").severity in ("ok", "warning"), "what it had found by then is lost"


# ------------------------------------------------------------------ a healthy cluster


def test_a_namespace_without_a_broker_and_those_that_have_one(driver, job_id):
    named = ray.util.list_named_actors(all_namespaces=True)
    there = [actor["namespace"] for actor in named if actor["name"] == BROKER_NAME]
    if not there:  # this test runs alone
        ray.remote(Broker).options(name=BROKER_NAME, namespace=f"{job_id}-other", num_cpus=0, lifetime="detached")
    found = diagnose(driver.address, job_id)
    broker = worst(found, "broker")
    assert broker.severity == "error"
    assert helpful(broker)
    assert job_id in broker.what
    assert all(namespace in broker.what for namespace in there)
    assert worst(found, "jobs").severity == "note"
    assert worst(found, "nodes").severity == "ok", shown(found)
    after = ray.util.list_named_actors(all_namespaces=True)
    assert not [actor for actor in after if actor["namespace"] == job_id], "doctor made a broker"


def test_a_broker_of_another_protocol(driver, job_id):
    options = {"name": BROKER_NAME, "namespace": job_id, "num_cpus": 0}
    broker = ray.remote(Broker).options(**options).remote(job_id, protocol=999)
    assert ray.get(broker.hello.remote(), timeout=60)["protocol"] == 999
    found = diagnose(driver.address, job_id)
    ray.kill(broker)
    assert worst(found, "broker").severity == "error"
    assert "speaks protocol 999" in worst(found, "broker").what
    assert helpful(worst(found, "broker"))
    assert worst(found, "jobs").severity == "note", shown(found)


def test_a_cluster_of_another_version(cluster, tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text("import ray\nray.__version__ = '2.53.0'\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = diagnose(cluster.address, "ns")
    other = worst(found, "cluster")
    assert other.severity == "error", shown(found)
    assert f"Ray: {ray.__version__} Python" in other.what
    assert "Ray: 2.53.0" in other.what
    assert "the cluster's interpreter" in other.do
    assert worst(found, "broker").severity == "note"


# ------------------------------------------------------------------ jobs that are ill


@pytest.fixture(scope="module")
def ill(driver, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Two jobs, and what doctor found while they were well; while they were paused and one was stopped by SIGSTOP;
    when that one was killed and a payload in their store was damaged; and with the vault stopped. With witnesses."""
    name, folder = "doctor-ill", tmp_path_factory.mktemp("ill")
    store = f"file://{folder}/store"
    client = job_client(driver.api)
    options = [name, name, "--store", store, "--dead-after-s", 40]
    producer, consumer = (Job(client, "doctor_job.py", role, *options) for role in ("producer", "consumer"))
    pid, node_id = producer.said()["pid"], producer.said()["node_id"]
    consumer.said()
    viewer = Viewer(name)
    seen: dict[str, Any] = {"pid": pid, "well": diagnose(driver.address, name, timeout_s=60)}
    seen["left"] = [path.name for path in (folder / "store").iterdir()]
    viewer.steer("control", name, "paused")
    with stopped(pid):
        wait_for(lambda: viewer.status(name)["producer"]["silent_s"] > 10.5, 90)  # most of its lease is left to doctor
        seen["silent"] = diagnose(driver.address, name, name)
        seen["still"] = viewer.status(name)["producer"]["state"]
    archive = Archive(open_store(store), name)
    seen["damaged"] = archive.names()[0]
    (part,) = folder.glob(f"store/{name}/payload/{seen['damaged']}.0.*")
    part.write_bytes(part.read_bytes()[:-8] + b"\xff" * 8)
    with pytest.raises(PayloadDamaged):
        archive.load(seen["damaged"])
    viewer.steer("control", name, "running")
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: "its Ray job is FAILED" in viewer.status(name)["producer"]["reason"], 60)
    seen["dead"] = diagnose(driver.address, name)
    with stopped(pid_of(name, f"{VAULT_NAME}_{node_id}")):
        seen["vault"] = diagnose(driver.address, name, "another-job")
    yield seen
    client.stop_job(consumer.id)


@pytest.mark.ci
def test_what_is_well_is_told_with_its_figures(ill):
    found = ill["well"]
    ill_found = [one for one in found if one.severity in ("error", "warning")]
    assert [one for one in ill_found if not one.what.startswith("it is slow")] == [], shown(found)  # a disk may be
    assert list(dict.fromkeys(one.check for one in found)) == [*CHECKS]
    # the metrics of a node that has just started lack what was spilled
    assert {one.check for one in found if one.severity == "note"} <= {"slime", "spilling"}, shown(found)
    assert "it lets us in" in worst(found, "cluster").what
    assert "rollout job" in shown(of(found, "jobs"))
    assert "put bytes 0." in worst(found, "durable store").what
    assert not [name for name in ill["left"] if name.startswith("slime-cross-job-doctor")], "it left something"


@pytest.mark.ci
def test_a_client_that_is_silent(ill):
    assert ill["still"] == "live", "the lease ended meanwhile: this is no witness"
    said = shown(of(ill["silent"], "jobs"))
    assert re.search(r"The rollout job gives no sign of life for \d\d s of its lease of 40 s", said), said
    assert f"pid {ill['pid']} on" in said
    assert worst(ill["silent"], "jobs").severity == "warning"


def test_a_vault_that_does_not_answer(ill):
    vault = worst(ill["vault"], "vaults")
    assert vault.severity == "error", shown(ill["vault"])
    assert vault.where.startswith("vault of node ")
    assert helpful(vault)
    assert worst(ill["dead"], "vaults").severity == "ok", shown(ill["dead"])


def test_a_job_that_is_paused(ill):
    assert "Paused by its operator" in shown(of(ill["silent"], "jobs"))


def test_a_job_whose_peer_is_gone(ill):
    gone = worst(ill["dead"], "jobs")
    assert gone.severity == "error", shown(ill["dead"])
    assert gone.what.startswith("The rollout job is dead")
    assert "its Ray job is FAILED" in gone.what
    assert "Start it again" in gone.what
    assert f"pid {ill['pid']} on" in shown(of(ill["dead"], "jobs"))


def test_payloads_in_quarantine(ill):
    assert worst(ill["silent"], "quarantine").severity == "ok", shown(ill["silent"])
    found = worst(ill["dead"], "quarantine")
    assert found.severity == "warning"
    assert ill["damaged"] in found.what
    assert "another checksum" in found.what
    assert helpful(found)


def test_a_job_that_nobody_knows(ill):
    unknown = worst(ill["vault"], "jobs")
    assert (unknown.severity, unknown.where) == ("error", "another-job")
    assert "it knows doctor-ill" in unknown.what


# ------------------------------------------------------------------ a sick cluster


@pytest.fixture(scope="module")
def sick(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SickCluster]:
    with SickCluster(tmp_path_factory.mktemp("sick")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def sickness(sick: SickCluster) -> Iterator[list[Finding]]:
    """What doctor finds there, with the right token, while more is published than its object store holds."""
    words = ["producer", "large", "ns", "--rollouts", "3", "--numbers", "5000000"]
    env = {**sick.env, "RAY_ADDRESS": sick.address}
    with (
        subprocess.Popen(
            [sys.executable, str(JOBS / "doctor_job.py"), *words], env=env, stdout=subprocess.PIPE
        ) as producer,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", TOKEN)
        assert producer.stdout is not None
        assert b"SAID" in producer.stdout.readline()
        found: list[Finding] = []

        def told() -> bool:  # Ray renews a node's metrics every 10 s
            found[:] = diagnose(sick.address, "ns")
            return worst(found, "spilling").severity not in ("ok", "note")

        try:
            with contextlib.suppress(AssertionError):
                wait_for(told, 30)
            yield found
        finally:
            producer.kill()


@pytest.mark.parametrize(
    "sent",
    [
        {"RAY_AUTH_MODE": "disabled"},
        {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "w" * 32},
        {"RAY_AUTH_MODE": "token"},
    ],
    ids=["none", "another", "none although it shall"],
)
def test_a_cluster_that_asks_for_a_token(sick, monkeypatch, tmp_path, sent):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    for name, value in sent.items():
        monkeypatch.setenv(name, value)
    found = diagnose(sick.address, "ns")
    assert worst(found, "cluster").severity == "error", shown(found)
    assert "RAY_AUTH_TOKEN" in worst(found, "cluster").do, shown(found)
    assert worst(found, "broker").severity == "note"
    assert "w" * 32 not in shown(found)


def test_an_object_store_that_is_too_small_for_the_rollouts(sickness):
    assert "it lets us in, with a token" in worst(sickness, "cluster").what, shown(sickness)
    found = worst(sickness, "object store")
    assert found.severity == "warning", shown(sickness)
    assert f"it has {STORE_BYTES / 1e6:.1f} MB" in found.what
    assert "rollouts of up to 40.0 MB" in found.what
    assert "--object-store-memory 200000000 or more" in found.do


@pytest.mark.parametrize(
    ("check", "what"),
    [("spilling", "of objects lie on disk"), ("clocks", "its clock is 90.0 s ahead of this machine's")],
)
def test_an_object_store_that_spills_and_a_clock_that_is_ahead(sickness, check, what):
    found = worst(sickness, check)
    assert found.severity == "warning", shown(sickness)
    assert what in found.what
    assert helpful(found)


def test_a_small_dev_shm(sick, sickness):
    if not sick.small_shm:
        pytest.skip("only root may give the cluster a /dev/shm of its own")
    log = (sick.folder / "start.log").read_text()
    assert "instead of /dev/shm because /dev/shm has only" in log, "Ray uses it all the same: this is no witness"
    found = worst(sickness, "shared memory")
    assert found.severity == "error", shown(sickness)
    assert "/dev/shm has 40.0 MB" in found.what
    assert helpful(found)


def test_a_head_that_hangs(sick, sickness, monkeypatch):
    """The last of those that need this cluster."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    (gcs,) = [pid for pid in sick.pids() if "gcs_server" in command_of(pid)[0]]
    with within(20), stopped(gcs):
        found = diagnose(sick.address, "ns", timeout_s=20)
    assert "says nothing for" in worst(found, "cluster").what, shown(found)


# ------------------------------------------------------------------ durable stores


def store_found(uri: str) -> Finding:
    return look_at_store(uri, 3.0)


@contextlib.contextmanager
def slow_proxy(port: int, delay_s: float) -> Iterator[int]:
    """A port in front of a server, as of one that is far away: each request takes so much longer."""
    waits: list[float] = []

    def pump(source: socket.socket, target: socket.socket, turn: list[str], me: str) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if me == "client" != turn[0]:  # the first of a request
                    time.sleep(delay_s)
                    waits.append(delay_s)
                turn[0] = me
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    def take() -> None:
        with contextlib.suppress(OSError):
            while True:
                near, far, turn = server.accept()[0], socket.create_connection(("127.0.0.1", port)), [""]
                threading.Thread(target=pump, args=(near, far, turn, "client"), daemon=True).start()
                threading.Thread(target=pump, args=(far, near, turn, "server"), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=take, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
        assert waits, "nothing was slow: this is no witness"


def test_a_store_that_is_well(new_redis):
    found = diagnose(NOWHERE, "ns", store=new_redis().uri)  # which needs no cluster
    assert worst(found, "cluster").severity == "error"
    assert worst(found, "durable store").severity == "ok", shown(found)
    assert "put MB" in worst(found, "durable store").what


@pytest.mark.ci
def test_a_store_that_is_unreachable(own_redis):
    server = own_redis(requirepass="open-sesame")
    assert store_found(server.uri).severity == "ok"
    server.kill()
    found = store_found(server.uri)
    assert found.severity == "error"
    assert "does not answer" in found.what
    assert helpful(found)
    assert "open-sesame" not in str(found)
    assert ":***@" in found.where
    server.start()
    assert store_found(server.uri).severity == "ok"


def test_a_store_that_is_slow(new_redis):
    server = new_redis()
    with slow_proxy(server.port, 0.6) as port:
        found = store_found(f"redis://127.0.0.1:{port}/0")
    assert found.severity == "warning", str(found)
    assert "it is slow" in found.what
    assert "put bytes 0.6" in found.what
    assert helpful(found)


def test_a_store_that_is_full(new_redis):
    found = store_found(new_redis(maxmemory="2mb").uri)
    assert found.severity == "error", str(found)
    assert "raise maxmemory, or keep less" in found.what
    assert helpful(found)


def test_a_store_that_is_none():
    assert store_found("redis:/nowhere").severity == "error"
    assert store_found("file:///no/such/folder/anywhere").severity == "error"
