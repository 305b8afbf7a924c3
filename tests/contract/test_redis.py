"""What can go wrong with Redis only; what it promises like every store: test_stores.py."""

import threading
import time

import pytest
import redis
from local_cluster import free_ports

from slime.cross_job.errors import NotStored, StoreFull, StoreRefused, StoreUnreachable
from slime.cross_job.stores import open_store
from slime.cross_job.stores import redis as redis_module

from .conftest import value

pytestmark = pytest.mark.usefixtures("small_pieces")


def test_a_wrong_password_is_named(own_redis):
    server = own_redis(requirepass="right")
    open_store(server.uri).put("a/b", b"v")
    for uri in (server.uri.replace("right", "wrong"), server.uri.replace(":right@", "")):
        with pytest.raises(StoreRefused, match=r"does not let us in: .*check user and password") as refused:
            open_store(uri)
        assert "wrong" not in str(refused.value)


def test_a_server_that_is_away_is_waited_for_and_nothing_is_lost(own_redis):
    server = own_redis(durable=True)
    store = open_store(server.uri, timeout_s=30)
    done: list[str] = []
    over = threading.Event()

    def write() -> None:
        while not over.is_set():
            key = f"w/{len(done):06d}"
            store.put(key, value(len(done), 4000))
            done.append(key)

    thread = threading.Thread(target=write)
    thread.start()
    for _ in range(3):
        before = len(done)
        while len(done) < before + 20:
            time.sleep(0.01)
        server.kill()  # in the middle of a write
        time.sleep(0.3)
        server.start()
    over.set()
    thread.join()
    again = open_store(server.uri)
    assert again.keys("w") == done
    for number, key in enumerate(done):
        assert again.get(key).to_pybytes() == value(number, 4000)


def test_a_server_that_stays_away_is_an_error_within_the_deadline(own_redis):
    server = own_redis()
    store = open_store(server.uri, timeout_s=1.0)
    server.kill()
    began = time.monotonic()
    with pytest.raises(StoreUnreachable, match="does not answer for 1 s, at a/b"):
        store.put("a/b", b"v")
    assert time.monotonic() - began < 5
    server.start()


def test_a_full_server_says_so_keeps_what_it_has_and_nothing_half(own_redis):
    server = own_redis(maxmemory="4mb")
    store = open_store(server.uri)
    kept: list[str] = []

    def fill() -> None:
        for number in range(100):
            store.put(f"a/{number:03d}", value(number, 100_000))
            kept.append(f"a/{number:03d}")

    with pytest.raises(StoreFull, match="raise maxmemory, or keep less"):
        fill()
    assert len(kept) > 5
    assert store.keys("a") == kept
    assert all(store.get(key).to_pybytes() == value(number, 100_000) for number, key in enumerate(kept))
    pieces = store._redis.keys("*:piece:*")
    assert len(pieces) == len(kept) * 100, "the upload that did not fit left pieces"
    store.delete(kept[:3])
    store.put("a/later", value(7, 100_000))


def test_what_redis_evicted_is_not_half_a_value(own_redis):
    store = open_store(own_redis().uri)
    store.put("a/b", value(1, 5000))
    store._redis.delete(store._redis.keys("*:piece:*")[0])
    with pytest.raises(NotStored, match="maxmemory-policy must be noeviction"):
        store.get("a/b")


def test_an_upload_without_an_end_expires(own_redis):
    store = open_store(own_redis().uri)
    store._upload("a/b", "u1", [memoryview(value(1, 5000))])
    left = [store._redis.ttl(name) for name in store._redis.keys("*:piece:*")]
    assert len(left) == 5
    assert all(3000 < ttl <= 3600 for ttl in left)
    store.put("a/b", value(1, 5000))
    assert [store._redis.ttl(name) for name in store._redis.keys("*:piece:*")].count(-1) == 5


def test_a_lost_answer_to_create_is_no_defeat(own_redis):
    """The connection breaks after the server has carried it out: asked again, it says that it was us."""
    store = open_store(own_redis().uri)
    command, lost = store._command, []

    def losing(*words):
        answer = command(*words)
        if words[0] == "EVAL" and not lost:
            lost.append(answer)
            raise redis_module.exceptions.ConnectionError("the answer is lost")
        return answer

    store._command = losing
    assert store.create("a/b", value(1, 5000)) is True
    assert lost
    assert store.create("a/b", value(2, 5000)) is False
    assert store.get("a/b").to_pybytes() == value(1, 5000)


def test_a_unix_socket_a_cluster_and_a_sentinel_lead_to_it(own_redis, tmp_path):
    own_redis(unixsocket=f"{tmp_path}/s")
    below = next(port for port in iter(lambda: free_ports(1)[0], None) if port < 50_000)  # its bus is 10,000 above
    of_a_cluster = own_redis(port=f"{below}", **{"cluster-enabled": "yes"})
    redis.Redis(port=of_a_cluster.port).execute_command("CLUSTER", "ADDSLOTS", *range(16384))
    watched = own_redis(requirepass="secret")
    uris = [
        f"unix://{tmp_path}/s?db=1",
        f"{of_a_cluster.uri}?cluster=true",
        f"redis://:secret@127.0.0.1:{sentinel(own_redis, watched, tmp_path)}/0?sentinel=service",
    ]
    for uri in uris:
        store = open_store(uri, timeout_s=20)
        store.put("a/b", value(1, 5000))
        assert store.create("a/c", value(2, 5000))
        assert not store.create("a/c", b"v")
        assert store.keys("a") == ["a/b", "a/c"]
        assert store.get("a/b").to_pybytes() == value(1, 5000)
        store.delete(["a/b"])
        assert store.keys("a") == ["a/c"]
        store.close()
    assert redis.Redis(unix_socket_path=f"{tmp_path}/s", db=1).dbsize() > 0
    assert redis.Redis(port=watched.port, password="secret").dbsize() > 0


def sentinel(own_redis, watched, tmp_path) -> int:
    """Port of a sentinel that watches this server as `service`."""
    (port,) = free_ports(1)
    config = tmp_path / "sentinel.conf"  # it writes into it
    config.write_text(f"sentinel monitor service 127.0.0.1 {watched.port} 1\nsentinel auth-pass service secret\n")
    own_redis(sentinel=config, port=f"{port}")
    return port
