"""The proposal's names on the stores: what is written is read, no message is lost, nothing is unpickled."""

import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from slime.cross_job.batch import Batch
from slime.cross_job.errors import BadInput, NotStored, PayloadDamaged
from slime.cross_job.proposal import communicators
from slime.cross_job.proposal.communicators import Channel, FileSystemCommunicator, RayJobCommunicator, Values
from slime.cross_job.proposal.encoding import encode
from tests.support.patience import patient

VALUES = [
    {"tokens": [[1, 2], [3]], "rewards": [0.5, 1.0], "texts": ["a", "é"]},
    {"lr": 1e-6, "nested": {"deep": [1, None, "x"]}, "uneven": [[1], [2]]},
    {"a": [1, 2], "b": [1]},
    [1, 2.5, None, "text"],
    "text",
    {},
    None,
    b"bytes",
    {1: (2, [b"3"]), "nested": {"deep": [b"", None]}},
]


@pytest.mark.parametrize("value", VALUES)
def test_what_is_written_is_read(tmp_path, value):
    FileSystemCommunicator(str(tmp_path)).write_data("exp", "k", value)
    assert FileSystemCommunicator(str(tmp_path)).read_data("exp", "k") == value


ARRAYS = {"mask": np.array([True, False]), "deep": [{"x": np.zeros((2, 0), ">f4")}, np.array(3)], "raw": b"\0" * 3000}


def check_arrays(found: Any) -> None:
    """They are ARRAYS."""
    pairs = [(ARRAYS["mask"], found["mask"]), (ARRAYS["deep"][0]["x"], found["deep"][0]["x"])]
    for mine, other in [*pairs, (ARRAYS["deep"][1], found["deep"][1])]:
        assert (type(other), other.dtype, other.shape) == (np.ndarray, mine.dtype, mine.shape)
        assert np.array_equal(other, mine)
    assert found["raw"] == ARRAYS["raw"]


def test_arrays_and_bytes_go_through_every_store(place):
    channel = Channel(place.open(), "arrays")
    number = channel.publish(ARRAYS)
    check_arrays(Channel(place.open(), "arrays").read(number))
    Values(place.open(), "exp").put("arrays/1", ARRAYS)
    check_arrays(Values(place.open(), "exp").get("arrays/1"))


def test_keys_are_listed_and_newest_wins(tmp_path):
    files = FileSystemCommunicator(str(tmp_path))
    for number in range(3):
        files.write_data("exp", f"rollouts/{number}", {"n": number})
    files.write_data("exp", "rollouts/1", {"n": 10})
    files.write_data("other", "k", 1)
    assert files.list_available_data("exp") == ["rollouts/0", "rollouts/1", "rollouts/2"]
    assert files.read_data("exp", "rollouts/1") == {"n": 10}
    with pytest.raises(NotStored):
        files.read_data("exp", "rollouts/3")


def test_a_batch_comes_back_as_its_columns(tmp_path):
    files = FileSystemCommunicator(str(tmp_path))
    files.write_data("exp", "k", Batch.pack(VALUES[0]))
    assert files.read_data("exp", "k") == VALUES[0]


@pytest.mark.parametrize("value", [object(), {"x": {3, 4}}, [bytearray(b"x")], np.array([None])])
def test_what_would_not_come_back_as_it_is_is_refused(tmp_path, value):
    files = FileSystemCommunicator(str(tmp_path))
    with pytest.raises(BadInput):
        files.write_data("exp", "k", value)
    assert files.list_available_data("exp") == []


@pytest.mark.parametrize("harm", [b"", b"J", b"A", b"A" + b"0" * 32 + b"x", b"J{}", b"X123", pickle.dumps({"a": 1})])
def test_what_somebody_else_wrote_is_damage(tmp_path, harm):
    files = FileSystemCommunicator(str(tmp_path))
    files.write_data("exp", "k", 1)
    (tmp_path / "exp" / "data" / "k").write_bytes(harm)
    with pytest.raises(PayloadDamaged):
        files.read_data("exp", "k")


def test_nobody_who_publishes_at_once_loses_a_message(place):
    channels = [Channel(place.open(), "events") for _ in range(4)]

    def publish(me: int) -> None:
        for number in range(25):
            channels[me].publish({"from": me, "number": number})

    over, read = threading.Event(), []
    giving_up = threading.Timer(patient(60), over.set)
    giving_up.daemon = True
    giving_up.start()
    try:
        with ThreadPoolExecutor(4) as pool:
            publishing = pool.map(publish, range(4))
            for number, message in Channel(place.open(), "events").follow(0, over):
                assert number == len(read)
                read.append((message["from"], message["number"]))
                if len(read) == 100:
                    break
            assert [*publishing] == [None] * 4
    finally:
        giving_up.cancel()
    assert sorted(read) == [(me, number) for me in range(4) for number in range(25)]
    for me in range(4):
        assert [number for who, number in read if who == me] == [*range(25)], "out of order"


def test_messages_wait_for_those_who_were_away(redis_server):
    one = RayJobCommunicator("127.0.0.1", redis_server.port)
    channel = f"c{time.monotonic_ns()}"
    ids = [one.publish_data(channel, {"n": n}) for n in range(3)]
    assert one.get_data(ids[1]) == {"n": 1}
    other, heard = RayJobCommunicator("127.0.0.1", redis_server.port), []

    def hear(message_id: str, message: dict) -> None:
        heard.append((message_id, message["n"]))
        if message["n"] == 1:
            raise ValueError("of the callback")

    other.subscribe_data(channel, hear)
    late = one.publish_data(channel, {"n": 3})
    deadline = time.monotonic() + patient(10)
    while len(heard) < 4 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert heard == [*zip([*ids, late], range(4))]
    other.close()
    with pytest.raises(BadInput, match="is no id of a message"):
        one.get_data("nonsense")
    one.close()


def test_threads_of_one_channel_leave_no_hole(place):
    channel = Channel(place.open(), "events")
    with ThreadPoolExecutor(4) as pool:
        numbers = [*pool.map(lambda _: channel.publish(1), range(100))]
    assert sorted(numbers) == [*range(100)]


def test_folders_with_odd_names_are_themselves(tmp_path):
    for name in ("run#1", "run#2", "run 3?x=%41"):
        FileSystemCommunicator(str(tmp_path / name)).write_data("exp", "k", name)
    for name in ("run#1", "run#2", "run 3?x=%41"):
        assert (tmp_path / name).is_dir()
        assert FileSystemCommunicator(str(tmp_path / name)).read_data("exp", "k") == name


# ---------------------------------------------------------------------- keys


@pytest.mark.parametrize("first", ["a/b", "a/b/c"])
def test_keys_that_clash_in_a_folder_clash_in_every_store_in_any_order(place, first):
    second = {"a/b": "a/b/c", "a/b/c": "a/b"}[first]
    values = Values(place.open(), "exp")
    values.put(first, 1)
    values.put("a/bc", 2)
    values.put(first, 3)
    with pytest.raises(BadInput, match=f"data/{second} clashes with exp/data/{first}: "):
        Values(place.open(), "exp").put(second, 4)
    assert values.keys() == sorted([first, "a/bc"])
    assert values.get(first) == 3
    with pytest.raises(NotStored):
        values.get(second)
    values.delete(first)
    values.put(second, 5)
    assert values.get(second) == 5


@pytest.mark.parametrize("key", ["", "x" * 256, "x/" * 600 + "x", "../x", "a b"])
def test_a_key_that_a_store_cannot_hold_is_refused_in_every_store(place, key):
    values = Values(place.open(), "exp")
    for act in (lambda: values.put(key, 1), lambda: values.get(key), lambda: values.delete(key)):
        with pytest.raises(BadInput, match="invalid key"):
            act()


# ---------------------------------------------------------------------- how long it is kept


class Clock:
    now = 1e9

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(communicators, "_now", made)
    return made


def test_values_are_kept_for_an_hour_after_the_last_write_to_their_job(place, clock):
    def values(job_id: str = "exp") -> Values:
        return Values(place.open(), job_id)

    values().put("settings", 1)
    values("other").put("k", 1)
    for number in range(3):
        clock.now += 3599
        values().put("newest", number)
        assert values().get("settings") == 1
    with pytest.raises(NotStored, match="has expired"):
        values("other").get("k")
    clock.now += 3599
    assert (values().keys(), values().get("newest")) == (["newest", "settings"], 2)
    clock.now += 3600
    with pytest.raises(NotStored, match="'settings' has expired"):
        values().get("settings")
    assert values().keys() == []
    values().put("settings/again", 2)  # clashes with nothing that is there
    assert place.open().keys("exp/data") == ["exp/data/settings/again"], "the others take no room any more"


def test_messages_are_kept_after_the_last_one_and_their_numbers_are_not_taken_again(place, clock):
    mine, followed = Channel(place.open(), "events"), Channel(place.open(), "events")
    assert [mine.publish(number) for number in range(3)] == [0, 1, 2]
    clock.now += 3599
    assert Channel(place.open(), "events").publish(3) == 3
    clock.now += 3599
    assert followed.read(0) == 0
    clock.now += 3600
    with pytest.raises(NotStored, match="has expired"):
        followed.read(3)
    assert Channel(place.open(), "events").publish(4) == 4
    assert mine.publish(5) == 5
    assert place.open().keys("channels/events") == [f"channels/events/{number:016d}" for number in (4, 5)]
    follow = followed.follow()
    assert [next(follow), next(follow)] == [(4, 4), (5, 5)]


@pytest.mark.parametrize("ttls", [(None, 60.0), (60.0, None), (60.0, 86_400.0), (86_400.0, 60.0)])
def test_of_several_writers_the_one_that_keeps_longest_counts(place, clock, ttls):
    for number, ttl_s in enumerate(ttls):
        Values(place.open(), "exp", ttl_s).put(f"k{number}", number)
    clock.now += 80_000
    assert Values(place.open(), "exp", 1.0).keys() == ["k0", "k1"]
    clock.now += 80_000
    assert Values(place.open(), "exp", 1.0).keys() == (["k0", "k1"] if None in ttls else [])


def test_what_an_older_version_wrote_has_no_end(place, clock):
    store = place.open()
    for key in ("exp/data/k", "channels/events/0000000000000000"):
        store.put(key, encode([1, "old"]))
    clock.now += 1e9
    assert Values(place.open(), "exp").get("k") == [1, "old"]
    assert Channel(place.open(), "events").read(0) == [1, "old"]


def test_whoever_writes_while_another_clears_what_expired_loses_nothing(place, clock):
    """Both saw that it had expired; the one is stopped between its two looks."""
    late, store = Channel(place.open(), "events"), place.open()
    late.publish("old")
    clock.now += 4000
    listed = late._messages

    def other_goes_on() -> list[str]:
        found = listed()
        assert Channel(place.open(), "events").publish("of the other") == 1
        return found

    late._messages = other_goes_on
    assert late.publish("mine") == 2
    assert [Channel(store, "events").read(number) for number in (1, 2)] == ["of the other", "mine"]


def test_a_damaged_end_is_none(place, clock, caplog):
    values = Values(place.open(), "exp")
    values.put("k", 1)
    place.open().put("_lifetimes/exp/data", b"{}")
    clock.now += 1e6
    assert values.get("k") == 1
    assert "is damaged, so that it has no end" in caplog.text
    values.put("k", 2)
    clock.now += 1e6
    assert values.keys() == []


@pytest.mark.parametrize("ttl_s", [0, -1, "soon", float("nan")])
def test_how_long_is_checked_at_once(tmp_path, ttl_s):
    with pytest.raises(BadInput, match="ttl_s"):
        FileSystemCommunicator(str(tmp_path / "s"), ttl_s=ttl_s)
    with pytest.raises(BadInput, match="ttl_s"):
        RayJobCommunicator("127.0.0.1", 1, ttl_s=ttl_s)
    assert not (tmp_path / "s").exists()


# ---------------------------------------------------------------------- deleting


def test_deleted_values_are_gone(tmp_path):
    files = FileSystemCommunicator(str(tmp_path))
    files.write_data("exp", "a", 1)
    files.write_data("exp", "b", 2)
    files.delete_data("exp", "a")
    files.delete_data("exp", "a")
    assert files.list_available_data("exp") == ["b"]
    with pytest.raises(NotStored):
        files.read_data("exp", "a")


def test_who_follows_gets_what_was_not_deleted(place):
    channel = Channel(place.open(), "events")
    for number in range(4):
        channel.publish(number)
    channel.delete(1)
    channel.delete(9)
    with pytest.raises(NotStored, match="was deleted"):
        channel.read(1)
    follow = Channel(place.open(), "events").follow()
    assert [next(follow) for _ in range(3)] == [(0, 0), (2, 2), (3, 3)]
    channel.clear()
    channel.clear()
    assert place.open().keys("channels/events") == []
    assert Channel(place.open(), "events").publish(4) == 4
    assert [next(follow), next(Channel(place.open(), "events").follow())] == [(4, 4), (4, 4)]


def test_what_is_published_while_a_channel_is_cleared_is_read(place):
    """The publisher walks past the messages that are there, and one of their numbers becomes free before it."""
    Channel(place.open(), "events").publish(0)
    late, store = Channel(place.open(), "events"), place.open()
    late._begin()
    Channel(store, "events").clear()
    assert late.publish(1) == 1
    assert Channel(store, "events").read(1) == 1


# ---------------------------------------------------------------------- callbacks


def test_a_callback_gets_the_data_or_the_id_and_the_data(redis_server):
    me, channel = RayJobCommunicator("127.0.0.1", redis_server.port), f"c{time.monotonic_ns()}"
    alone, both, any_number, optional = [], [], [], []
    me.subscribe_data(channel, alone.append)
    me.subscribe_data(channel, lambda message_id, message: both.append((message_id, message)))
    me.subscribe_data(channel, lambda *given: any_number.append(given))
    me.subscribe_data(channel, lambda message, *, log=None: optional.append(message))
    ids = [me.publish_data(channel, number) for number in range(3)]
    me.delete_data(ids[1])
    ids.append(me.publish_data(channel, "last"))
    deadline = time.monotonic() + patient(20)
    heard = (alone, both, any_number, optional)
    while not all("last" in str(one) for one in heard) and time.monotonic() < deadline:
        time.sleep(0.05)
    me.close()
    for messages in ([message for _, message in both], [message for _, message in any_number], alone, optional):
        assert [message for message in messages if message != 1] == [0, 2, "last"], (
            "who was quick heard what was deleted"
        )
    assert both[-1] == any_number[-1] == (ids[-1], "last")


@pytest.mark.parametrize("callback", [lambda: None, lambda a, b, c: None, "text", None])
def test_a_callback_that_cannot_be_called_is_refused_at_once(redis_server, callback):
    me = RayJobCommunicator("127.0.0.1", redis_server.port)
    with pytest.raises(BadInput, match="callback"):
        me.subscribe_data("events", callback)
    with pytest.raises(BadInput, match="is not usable"):
        me.subscribe_data("no name!", print)
    assert me._threads == []
    me.close()


def test_a_message_that_cannot_be_read_is_skipped_whatever_lies_before_it(redis_server, caplog):
    me, name = RayJobCommunicator("127.0.0.1", redis_server.port), f"c{time.monotonic_ns()}"
    ids, heard = [me.publish_data(name, number) for number in range(50)], []
    me.delete_channel(name)
    ids = [me.publish_data(name, ARRAYS) for _ in range(2)]
    me._store.put(f"channels/{name}/{50:016d}", b"T" + b"0" * 40)
    me.subscribe_data(name, heard.append)
    deadline = time.monotonic() + patient(20)
    while not heard and time.monotonic() < deadline:
        time.sleep(0.05)
    me.close()
    check_arrays(heard[0])
    assert [record.getMessage() for record in caplog.records] == [
        f"message {ids[0]} is skipped: it has another checksum than when it was written"
    ]
