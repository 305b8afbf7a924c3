"""What can go wrong with object stores, and with any filesystem that pyarrow reaches; what they promise like every
store: test_stores.py."""

import threading
import time
import uuid

import pytest
from pyarrow import fs

from patience import patient
from slime.cross_job.errors import BadInput, StoreRefused, StoreUnreachable
from slime.cross_job.stores import open_store
from slime.cross_job.stores.remote import RemoteStore
from tls_proxy import Authority, TlsProxy

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


def uri_of(server, **changes) -> str:
    more = "&retry_limit_seconds=1" if server.kind == "gcs" else ""
    return server.uri(uuid.uuid4().hex, more, **changes)


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


def test_what_is_replaced_all_the_time_is_said_in_the_end(s3):
    uri = s3.uri(uuid.uuid4().hex)
    store, other = open_store(uri, timeout_s=0.5), open_store(uri)
    store.put("a/b", b"v")
    turns = []

    def replacing(method: str, path: str) -> None:
        if method == "GET" and path.endswith("/a/b"):
            turns.append(path)
            other.put("a/b", value(len(turns), 100 + len(turns)))

    with s3.in_trouble(replacing), pytest.raises(StoreUnreachable, match="replaced again and again while it is read"):
        store.get("a/b")
    assert len(turns) > 1


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("answer", [(403, "AccessDenied"), (401, "InvalidAccessKeyId")])
def test_who_is_not_let_in_is_told_at_once(server, operation, answer):
    store = open_store(uri_of(server), timeout_s=30)
    store.put("a/b", b"v")
    began = time.monotonic()
    with server.in_trouble(lambda *_: answer), pytest.raises(StoreRefused, match="does not let us write or read"):
        OPERATIONS[operation](store)
    assert time.monotonic() - began < patient(3)
    assert store.get("a/b").to_pybytes() == b"v"


def test_a_bucket_that_is_not_there_is_named(server):
    store = open_store(uri_of(server).replace("bucket", "nobucket", 1), timeout_s=30)
    began = time.monotonic()
    with pytest.raises(StoreRefused, match="a/b"):
        store.put("a/b", b"v")
    assert time.monotonic() - began < patient(3)


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
    began = time.monotonic()
    with server.in_trouble(lambda *_: (503, "SlowDown")), pytest.raises(StoreUnreachable, match="fails at a"):
        OPERATIONS[operation](store)
    assert time.monotonic() - began < patient(10)


def test_s3_over_tls_with_an_authority_of_its_own(s3, authority, tmp_path):
    proxy = TlsProxy(s3.port, authority)
    try:
        behind = s3.uri(uuid.uuid4().hex, host="localhost", port=proxy.port, scheme="https")
        store = open_store(f"{behind}&tls_ca_file_path={authority.ca}", timeout_s=20)
        store.put("a/b", value(1, 5000))
        assert store.get("a/b").to_pybytes() == value(1, 5000)
        assert proxy.connections
        foreign = open_store(f"{behind}&tls_ca_file_path={Authority(tmp_path, 'another').ca}", timeout_s=30)
        began = time.monotonic()
        with pytest.raises(StoreRefused, match="a/b"):
            foreign.get("a/b")
        assert time.monotonic() - began < patient(5)
    finally:
        proxy.stop()


def test_a_listing_rides_out_what_vanishes_while_it_is_listed(tmp_path):
    """Files that another process frees."""
    store = RemoteStore(f"file://{tmp_path}/s", fs.LocalFileSystem(), f"{tmp_path}/s", timeout_s=20.0)
    store.put("a/keep/x", b"v")
    over = threading.Event()

    def come_and_go() -> None:
        while not over.is_set():
            for number in range(20):
                (tmp_path / "s" / "a" / f"d{number}").mkdir()
                (tmp_path / "s" / "a" / f"d{number}" / "f").touch()
            for number in range(20):
                (tmp_path / "s" / "a" / f"d{number}" / "f").unlink()
                (tmp_path / "s" / "a" / f"d{number}").rmdir()

    thread = threading.Thread(target=come_and_go)
    thread.start()
    try:
        for _ in range(200):
            assert "a/keep/x" in store.keys("a")
    finally:
        over.set()
        thread.join()


def test_a_listing_that_fails_is_made_again(tmp_path):
    """As pyarrow's do when a file goes between its name and its size."""
    store = RemoteStore(f"file://{tmp_path}/s", fs.LocalFileSystem(), f"{tmp_path}/s", timeout_s=20.0)
    store.put("a/b", b"v")
    listing = store._fs.get_file_info
    failed = []

    class Vanishing:
        def get_file_info(self, what):
            if not failed:
                failed.append(what)
                raise FileNotFoundError(2, "Failed to stat a/gone")
            return listing(what)

    store._fs = Vanishing()  # type: ignore[assignment]
    assert store.keys("a") == ["a/b"]
    assert failed


def test_options_are_those_of_the_uri_and_secrets_are_not_shown(s3, gcs):
    for server in (s3, gcs):
        with pytest.raises(BadInput, match="pyarrow does not open") as refused:
            open_store(f"{server.uri('x')}&nonsense=1")
        assert "secret" not in str(refused.value)
        assert "secret" not in open_store(server.uri("x")).shown
