"""Recordings in every store: what is kept is what comes out, a job's own folder is read only, damage is named."""

import pytest

from slime.cross_job.batch import Batch
from slime.cross_job.errors import BadInput, PayloadDamaged, RolloutNotFound
from slime.cross_job.ledger.state import Client, Job
from slime.cross_job.storage.payloads import Archive, new_name
from slime.cross_job.storage.recording import IMPORTED, RECORDED, Header, Recording, is_recording, recordings
from slime.cross_job.storage.wal import Journal
from slime.cross_job.types import ClientInfo, ids_text

HEADER = Header("exp", RECORDED, {"--num-rollout": 3})


def parts(rollout_id: int, count: int = 2) -> list[Batch]:
    return [Batch.pack({"tokens": [[rollout_id, part], [7]], "rewards": [0.1, 1 / 3]}) for part in range(count)]


def made(store, *rollout_ids: int, name: str = "kept", compression: str = "none") -> Recording:
    recording = Recording.make(store, name, HEADER, compression)
    for rollout_id in rollout_ids:
        recording.keep(rollout_id, parts(rollout_id), weight_version=rollout_id, meta={"reward": 0.5})
    return recording


def same(ours, theirs) -> bool:
    return [part.ipc for part in ours] == [part.ipc for part in theirs]


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_what_is_kept_is_there_for_whoever_opens_the_store(place, store, compression):
    made(store, 0, 1, 2, compression=compression)
    again = Recording(place.open(), "kept")
    assert [*again.ids] == [0, 1, 2]
    entry = again.find(1)
    assert (entry.rollout_id, entry.version, entry.weight_version) == (1, 1, 1)
    assert (entry.num_samples, entry.parts, entry.columns) == (4, 2, ("tokens", "rewards"))
    assert entry.meta == {"reward": 0.5}
    assert entry.nbytes == sum(part.nbytes for part in parts(1))
    assert same(again.load(entry), parts(1))
    assert again.header is not None
    assert (again.header.job_id, again.header.how, again.header.ended) == ("exp", RECORDED, "")
    assert again.header.begun_at > 0
    assert again.terms == {"--num-rollout": 3}


def test_recordings_are_found_beside_the_jobs_of_the_store(store):
    made(store, 0, name="b.1")
    made(store, 0, name="a")
    Archive(store, "exp").save(new_name("t"), parts(0), {"rollout_id": 0})
    assert recordings(store) == ["a", "b.1"]
    assert is_recording(store, "a")
    assert not is_recording(store, "exp")


def test_keeping_a_rollout_twice_is_once_and_another_one_is_refused(store):
    recording = made(store, 0)
    assert not recording.keep(0, parts(0))
    with pytest.raises(BadInput, match=r"has another rollout 0 .version 1. already, as if job exp was begun anew"):
        recording.keep(0, parts(5))
    assert recording.keep(0, parts(5), version=2)
    assert same(recording.load(recording.find(0)), parts(5))
    assert same(recording.load(recording.find(0, 1)), parts(0))
    assert same(Recording(store, "kept").load(recording.find(0)), parts(5))


def test_a_recorder_goes_on_where_another_one_stopped(store):
    made(store, 0)
    recording = made(store, 1)
    recording.set_terms({"--num-rollout": 4})
    recording.end("the stream ended")
    again = Recording.make(store, "kept", HEADER)
    assert [*again.ids] == [0, 1]
    assert again.header is not None
    assert (again.terms, again.header.ended) == ({"--num-rollout": 4}, "the stream ended")


def test_a_name_that_is_taken_is_refused(store):
    made(store, 0)
    for other in (Header("other", RECORDED), Header("exp", IMPORTED)):
        with pytest.raises(BadInput, match="of another run, recorded from exp: choose another --recording"):
            Recording.make(store, "kept", other)
    Archive(store, "job1").save(new_name("t"), parts(0), {"rollout_id": 0})
    with pytest.raises(BadInput, match="has 'job1' already, and it is no recording"):
        Recording.make(store, "job1", HEADER)


def test_what_is_not_there_is_said_with_what_is(store):
    recording = made(store, 0, 1, 2, 5)
    with pytest.raises(RolloutNotFound, match="rollout 3 is not in recording 'kept', which has rollouts 0 to 2, 5"):
        recording.find(3)
    with pytest.raises(RolloutNotFound, match="version 2 of rollout 1 is not in"):
        recording.find(1, 2)
    with pytest.raises(RolloutNotFound, match="has no recording 'keep', nor rollouts of such a job: it has kept"):
        Recording(store, "keep")
    with pytest.raises(BadInput, match=r"job id '../x' is not usable"):
        Recording(store, "../x")


def test_what_a_job_keeps_itself_is_read_as_a_recording_and_not_written_to(store):
    archive = Archive(store, "job1")
    archive.save(new_name("t0"), parts(4), {"rollout_id": 4, "weight_version": 3, "meta": {"a": 1}})
    archive.save(new_name("t1"), parts(6), {"rollout_id": 4, "weight_version": 4})
    archive.save(new_name("t2"), parts(0, 1), {"key": "weights", "version": 7})
    archive.save(new_name("t0-source"), parts(0, 1), {})
    recording = Recording(store, "job1")
    assert recording.header is None
    assert recording.terms == {}
    (entry,) = recording.rollouts()
    assert (entry.rollout_id, entry.version, entry.weight_version) == (4, 2, 4)
    assert same(recording.load(entry), parts(6))
    with pytest.raises(BadInput, match="is no recording but a job's own folder: nothing is added"):
        recording.keep(5, parts(5))


def test_the_terms_of_a_job_that_keeps_its_rollouts_itself_are_in_its_journal(store):
    info = ClientInfo("p", "job1", "producer")
    producer = Client(info, 1, 30.0, 0.0, 0.0, terms={"--num-rollout": 7})
    Archive(store, "job1").save(new_name("t0"), parts(4), {"rollout_id": 4})
    Journal(store, "job1").entry(Job("job1", producer=producer), [producer]).write()
    assert Recording(store, "job1").terms == {"--num-rollout": 7}
    store.put(Journal(store, "job1").key(0), b"torn")
    assert Recording(store, "job1").terms == {}


def test_damage_is_named_and_nothing_else_suffers(place, store):
    recording = made(store, 0, 1, 2)
    torn, unreadable = recording.find(1), recording.find(2)
    store.put(f"kept/payload/{torn.name}.1.arrow", b"torn")
    store.put(f"kept/payload/{unreadable.name}.json", b"{}")
    again = Recording(place.open(), "kept")
    assert same(again.load(again.find(0)), parts(0))
    with pytest.raises(PayloadDamaged, match="part 1 has 4 bytes, and was written with"):
        again.load(again.find(1))
    assert [*again.damaged] == [unreadable.name]
    with pytest.raises(RolloutNotFound, match="rollouts 0 to 1; 1 payloads have damaged manifests"):
        again.find(2)
    store.put("_recordings/kept.json", b"{}")
    with pytest.raises(PayloadDamaged, match="the header of recording 'kept' in"):
        Recording(store, "kept")


@pytest.mark.parametrize("meta", [{"of": (1, 2)}, {"by": {1: 2}}, {"what": object()}])
def test_what_json_would_change_is_refused_not_changed(store, meta):
    recording = made(store)
    with pytest.raises(BadInput, match="`meta` of rollout 0 cannot be recorded"):
        recording.keep(0, parts(0), meta=meta)
    assert recording.rollouts() == []


def test_ids_in_words():
    assert [ids_text(ids) for ids in ([], [3], [0, 1, 2], [0, 2, 3])] == [
        *("no rollouts", "rollout 3", "rollouts 0 to 2", "rollouts 0, 2 to 3")
    ]
