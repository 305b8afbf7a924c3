"""The way to broker and vaults, as far as it needs no cluster."""

import http.server
import os
import socket
import subprocess
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from slime.cross_job.client import connection
from slime.cross_job.client.connection import (
    Connection,
    Deadline,
    check_address,
    ensure_ray,
    find_address,
    get,
    local_clusters,
    probe,
)
from slime.cross_job.errors import BadInput, BrokerLost, ClusterUnreachable, StoreUnreachable, Unreachable, WaitTimeout
from slime.cross_job.types import VAULT_NAME, Payload


def test_an_address_of_rays_client_is_refused_at_once(monkeypatch):
    with pytest.raises(BadInput, match=r"ray://head:10001 is an address of Ray's Client.*HOST:PORT"):
        ensure_ray("ray://head:10001")
    monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    with pytest.raises(BadInput, match="ray://head:10001"):
        ensure_ray()


def test_also_where_the_process_is_connected_with_it(monkeypatch):
    monkeypatch.setattr(connection.ray, "is_initialized", lambda: True)
    assert ensure_ray() is None
    monkeypatch.setattr(connection.ray_client, "is_connected", lambda: True)
    with pytest.raises(BadInput, match=r"connected with Ray's Client \(ray://\).*HOST:PORT"):
        ensure_ray()


@pytest.mark.parametrize("address", ["head:6379", "auto", "10.0.0.1:6379", "[::1]:6379"])
def test_other_addresses_are_taken_as_they_are(address):
    assert check_address(address) == address


@pytest.mark.parametrize(
    ("address", "why"),
    [("http://head:8265", "is the address of Ray's dashboard"), ("local", "would start another Ray cluster")],
)
def test_what_is_no_address_of_a_cluster_is_refused(address, why):
    with pytest.raises(BadInput, match=why):
        ensure_ray(address)


@pytest.fixture
def nodes(tmp_path):
    """nodes(ADDRESS): a process that Linux shows as a raylet of the cluster there."""
    started = []
    (tmp_path / "raylet").symlink_to("/bin/sh")

    def node(address):
        command = [str(tmp_path / "raylet"), "-c", "echo; read x", f"--gcs-address={address}", "--x=--gcs-address=no"]
        started.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        started[-1].stdout.readline()

    yield node
    for process in started:
        process.communicate()


def test_auto_is_the_one_cluster_of_this_machine_and_several_are_named(nodes, monkeypatch):
    others = local_clusters()  # of whatever else runs here
    monkeypatch.setattr(connection, "local_clusters", lambda: sorted({*local_clusters()} - {*others}))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ClusterUnreachable, match="no Ray cluster has a node on this machine"):
        find_address("auto")
    nodes("10.9.9.9:1")
    nodes("10.9.9.9:1")  # another node of the same
    assert find_address("auto") == "10.9.9.9:1"
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert find_address() == "10.9.9.9:1"
    nodes("10.9.9.9:2")
    for asked in ("auto", None):
        with pytest.raises(BadInput, match=r"several .* name one of them: 10\.9\.9\.9:1, 10\.9\.9\.9:2$"):
            find_address(asked)
    monkeypatch.setenv("RAY_ADDRESS", "10.9.9.9:2")  # named
    assert find_address() == "10.9.9.9:2"


@pytest.mark.parametrize("address", ["[::1]", "::1", "fd00::1:6379", "[fd00::1]", "::1:6379", "[]:6379"])
def test_an_address_of_ipv6_needs_brackets_and_a_port(address):
    with pytest.raises(ClusterUnreachable, match=r"an IPv6 address in brackets, as \[fd00::1\]:6379"):
        probe(address, 1.0, 1.0)


def test_a_head_is_found_at_an_address_of_ipv6():
    try:
        head = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")
    with head:
        asks = threading.Thread(target=probe, args=(f"[::1]:{head.getsockname()[1]}", 10.0, 10.0))
        asks.start()
        connection = head.accept()[0]
        with connection:
            assert connection.recv(3) == b"PRI", "it asks whether a gRPC server is there"
            connection.sendall(bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
            asks.join()


def test_somebody_who_is_no_ray_is_not_waited_for():
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(ClusterUnreachable, match="what listens there is not Ray: it says '"):
            ensure_ray(f"127.0.0.1:{server.server_port}")
        server.shutdown()
    with pytest.raises(ClusterUnreachable, match="nobody listens there"):
        ensure_ray(f"127.0.0.1:{server.server_port}")
    with pytest.raises(ClusterUnreachable, match="'head' is no address of a Ray cluster"):
        ensure_ray("head")


def test_somebody_who_says_nothing_is_not_waited_for_without_end(monkeypatch):
    monkeypatch.setattr(connection, "_SILENT_S", 0.2)
    said = r"what listens at 127\.0\.0\.1:\d+ says nothing for 0\.2 s"
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(ClusterUnreachable, match=said):
        ensure_ray(f"127.0.0.1:{silent.getsockname()[1]}")


# ---------------------------------------------------------------------- who is silent


class Refs:
    """Stands in for `ray.get` and the clock: an answer that comes after `answers_s`."""

    def __init__(self, answers_s: float):
        self.now, self.answers_s = 1000.0, answers_s
        self.asked = 0

    def get(self, ref: str, timeout: float) -> str:
        left = 1000.0 + self.answers_s - self.now
        self.now += min(timeout, left)
        if left > timeout:
            raise ray.exceptions.GetTimeoutError
        return ref

    def stands(self) -> str:
        self.asked += 1
        return "Ray calls it alive (pid 7 on node ab12, host9)"


@pytest.fixture
def silent(monkeypatch):
    def answers_after(seconds: float) -> Refs:
        refs = Refs(seconds)
        monkeypatch.setattr(connection.ray, "get", refs.get)
        monkeypatch.setattr(connection.ray, "is_initialized", lambda: True)
        monkeypatch.setattr(connection.time, "monotonic", lambda: refs.now)
        return refs

    return answers_after


def test_who_is_silent_is_waited_for_until_the_callers_deadline(silent, caplog):
    refs = silent(500.0)
    assert get("answer", Deadline(3600.0), "the broker", refs.stands) == "answer"
    assert "the broker has not answered for 13 s: Ray calls it alive (pid 7 on node ab12, host9)" in caplog.text
    assert len(caplog.records) < 20


def test_at_the_deadline_the_words_say_how_the_silent_one_stands(silent):
    refs = silent(5000.0)
    with pytest.raises(WaitTimeout, match=r"the broker has not answered for 60 s: Ray calls it alive") as raised:
        get("answer", Deadline(60.0), "the broker", refs.stands)
    assert raised.value.verdict["kind"] == "silent"


@pytest.mark.parametrize("stands", [None, lambda: "Ray calls it alive"])
def test_whoever_leaves_the_cluster_waits_for_no_answer_from_it(silent, monkeypatch, stands):
    """For a vault, too, of which nobody says how it stands: the wait went on to its deadline, a minute and a half."""
    refs = silent(5000.0)
    monkeypatch.setattr(connection.ray, "is_initialized", lambda: refs.now < 1020.0)
    with pytest.raises(ClusterUnreachable, match="has left its Ray cluster"):
        get("answer", Deadline(3600.0), "the vault", stands)
    assert refs.now < 1040.0


def test_a_quick_answer_asks_nobody(silent):
    refs = silent(1.0)
    assert get("answer", Deadline(60.0), "the broker", refs.stands) == "answer"
    assert refs.asked == 0


# ---------------------------------------------------------------------- the caller's deadline


class Silent:
    """Stands in for an actor that never answers."""

    def options(self, **_: Any) -> "Silent":
        return self

    def remote(self, *_: Any, **__: Any) -> "Silent":
        return self

    def __getattr__(self, method: str) -> "Silent":
        return self


CALLS = {
    "vault_on": lambda made, deadline: made.vault_on("1" * 56, deadline),
    "open": lambda made, deadline: made.open_refs(Payload("t", f"{VAULT_NAME}_node1", 1), deadline=deadline),
    "load": lambda made, deadline: made.open_refs(Payload("t", "", 1, stored="name"), deadline=deadline),
    "call": lambda made, deadline: made.call("peer_verdict", deadline=deadline),
    "wait": lambda made, deadline: made.wait(deadline, "claim"),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize(("timeout_s", "borne_s"), [(0.0, 30.0), (60.0, 60.0)])
def test_a_call_bears_silence_until_its_own_deadline_and_not_for_hours(
    made, silent, monkeypatch, call, timeout_s, borne_s
):
    refs = silent(100_000.0)
    made.patience_s, made.store, made.observed = 3600.0, ("exp", "memory://"), False
    made._broker, made._vaults = Silent(), {}
    monkeypatch.setattr(connection, "_actor_words", lambda *_: "Ray calls it alive")
    monkeypatch.setattr(connection.ray, "remote", lambda _: Silent())
    monkeypatch.setattr(connection.ray, "get_actor", lambda *_, **__: Silent())
    with pytest.raises(WaitTimeout):
        call(made, Deadline(timeout_s))
    assert borne_s <= refs.now - 1000.0 <= borne_s + 15


def test_a_deadline_that_is_ended_ends_the_wait_for_one_that_is_silent(silent):
    refs = silent(100_000.0)
    asked = Deadline(3600.0)

    def stands() -> str:
        asked.end()
        return refs.stands()

    with pytest.raises(WaitTimeout):
        get("answer", Deadline(30.0, asked), "the broker", stands)
    assert refs.now - 1000.0 == 30.0


# ---------------------------------------------------------------------- another process, another connection


@pytest.fixture
def made(monkeypatch) -> Connection:
    """A connection of this process, as made at the link "worker1"."""
    here = Connection.__new__(Connection)
    here.cluster_lost = None
    here.namespace, here._pid, here._worker_id = "ns", os.getpid(), "worker1"
    monkeypatch.setattr(connection.ray, "is_initialized", lambda: True)
    context = SimpleNamespace(get_worker_id=lambda: "worker1", get_node_id=lambda: "1" * 56)
    monkeypatch.setattr(connection.ray, "get_runtime_context", lambda: context)
    return here


def test_a_forked_process_is_told_at_once(made, monkeypatch):
    made.check_process()
    made._pid += 1
    with pytest.raises(BadInput, match="was forked from process"):
        made.ask("hello", Deadline(30.0))
    monkeypatch.setattr(connection, "_inherited", True)
    with pytest.raises(BadInput, match="was forked from one that is connected to Ray"):
        ensure_ray("head:6379")


def test_a_process_that_left_ray_or_came_back_is_told_at_once(made, monkeypatch):
    monkeypatch.setattr(
        connection.ray, "get_runtime_context", lambda: SimpleNamespace(get_worker_id=lambda: "worker2")
    )
    with pytest.raises(ClusterUnreachable, match="connected anew since this object was made"):
        made.ask("hello", Deadline(30.0))
    monkeypatch.setattr(connection.ray, "is_initialized", lambda: False)
    with pytest.raises(ClusterUnreachable, match=r"ray\.shutdown"):
        made.ask("hello", Deadline(30.0))


def test_the_grace_of_a_broker_begins_when_it_goes_and_not_when_one_went_before(made, monkeypatch):
    now, left = [1000.0], [0]

    def away_and_back(ref: Any, timeout: float) -> str:
        left[0] += 1
        if now[0] > 1100.0:
            return ref
        if left[0] % 10 == 0:
            raise StoreUnreachable("no vault keeps this, for now")
        raise ray.exceptions.ActorUnavailableError("it restarts", b"1" * 16)

    made._grace_s, made._broker = 30.0, SimpleNamespace(hello=SimpleNamespace(remote=lambda: "answer"))
    monkeypatch.setattr(connection, "get", lambda ref, deadline, *_: away_and_back(ref, deadline.left()))
    monkeypatch.setattr(connection.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(connection.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    assert made.ask("hello", Deadline(3600.0)) == "answer"


def test_a_broker_that_is_made_anew_while_the_gcs_is_away_is_asked_for_until_the_grace_is_over(made, monkeypatch):
    """Ray waits for its GCS for a minute, then raises what is no error of an actor."""
    now, answers = [1000.0], [*[ray.exceptions.RpcError("GCS")] * 3, "made"]

    def handle() -> Any:
        now[0] += 60.0
        if isinstance(answer := answers.pop(0), Exception):
            raise answer
        return SimpleNamespace(hello=SimpleNamespace(remote=lambda: answer))

    def answer(ref: Any, *_: Any) -> Any:
        if ref == "made":
            return "answer"
        raise ray.exceptions.ActorDiedError

    made._grace_s, made._broker = 300.0, SimpleNamespace(hello=SimpleNamespace(remote=lambda: "dead"))
    made._broker_handle = handle
    monkeypatch.setattr(connection, "get", answer)
    monkeypatch.setattr(connection.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(connection.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    assert made.ask("hello", Deadline(3600.0)) == "answer"
    answers[:] = [ray.exceptions.RpcError("GCS")] * 10
    made._broker = SimpleNamespace(hello=SimpleNamespace(remote=lambda: "dead"))
    with pytest.raises(BrokerLost):
        made.ask("hello", Deadline(3600.0))


def test_a_vault_that_cannot_be_looked_up_is_unreachable_and_not_lost(made, monkeypatch):
    def away(*_: Any, **__: Any) -> Any:
        raise ray.exceptions.RpcError("Timed out while waiting for GCS to become available.")

    made._vaults, made.store, made.patience_s = {}, None, 30.0
    monkeypatch.setattr(connection.ray, "get_actor", away)
    with pytest.raises(Unreachable, match="GCS"):
        made.open_refs(Payload("t", "vault1/a", 10))


def test_no_wait_goes_on_once_the_cluster_is_lost(made, silent, monkeypatch):
    """The broker, which Ray does not call dead, is silent: its node went with the head."""
    refs = silent(100_000.0)
    made._broker = Silent()

    def words(*_: str) -> str:
        made.cluster_lost = ClusterUnreachable("the control service (GCS) ended")  # meanwhile, by the ClusterWatch
        return "Ray calls it alive"

    monkeypatch.setattr(connection, "_actor_words", words)
    for _ in range(2):
        with pytest.raises(ClusterUnreachable, match="GCS"):
            made.wait(Deadline(3600.0), "claim")
    assert refs.now - 1000.0 < 30.0


@pytest.mark.parametrize(("grace_s", "within_s", "borne_s"), [(30.0, 3600.0, 30.0), (1800.0, 60.0, 60.0)])
def test_a_broker_that_is_gone_may_take_its_grace_and_no_more_than_the_callers_deadline(
    made, monkeypatch, grace_s, within_s, borne_s
):
    now = [1000.0]

    def dead(ref: Any, timeout: float) -> None:
        raise ray.exceptions.ActorUnavailableError("its node does not answer", b"1" * 16)

    made._grace_s = grace_s
    made._broker = SimpleNamespace(hello=SimpleNamespace(remote=lambda: "ref"))
    monkeypatch.setattr(connection.ray, "get", dead)
    monkeypatch.setattr(connection.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(connection.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    with pytest.raises(BrokerLost, match=f"has been gone for {borne_s:.0f} s"):
        made.ask("hello", Deadline(within_s))
    assert borne_s <= now[0] - 1000.0 <= borne_s + 2


def test_a_thread_that_asks_after_its_process_left_starts_no_cluster_of_its_own(monkeypatch):
    """ray.get starts one where there is none: a thread of the unit tests did, and they ended with that cluster."""
    monkeypatch.setattr(connection.ray, "get", lambda *_, **__: pytest.fail("Ray was asked"))
    with pytest.raises(ClusterUnreachable, match="has left its Ray cluster"):
        get("answer", Deadline(3600.0), "the gateway")


@pytest.mark.parametrize(
    ("what", "said", "error", "missing"),
    [
        ("the broker of namespace 'x'", "ModuleNotFoundError: No module named 'slime.cross_job'", BrokerLost, "slime"),
        ("the actor", "No module named 'slime'\nModuleNotFoundError: No module named 'envs'", Unreachable, "envs"),
        ("the actor", "ImportError: cannot import name 'x'", Unreachable, "slime.cross_job"),
    ],
)
def test_the_module_that_an_actor_could_not_import_is_named(monkeypatch, what, said, error, missing):
    class Unimported(ray.exceptions.ActorDiedError):
        def __str__(self) -> str:
            return f"The actor with name Gen failed to import on the worker.\n{said}"

    def raised(*_: Any) -> None:
        raise Unimported

    monkeypatch.setattr(connection, "_silence_borne", raised)
    with pytest.raises(Unreachable, match=f"{what} could not start, .* cannot import {missing}.*: put it on") as found:
        get(None, Deadline(1.0), what)
    assert type(found.value) is error
