"""A run of two jobs is recorded by a third one, and served again to another train job: the same bytes, and no rollout
job."""

import functools
import threading
from collections.abc import Callable
from typing import Any

import pytest

from slime.cross_job import Batch, Consumer, Producer
from slime.cross_job.adapter.replay import record, serve, terms_of
from slime.cross_job.errors import EndOfStream, PayloadDamaged, PeerFailed, Refused, RolloutNotFound
from slime.cross_job.settings import Settings
from slime.cross_job.storage import open_store
from slime.cross_job.storage.recording import RECORDED, Header, Recording
from tests.integration.jobs.speak import columns
from tests.support.ray_jobs import ROOT, Job, wait_for


@pytest.fixture
def uri(tmp_path) -> str:
    return f"file://{tmp_path}/store"


@pytest.fixture
def command(submit) -> Callable[..., Job]:
    """cross_job_replay.py as a Ray job."""
    return functools.partial(submit, ROOT / "slime_overlay" / "cross_job_replay.py")


class Serving:
    """`serve` in a thread of this process."""

    def __init__(self, job_id: str, recording: Recording, terms: dict[str, Any] | None = None):
        self.raised: list[BaseException] = []
        self.served = -1
        settings = Settings(namespace=job_id)
        given = recording.terms if terms is None else terms

        def run() -> None:
            try:
                self.served = serve(job_id, recording, settings, given)
            except BaseException as error:
                self.raised.append(error)

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    def over(self) -> "Serving":
        self._thread.join(30)
        assert not self._thread.is_alive()
        return self


def bytes_of(parts: Any) -> list[bytes]:
    return [part.ipc.to_pybytes() for part in parts]


def recorded(uri: str, *ids: int, terms: dict[str, Any] | None = None) -> Recording:
    recording = Recording.make(open_store(uri), "kept", Header("exp", RECORDED, terms or {}))
    for rollout_id in ids:
        parts = [Batch.pack(columns(rollout_id))]
        recording.keep(rollout_id, parts, weight_version=rollout_id, meta={"by": "test"})
    return recording


@pytest.mark.ci
def test_a_run_is_recorded_and_trained_on_again_without_its_rollout_job(driver, submit, command, uri, job_id):
    where = ("--store", uri, "--recording", "kept")
    recorder = command("record", "--job-id", job_id, *where)
    wait_for(lambda: "keeping what job" in recorder.logs, 60, lambda: recorder.logs)  # or rollouts are freed before
    train, rollout = submit("consume.py", job_id, "--demand", 3), submit("produce.py", job_id)
    for job in (rollout, train, recorder):
        assert job.wait() == "SUCCEEDED", job.logs
    assert "recording kept: rollouts 0 to 2" in recorder.logs
    kept = Recording(open_store(uri), "kept")
    assert kept.header is not None
    assert kept.header.job_id == job_id
    assert "finished" in kept.header.ended
    for entry in kept.rollouts():
        assert bytes_of(kept.load(entry)) == bytes_of([Batch.pack(columns(entry.rollout_id))])
        assert (entry.version, entry.weight_version, entry.meta) == (1, entry.rollout_id, {"by": "value"})

    again = f"{job_id}-again"
    server = command("serve", "--job-id", again, *where)
    with Consumer(again) as consumer:
        for rollout_id in (0, 1, 2):
            consumer.demand(rollout_id)
            with consumer.claim(rollout_id, timeout_s=60) as rollout:
                entry = kept.find(rollout_id)
                assert bytes_of(rollout.parts) == bytes_of(kept.load(entry))
                assert (rollout.weight_version, rollout.meta) == (entry.weight_version, entry.meta)
        with pytest.raises(EndOfStream, match="recording 'kept' ends with rollout 2"):
            consumer.claim(timeout_s=30)
    assert server.wait() == "SUCCEEDED", server.logs
    assert f"recording kept: 3 rollouts served to job {again}" in server.logs


def test_a_recorder_keeps_every_version_and_goes_on_after_it_was_stopped(driver, uri, job_id):
    settings = Settings(namespace=job_id)
    store = open_store(uri)
    told = {"--num-rollout": 2}

    def recording() -> threading.Thread:
        thread = threading.Thread(target=lambda: record(job_id, store, "kept", settings), daemon=True)
        thread.start()
        return thread

    with Producer(job_id, namespace=job_id, retain=5, terms=told) as producer:
        with Consumer(job_id, "recording:kept", namespace=job_id) as earlier:
            producer.publish(0, columns(0))  # claimed, and not written: the recorder died
            earlier.claim(0)
            earlier.stop()
        recorder = recording()
        wait_for(lambda: kept_ids(uri) == [0], 30)
        producer.publish(0, columns(7), weight_version=3)
        producer.publish(1, columns(1))
        wait_for(lambda: kept_ids(uri) == [0, 1], 30)
    recorder.join(30)
    assert not recorder.is_alive()
    kept = Recording(store, "kept")
    assert kept.terms == told
    assert kept.find(0).version == 2
    assert bytes_of(kept.load(kept.find(0))) == bytes_of([Batch.pack(columns(7))])
    assert bytes_of(kept.load(kept.find(0, 1))) == bytes_of([Batch.pack(columns(0))])


def kept_ids(uri: str) -> list[int]:
    try:
        return [*Recording(open_store(uri), "kept").ids]
    except RolloutNotFound:
        return []


def test_a_rollout_that_is_not_recorded_is_an_error_that_says_what_is(driver, uri, job_id):
    serving = Serving(job_id, recorded(uri, 0, 1, 3))
    with Consumer(job_id, namespace=job_id) as consumer:
        consumer.demand(2)
        with pytest.raises(PeerFailed, match="rollout 2 is not in recording 'kept', which has rollouts 0 to 1, 3"):
            consumer.claim(2, timeout_s=30)
    (raised,) = serving.over().raised
    assert isinstance(raised, RolloutNotFound)


def test_a_damaged_payload_is_named_to_both_sides(driver, uri, job_id):
    recording = recorded(uri, 0, 1)
    open_store(uri).put(f"kept/payload/{recording.find(1).name}.0.arrow", b"torn")
    serving = Serving(job_id, recording)
    with Consumer(job_id, namespace=job_id) as consumer:
        consumer.demand(0)
        consumer.claim(0, timeout_s=30).ack()
        consumer.demand(1)
        with pytest.raises(PeerFailed, match=r"PayloadDamaged: .*part 0 has 4 bytes, and was written with"):
            consumer.claim(1, timeout_s=30)
    (raised,) = serving.over().raised
    assert isinstance(raised, PayloadDamaged)


def test_the_terms_of_the_run_bind_who_trains_on_its_recording(driver, uri, job_id):
    recording = recorded(uri, 0, terms={"--n-samples-per-prompt": 8, "--num-rollout": 1})
    serving = Serving(job_id, recording, terms_of(recording, num_rollout=2))
    wait_for(lambda: is_there(job_id), 30)
    for theirs, said in (
        ({"--n-samples-per-prompt": 4}, "--n-samples-per-prompt is 4 here and 8 there"),
        ({"--num-rollout": 1}, "--num-rollout is 1 here and 2 there"),
    ):
        with pytest.raises(Refused, match=said):
            Consumer(job_id, namespace=job_id, terms=theirs)
    terms = {"--n-samples-per-prompt": 8, "--num-rollout": 2, "--lr": 1.0}
    with Consumer(job_id, namespace=job_id, terms=terms) as consumer:
        epoch = consumer.begin_update(until=2, timeout_s=30)  # a job whose run says --num-rollout is one of slime's
        consumer.end_update(0, epoch)
        consumer.demand(0)
        consumer.claim(0, timeout_s=30).ack()
        consumer.demand(1)
        with pytest.raises(EndOfStream, match="recording 'kept' ends with rollout 0"):
            consumer.claim(1, timeout_s=30)
    assert serving.over().served == 1


def is_there(job_id: str) -> bool:
    from slime.cross_job.client.connection import Connection

    found = Connection(job_id).call("status").get(job_id)
    return bool(found and found["producer"] and found["producer"]["state"] == "live")
