"""How a job stands, in every store: what was kept is read again, whoever dies, and of two owners one is fenced."""

import contextlib
import shutil

import pytest

from slime.cross_job.errors import Fenced, StoreRefused
from slime.cross_job.ledger import Ledger
from slime.cross_job.ledger.snapshot import rebuild
from slime.cross_job.storage.payloads import sealed
from slime.cross_job.storage.wal import Journal, Outdated, Torn
from slime.cross_job.types import ClientInfo, Payload

from .conftest import deaths


@pytest.fixture
def ledger() -> Ledger:
    made = Ledger(lambda: 1000.0, wall=lambda: 1000.0)
    made.membership.attach(ClientInfo("p", "exp", "producer", ray_job_id="r1"), max_ahead=3, terms={"seed": 1})
    made.membership.attach(ClientInfo("c", "exp", "consumer", group="train", ray_job_id="r2"))
    return made


def keep(journal: Journal, ledger: Ledger, times: int = 1) -> None:
    job = ledger.jobs["exp"]
    for _ in range(times):
        job.revision += 1
        journal.entry(job, [*ledger.clients.values()]).write()


def publish(ledger: Ledger, rollout_id: int) -> None:
    payload = Payload(
        f"t{rollout_id}",
        "v1/a",
        10,
        meta={"~": "hostile", "n": [1, None]},
        source={"next": rollout_id},
        stored=f"n{rollout_id}",
    )
    ledger.publish("p", rollout_id, payload)


def publish_and_keep(journal: Journal, ledger: Ledger, rollouts: int) -> None:
    """An entry after each of so many rollouts."""
    for rollout_id in range(rollouts):
        publish(ledger, rollout_id)
        keep(journal, ledger)


def again(store) -> Ledger:
    """The ledger of a broker that knows nothing else."""
    made = Ledger(lambda: 2000.0, wall=lambda: 2000.0)
    job, clients = Journal(store, "exp").load()
    assert rebuild(made, job, clients) == []
    return made


def figures(ledger: Ledger) -> dict:
    status = ledger.status("exp")["exp"]
    since = ("producer", "consumers", "idle_s", "oldest_queued_s", "standing")
    return {name: value for name, value in status.items() if name not in since}


def test_a_job_without_a_journal_is_none(store):
    assert Journal(store, "exp").load() is None


def test_what_was_kept_is_known_again(place, store, ledger):
    journal = Journal(store, "exp")
    publish_and_keep(journal, ledger, 5)
    ledger.claim("c", 0)
    ledger.ack("c", 0)
    ledger.claim("c", 1)
    ledger.put_value("c", "weights", Payload("w", "v1/a", 5, stored="w"), 7)
    ledger.demand("c", 9)
    keep(journal, ledger)
    found = again(place.open())
    assert figures(found) == figures(ledger)
    assert found.catalog() == ledger.catalog()
    assert found.get_value("exp", "weights") == ledger.get_value("exp", "weights")
    assert found.source_before("p", 5) == ledger.source_before("p", 5)
    assert found.clients["c"].epoch == ledger.clients["c"].epoch
    assert found.clients["p"] is found.jobs["exp"].producer
    assert found.clients["c"] is found.jobs["exp"].groups["train"].last
    assert found.next_demand("p") == ledger.next_demand("p") == 9
    with pytest.raises(Exception, match="was acked"):
        found.claim("c", 0)


def test_values_that_the_store_holds_are_not_in_every_entry(place, store, ledger):
    journal = Journal(store, "exp")
    for number in range(50):
        stored = f"n{number}" if number else ""
        ledger.put_value("c", f"value/{number}", Payload(f"v{number}", "v1/a", 5, stored=stored), 1)
        keep(journal, ledger)
    last = bytes(memoryview(store.get(store.keys("exp/journal")[-1]))).decode()
    named = [number for number in range(50) if f"value/{number}\\" in last]
    assert named[0] == 0, "what is in memory only"
    assert len(named) < 20, "the others are answers that may be asked for again"
    found = Ledger(lambda: 2000.0, wall=lambda: 2000.0)
    rebuild(found, *Journal(place.open(), "exp").load())
    assert {*found.jobs["exp"].values} == {f"value/{number}" for number in range(1, 50)}
    assert {*found.jobs["exp"].lost_values} == {"value/0"}


def test_old_entries_go_once_one_holds_all(store, ledger, monkeypatch):
    monkeypatch.setattr("slime.cross_job.storage.wal._WHOLE_EVERY", 5)
    journal = Journal(store, "exp")
    for rollout_id in range(30):
        publish(ledger, rollout_id)
        ledger.claim("c", rollout_id)
        ledger.ack("c", rollout_id)
        keep(journal, ledger)
        assert figures(again(store)) == figures(ledger)
    assert len(store.keys("exp/journal")) <= 15


def test_old_entries_go_oldest_first_some_with_each_that_follows(store, ledger, monkeypatch):
    """An owner that slept must find its last entry gone before the next number is free."""
    monkeypatch.setattr("slime.cross_job.storage.wal._WHOLE_EVERY", 10)
    monkeypatch.setattr("slime.cross_job.storage.wal._OLD_AT_ONCE", 4)
    journal = Journal(store, "exp")
    left = []
    for _ in range(16):
        keep(journal, ledger)
        left.append([int(key[-9:-5]) for key in store.keys("exp/journal")])
    assert all(numbers == [*range(numbers[0], numbers[-1] + 1)] for numbers in left)
    assert [numbers[0] for numbers in left[9:]] == [0, 0, 4, 8, 11, 11, 11]
    assert figures(again(store)) == figures(ledger)


@pytest.mark.parametrize("cleans_up", [True, False])
def test_of_two_owners_the_one_that_comes_late_is_fenced(place, store, ledger, monkeypatch, cleans_up):
    """Also in the moment when the other has written its entry, and the one before is still there."""
    first = Journal(store, "exp")
    keep(first, ledger)
    theirs = place.open()
    if not cleans_up:
        monkeypatch.setattr(theirs, "delete", lambda keys: None)
    second = Journal(theirs, "exp")
    second.load()
    publish(ledger, 0)
    keep(second, ledger)
    for _ in range(2):
        with pytest.raises(Fenced, match="is kept by another broker now"):
            keep(first, ledger)
    keep(second, ledger)
    assert figures(again(store)) == figures(ledger)


@pytest.mark.parametrize("entries", [0, 1, 2])
def test_an_owner_that_slept_while_the_other_cleaned_up_is_fenced_too(place, store, ledger, monkeypatch, entries):
    """The number that it takes is free again."""
    monkeypatch.setattr("slime.cross_job.storage.wal._WHOLE_EVERY", 3)
    first = Journal(store, "exp")
    keep(first, ledger, times=entries)
    second = Journal(place.open(), "exp")
    second.load()
    publish(ledger, 0)
    keep(second, ledger, times=12)
    assert store.keys("exp/journal")[0] > second.key(entries), "nothing was cleaned up: nothing is tested"
    assert second.is_ours()
    assert not first.is_ours()
    for _ in range(2):
        with pytest.raises(Fenced, match="is kept by another broker now"):
            keep(first, ledger)
    assert figures(again(store)) == figures(ledger)


def wiped(store, place) -> None:
    """As by FLUSHALL, or by `rm -r` of the folder."""
    store.delete(store.keys("exp"))
    if place.kind == "file":
        shutil.rmtree(place.uri.removeprefix("file://"))


def test_a_journal_that_is_wiped_is_written_whole_by_its_owner(place, store, ledger):
    """Its numbers go on; nobody is fenced, and whoever reads it knows all."""
    told: list[str] = []
    journal = Journal(store, "exp", "me", lambda: told.append("emptied"))
    publish_and_keep(journal, ledger, 3)
    assert told == []
    store.put("exp/keeper.json", sealed({"broker": "me", "beat": 1}))
    wiped(store, place)
    publish(ledger, 3)
    with pytest.raises(Outdated, match="was emptied before entry 3"):
        keep(journal, ledger)
    assert told
    assert store.keys("exp/journal") == [], "what is not whole is no beginning"
    keep(journal, ledger)
    assert store.keys("exp/journal") == [journal.key(3)]
    keep(journal, ledger)
    assert journal.is_ours()
    assert figures(again(place.open())) == figures(ledger)


def test_that_a_journal_is_wiped_is_seen_without_an_entry_too(place, store, ledger):
    told: list[str] = []
    journal = Journal(store, "exp", "me", lambda: told.append("emptied"))
    keep(journal, ledger, times=3)
    assert journal.is_ours()
    assert told == []
    wiped(store, place)
    assert journal.is_ours()
    assert told
    keep(journal, ledger)
    assert figures(again(place.open())) == figures(ledger)


@pytest.mark.parametrize("sign", ["an entry", "a sign of life"])
def test_of_a_wiped_journal_that_another_broker_keeps_the_old_one_is_fenced(place, store, ledger, sign):
    journal = Journal(store, "exp", "me")
    keep(journal, ledger, times=3)
    wiped(store, place)
    if sign == "an entry":
        other = Journal(place.open(), "exp", "other")
        other._number = 5
        other.begin_anew()
        keep(other, ledger)
    else:
        store.put("exp/keeper.json", sealed({"broker": "other", "beat": 1}))
    there = store.keys("exp/journal")
    assert not journal.is_ours()
    with pytest.raises(Fenced, match="is kept by another broker now"):
        keep(journal, ledger)
    assert store.keys("exp/journal") == there, "it leaves nothing that others cannot read"


@pytest.mark.parametrize("place", ["file", "redis"], indirect=True)
def test_an_owner_that_dies_while_it_writes_a_wiped_journal_leaves_one_that_it_can_go_on_with(place, ledger):
    """What it left is no journal to who does not know the job; who does goes on behind it."""
    torn = 0
    for after, death in deaths():
        store = place.open()
        store.delete(store.keys("exp"))
        dying = Journal(store, "exp", "me")
        keep(dying, ledger, times=2)
        store.delete(store.keys("exp"))
        dying._store = place.open_crashing(after)
        with death:
            with contextlib.suppress(Outdated):
                keep(dying, ledger)
            keep(dying, ledger)
        next_one = Journal(place.open(), "exp", "me")
        try:
            found = next_one.load()
        except Torn:
            torn, found = torn + 1, None
        if found is None:
            next_one.begin_anew()
        keep(next_one, ledger)
        assert next_one.is_ours()
        assert figures(again(place.open())) == figures(ledger)
    assert torn, "it died nowhere in between: nothing is tested"


@pytest.mark.parametrize("place", ["memory", "file"], indirect=True)
def test_an_entry_on_its_way_in_another_thread_fences_nobody(place, store, ledger):
    """`is_ours` is asked for a sign of life while a whole entry is written, which cleans up behind itself."""
    journal = Journal(store, "exp")
    keep(journal, ledger, times=3)
    journal._marks = {}  # as after `load`: the next entry is whole
    exists, beside = store.exists, []

    def slow(key: str) -> bool:
        if not beside:
            beside.append(key)
            keep(journal, ledger)  # the only writer there is
        return exists(key)

    store.exists = slow
    assert journal.is_ours()
    assert not exists(beside[0]), "it was not cleaned up: nothing is tested"


@pytest.mark.parametrize("place", ["file", "redis"], indirect=True)
def test_an_owner_that_dies_anywhere_leaves_what_was_or_what_is(place, ledger, monkeypatch):
    monkeypatch.setattr("slime.cross_job.storage.wal._WHOLE_EVERY", 2)
    store = place.open()
    journal = Journal(store, "exp")
    publish_and_keep(journal, ledger, 3)
    for after, death in deaths():
        before = figures(again(place.open()))
        ledger.demand("c", 100 + after)
        dying = Journal(place.open_crashing(10**6), "exp")
        dying.load()
        dying._store = place.open_crashing(after)
        with death:
            keep(dying, ledger)
        assert figures(again(place.open())) in (before, figures(ledger))


@pytest.mark.parametrize("harm", [b"", b"{}", b"not json", b'{"format": 99, "xxh3_128": "", "body": {}}'])
def test_a_journal_that_cannot_be_read_is_named_and_nothing_is_done(store, ledger, harm):
    keep(Journal(store, "exp"), ledger)
    (key,) = store.keys("exp/journal")
    store.put(key, harm)
    with pytest.raises(StoreRefused, match=f"{key}, which says how job exp stands, cannot be read"):
        Journal(store, "exp").load()


@pytest.mark.parametrize(
    "state",
    [
        '{"~": "os.system", "command": "true"}',
        '{"~": "Job", "job_id": "x", "evil": 1}',
        '{"~": "Ids", "ranges": [[3, 1]]}',
        "[" * 5000,
    ],
)
def test_records_that_nobody_wrote_are_refused(store, ledger, state):
    keep(Journal(store, "exp"), ledger)
    (key,) = store.keys("exp/journal")
    store.put(key, sealed({"state": state, "whole": True, "number": 0, "writer": "x"}))
    with pytest.raises(StoreRefused, match="cannot be read"):
        Journal(store, "exp").load()


def test_a_journal_that_lacks_an_entry_is_named(store, ledger):
    journal = Journal(store, "exp")
    publish_and_keep(journal, ledger, 4)
    keys = store.keys("exp/journal")
    store.delete([keys[2]])
    with pytest.raises(StoreRefused, match="the entry after it, 2, is missing"):
        Journal(store, "exp").load()
    store.delete(keys[:2])
    with pytest.raises(Torn, match="no entry before it holds all") as torn:
        Journal(store, "exp").load()
    assert torn.value.revision == ledger.jobs["exp"].revision


def test_no_password_is_in_the_journal(store, ledger):
    ledger.membership.attach(ClientInfo("c2", "exp", "consumer", group="other"), store="redis://:secret@h/0")
    keep(Journal(store, "exp"), ledger)
    assert all(b"secret" not in store.get(key).to_pybytes() for key in store.keys("exp/journal"))


def test_what_is_remembered_for_people_makes_no_long_way_back(store, ledger, monkeypatch):
    """Whoever takes over reads the entries since the last whole one: a few hundred, however long the job ran."""
    monkeypatch.setattr("slime.cross_job.storage.wal._WHOLE_EVERY", 10)
    journal = Journal(store, "exp")
    for rollout_id in range(40):
        ledger.demand("c", rollout_id)
        keep(journal, ledger)
    assert len(ledger.jobs["exp"].progress) == 40
    assert journal._since_whole < 10
    assert [*again(store).jobs["exp"].progress] == [*range(40)]
