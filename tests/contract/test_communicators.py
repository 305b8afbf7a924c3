"""The proposal's names on the stores: what is written is read, no message is lost, nothing is unpickled."""

import pickle
import threading
import time

import pytest

from patience import patient
from slime.cross_job.batch import Batch
from slime.cross_job.communicators import Channel, FileSystemCommunicator, RayJobCommunicator
from slime.cross_job.errors import BadInput, NotStored, PayloadDamaged

from .conftest import COMPARE_AND_SET

VALUES = [
    {"tokens": [[1, 2], [3]], "rewards": [0.5, 1.0], "texts": ["a", "é"]},
    {"lr": 1e-6, "nested": {"deep": [1, None, "x"]}, "uneven": [[1], [2]]},
    {"a": [1, 2], "b": [1]},
    [1, 2.5, None, "text"],
    "text",
    {},
    None,
]


@pytest.mark.parametrize("value", VALUES)
def test_what_is_written_is_read(tmp_path, value):
    FileSystemCommunicator(str(tmp_path)).write_data("exp", "k", value)
    assert FileSystemCommunicator(str(tmp_path)).read_data("exp", "k") == value


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


@pytest.mark.parametrize("value", [object(), {1: 2}, (1, 2), {"x": {3, 4}}, b"bytes"])
def test_what_json_would_change_is_refused(tmp_path, value):
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


@pytest.mark.parametrize("place", COMPARE_AND_SET, indirect=True)
def test_nobody_who_publishes_at_once_loses_a_message(place):
    channels = [Channel(place.open(), "events") for _ in range(4)]

    def publish(me: int) -> None:
        for number in range(25):
            channels[me].publish({"from": me, "number": number})

    threads = [threading.Thread(target=publish, args=(me,)) for me in range(4)]
    for thread in threads:
        thread.start()
    over, read = threading.Event(), []
    giving_up = threading.Timer(60, over.set)
    giving_up.start()
    for number, message in Channel(place.open(), "events").follow(0, over):
        assert number == len(read)
        read.append((message["from"], message["number"]))
        if len(read) == 100:
            break
    giving_up.cancel()
    for thread in threads:
        thread.join()
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


@pytest.mark.parametrize("place", COMPARE_AND_SET, indirect=True)
def test_threads_of_one_channel_leave_no_hole(place):
    channel = Channel(place.open(), "events")
    numbers: list[int] = []
    threads = [
        threading.Thread(target=lambda: numbers.extend([channel.publish(1) for _ in range(25)])) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(numbers) == [*range(100)]


def test_folders_with_odd_names_are_themselves(tmp_path):
    for name in ("run#1", "run#2", "run 3?x=%41"):
        FileSystemCommunicator(str(tmp_path / name)).write_data("exp", "k", name)
    for name in ("run#1", "run#2", "run 3?x=%41"):
        assert (tmp_path / name).is_dir()
        assert FileSystemCommunicator(str(tmp_path / name)).read_data("exp", "k") == name
