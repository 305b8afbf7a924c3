"""What can go wrong with object stores; what they promise like every store: test_stores.py."""

import socket
import threading
import time
import uuid
from collections.abc import Callable

import pytest

from slime.cross_job.errors import BadInput, StoreRefused, StoreUnreachable
from slime.cross_job.ops.doctor.stores import look_at_store
from slime.cross_job.storage import open_store
from tests.support.object_stores import CUT
from tests.support.patience import within
from tests.support.tls_proxy import Authority, TlsProxy

from .conftest import value

OPERATIONS = {
    "put": lambda store: store.put("a/b", b"v"),
    "get": lambda store: store.get("a/b"),
    "keys": lambda store: store.keys("a"),
    "exists": lambda store: store.exists("a/b"),
    "create": lambda store: store.create("a/c", b"v"),
    "delete": lambda store: store.delete(["a/b"]),
}


@pytest.fixture(params=["s3", "gcs"])
def server(request):
    return request.getfixturevalue(request.param)


SLOW_BYTES = 5_900_000


def uri_of(server, **changes) -> str:
    return server.uri(uuid.uuid4().hex, **changes)


def once(method: str, answer: tuple[int, str]) -> tuple[Callable[[str, str], tuple[int, str] | None], list[str]]:
    """(trouble with the first request of this method, the path of that request)."""
    met: list[str] = []

    def trouble(of: str, path: str) -> tuple[int, str] | None:
        if of != method or met:
            return None
        met.append(path)
        return answer

    return trouble, met


@pytest.mark.parametrize(("old", "new"), [(3000, 5000), (5000, 3000), (3000, 3000)])
def test_what_is_replaced_while_it_is_read_is_read_whole(server, old, new):
    """The size of the one and the bytes of the other would be neither."""
    uri = uri_of(server)
    store, other = open_store(uri), open_store(uri)
    store.put("a/b", value(1, old))
    replaced = []

    def replacing(method: str, path: str) -> None:
        if method == "GET" and path.partition("?")[0].endswith("b") and not replaced:
            replaced.append(path)
            other.put("a/b", value(2, new))

    with server.in_trouble(replacing):
        found = store.get("a/b").to_pybytes()
    assert replaced
    assert found == value(2, new)


def test_what_is_replaced_while_its_answer_breaks_off_is_read_whole(server):
    """The rest of the answer would be that of another value."""
    uri = uri_of(server)
    store, other = open_store(uri, timeout_s=20), open_store(uri)
    store.put("a/b", value(1, 3_000_000))
    broken = []

    def breaking(method: str, path: str) -> tuple[int, str] | None:
        if method != "GET":
            return None
        broken.append(path)
        if len(broken) == 1:
            return CUT
        if len(broken) == 2:
            other.put("a/b", value(2, 3_000_000))
        return None

    with server.in_trouble(breaking):
        found = store.get("a/b").to_pybytes()
    assert len(broken) > 1
    assert found == value(2, 3_000_000)


@pytest.mark.parametrize("nbytes", [10, 9_000_000])
@pytest.mark.parametrize("operation", ["put", "create"])
def test_a_writer_whose_answer_is_lost_knows_that_it_wrote(server, operation, nbytes):
    store = open_store(uri_of(server), timeout_s=30)
    losing, lost = once("PUT", CUT)
    with server.in_trouble(losing):
        if operation == "put":
            store.put("a/b", value(1, nbytes))
        else:
            assert store.create("a/b", value(1, nbytes)) is True
    assert lost
    assert store.create("a/b", value(1, nbytes)) is False, "the same value of another writer is not ours"
    assert store.get("a/b").to_pybytes() == value(1, nbytes)


def test_a_conflict_is_no_sign_that_the_key_is_there(server):
    """S3 says 409 where a deletion comes between: the writer is to try again."""
    store = open_store(uri_of(server), timeout_s=30)
    conflicting, conflicts = once("PUT", (409, "ConditionalRequestConflict"))
    with server.in_trouble(conflicting):
        assert store.create("a/b", b"v") is True
    assert conflicts


def test_a_server_that_knows_no_conditions_is_refused(s3):
    """Or two brokers would both keep a job."""
    store = open_store(s3.uri(uuid.uuid4().hex), timeout_s=20)
    s3.ignores_conditions = True
    try:
        with pytest.raises(StoreRefused, match="ignores the condition of a request"):
            store.create("a/b", b"v")
        finding = look_at_store(s3.uri(uuid.uuid4().hex), 20)
        assert finding.severity == "error"
        assert "ignores the condition" in finding.what
    finally:
        s3.ignores_conditions = False
    assert store.create("a/c", b"v") is True


def test_deleting_goes_on_behind_what_is_not_there(server):
    store = open_store(uri_of(server), timeout_s=30)
    keys = [f"a/{number:02d}" for number in range(40)]
    for key in keys[::2]:
        store.put(key, b"v")
    store.delete(keys)
    assert store.keys("a") == []


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("answer", [(403, "AccessDenied"), (401, "InvalidAccessKeyId")])
def test_who_is_not_let_in_is_told_at_once(server, operation, answer):
    store = open_store(uri_of(server), timeout_s=30)
    store.put("a/b", b"v")
    refused = pytest.raises(StoreRefused, match="does not let us write or read")
    with within(3), server.in_trouble(lambda *_: answer), refused:
        OPERATIONS[operation](store)
    assert store.get("a/b").to_pybytes() == b"v"


@pytest.mark.parametrize(
    ("server", "operation"),
    [
        ("s3", "put"),
        ("s3", "create"),
        ("s3", "keys"),
        ("gcs", "put"),
        ("gcs", "create"),
    ],  # GCS does not say it of keys
    indirect=["server"],
)
def test_a_bucket_that_is_not_there_is_named(server, operation):
    store = open_store(uri_of(server).replace("bucket", "nobucket", 1), timeout_s=30)
    with within(3), pytest.raises(StoreRefused, match=r"nobucket.* does not exist .a"):
        OPERATIONS[operation](store)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_bucket_in_another_region_is_named(s3, operation):
    store = open_store(s3.uri(uuid.uuid4().hex), timeout_s=30)
    refused = pytest.raises(StoreRefused, match="region=NAME")
    with within(3), s3.in_trouble(lambda *_: (301, "PermanentRedirect")), refused:
        OPERATIONS[operation](store)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_passing_trouble_is_ridden_out(server, operation):
    store = open_store(uri_of(server), timeout_s=30)
    store.put("a/b", b"v")
    until = time.monotonic() + 1.5
    refused = []

    def overloaded(method: str, path: str) -> tuple[int, str] | None:
        if time.monotonic() > until:
            return None
        refused.append(path)
        return 503, "SlowDown"

    with server.in_trouble(overloaded):
        OPERATIONS[operation](store)
    assert refused
    assert store.exists("a/b") is (operation != "delete")


@pytest.mark.parametrize("operation", ["put", "get", "keys"])
def test_trouble_that_stays_is_an_error_within_the_deadline(server, operation):
    store = open_store(uri_of(server), timeout_s=1.0)
    late = pytest.raises(StoreUnreachable, match="fails at a")
    with within(10), server.in_trouble(lambda *_: (503, "SlowDown")), late:
        OPERATIONS[operation](store)


def test_s3_over_tls_with_an_authority_of_its_own(s3, authority, tmp_path):
    proxy = TlsProxy(s3.port, authority)
    try:
        behind = s3.uri(uuid.uuid4().hex, host="localhost", port=proxy.port, scheme="https")
        store = open_store(f"{behind}&tls_ca_file_path={authority.ca}", timeout_s=20)
        store.put("a/b", value(1, 5000))
        assert store.get("a/b").to_pybytes() == value(1, 5000)
        assert proxy.connections
        foreign = open_store(f"{behind}&tls_ca_file_path={Authority(tmp_path, 'another').ca}", timeout_s=30)
        with (
            within(5),
            pytest.raises(
                StoreRefused, match=r"a/b.*certificate is not trusted: name its authority by tls_ca_file_path"
            ),
        ):
            foreign.get("a/b")
    finally:
        proxy.stop()


def test_a_store_that_takes_requests_and_does_not_answer_is_an_error_within_the_deadline():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"s3://key:secret@bucket/x?endpoint=http://127.0.0.1:{silent.getsockname()[1]}"
        for operation in ("create", "get", "keys"):
            with within(3), pytest.raises(StoreUnreachable, match="fails at"):
                OPERATIONS[operation](open_store(uri, timeout_s=1.0))


def test_a_large_value_may_take_longer_than_the_deadline_while_it_is_sent():
    """To a store that reads 1.5 MB a second."""
    taken = []

    def serve() -> None:
        connection = server.accept()[0]
        head, body = b"", 0
        while b"\r\n\r\n" not in head:
            head += connection.recv(1 << 16)
        while body < SLOW_BYTES:  # what came with the head, at most 64 KB, does not matter
            time.sleep(0.05)
            body += len(connection.recv(75_000)) or SLOW_BYTES
        taken.append(body)
        connection.sendall(b'HTTP/1.1 200 OK\r\nETag: "e"\r\nContent-Length: 0\r\nConnection: close\r\n\r\n')
        connection.close()

    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        thread = threading.Thread(target=serve)
        thread.start()
        uri = f"s3://key:secret@bucket/x?endpoint=http://127.0.0.1:{server.getsockname()[1]}"
        began = time.monotonic()
        open_store(uri, timeout_s=1.0).put("a/b", bytes(6_000_000))
        thread.join()
    assert time.monotonic() - began > 2.0, "it was not slow: nothing is tested"
    assert taken


def test_the_environment_may_name_an_endpoint(s3, monkeypatch):
    bucket, _, endpoint = s3.uri("x").partition("endpoint=")
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint.partition("&")[0])
    with pytest.raises(StoreRefused, match="is its endpoint one of http://"):
        open_store(bucket.rstrip("?&"), timeout_s=2.0).put("a/b", b"1")
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    store = open_store(bucket.rstrip("?&"), timeout_s=5.0)
    store.put("a/b", b"1")
    assert bytes(store.get("a/b")) == b"1"


def test_options_are_those_of_the_uri_and_secrets_are_not_shown(s3, gcs):
    for server in (s3, gcs):
        with pytest.raises(BadInput, match=r"obstore does not open .*nonsense") as refused:
            open_store(f"{server.uri('x')}&nonsense=1")
        assert "secret" not in str(refused.value)
        assert "secret" not in open_store(server.uri("x")).shown
