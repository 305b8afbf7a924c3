"""The end of the cluster is noticed at its port: a server of the test's own stands in for the GCS."""

import errno
import queue
import socket
import threading
from types import SimpleNamespace

import pytest

from slime.cross_job.client import cluster_watch, shutdown
from slime.cross_job.client.cluster_watch import ClusterWatch
from slime.cross_job.errors import ClusterUnreachable

BORNE_S = 60.0


class Gcs:
    """Listens at a port of its own, and says nothing."""

    def __init__(self, port: int = 0):
        self._listener = socket.create_server(("127.0.0.1", port))
        self.port = self._listener.getsockname()[1]
        self.connections = [self._listener.accept()[0]] if port else []

    def accept(self) -> None:
        self.connections.append(self._listener.accept()[0])

    def end(self) -> None:
        for one in (self._listener, *self.connections):
            one.close()


@pytest.fixture
def watched():
    """(the GCS, what was said of its end, the event that somebody said it, the thread) for a given `survives`."""
    ended, made = threading.Event(), []

    def watch(survives):
        gcs, told, lost = Gcs(), [], threading.Event()

        def lose(error: ClusterUnreachable) -> bool:
            told.append(error)
            lost.set()
            return True

        thread = threading.Thread(target=ClusterWatch(f"127.0.0.1:{gcs.port}", survives, ended, lose).run, daemon=True)
        thread.start()
        gcs.accept()
        made.append(thread)
        return gcs, told, lost, thread

    yield watch
    ended.set()
    for thread in made:
        thread.join(BORNE_S)
        assert not thread.is_alive()


def test_a_gcs_that_does_not_come_back_is_missed_at_once(watched, monkeypatch):
    monkeypatch.setattr(cluster_watch, "_TRIES_S", 2 * BORNE_S)  # `ray start --block` ends the raylet within 1 s
    gcs, told, lost, _ = watched(False)
    gcs.end()
    assert lost.wait(BORNE_S)
    assert f"the Ray cluster at 127.0.0.1:{gcs.port} ended" in str(told[0])
    assert told[0].exit_code == 4


def test_a_gcs_with_fault_tolerance_may_come_back(watched):
    gcs, told, _, _ = watched(True)
    gcs.end()
    again = Gcs(gcs.port)  # waits until somebody connects
    assert told == []
    again.end()


TROUBLES = [
    TimeoutError("timed out"),
    OSError(errno.EHOSTUNREACH, "No route"),
    OSError(errno.EMFILE, "Too many files"),
]


@pytest.mark.parametrize("trouble", TROUBLES, ids=repr)
def test_a_port_that_cannot_be_reached_for_a_while_is_no_end_of_its_gcs(watched, monkeypatch, trouble):
    tried, back, connect = [], threading.Event(), socket.create_connection

    def connection(where, timeout_s):
        tried.append(where)
        if len(tried) < 3:
            raise trouble
        back.set()
        return connect(where, timeout_s)

    gcs, told, _, _ = watched(False)
    monkeypatch.setattr(socket, "create_connection", connection)
    gcs.connections.pop().close()  # the connection is lost, and its GCS lives
    assert back.wait(BORNE_S)
    gcs.accept()
    assert told == []
    gcs.end()


def test_a_gcs_of_which_nobody_knows_is_given_nearly_as_long_as_ray_gives_it(watched, monkeypatch):
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "6")
    gcs, told, lost, _ = watched(None)
    gcs.end()
    assert lost.wait(BORNE_S)
    assert "is not back after " in str(told[0])


@pytest.fixture
def left(monkeypatch):
    """Waits for the exit code with which this process would have ended."""
    codes: queue.Queue[int] = queue.Queue()
    monkeypatch.setattr(shutdown, "wanted", lambda: True)
    monkeypatch.setattr(cluster_watch.os, "_exit", codes.put)
    return lambda: codes.get(timeout=BORNE_S)


def test_the_process_of_a_job_ends_with_the_errors_exit_code(watched, left, capsys):
    gcs, *_ = watched(False)
    gcs.end()
    assert left() == 4
    assert capsys.readouterr().err.startswith("ClusterUnreachable: the control service (GCS)")


def test_the_driver_of_slimes_train_job_ends_with_its_cluster(left, train_driver, monkeypatch):
    """Its gateway, which is the client, is an actor, and another process."""
    gcs = Gcs()
    context = SimpleNamespace(gcs_address=f"127.0.0.1:{gcs.port}")
    monkeypatch.setattr(train_driver.ray, "get_runtime_context", lambda: context)
    side = train_driver.TrainDriver.__new__(train_driver.TrainDriver)
    side.ended = False
    side._watch_cluster(False)
    gcs.accept()
    gcs.end()
    assert left() == 4
