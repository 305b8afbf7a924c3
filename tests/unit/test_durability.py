"""Who keeps the journal of a job in a durable store, and what is freed there; on a store in memory, time jumps."""

import asyncio
import time
import uuid
from dataclasses import replace
from typing import Any

import pytest

from slime.cross_job.batch import Batch
from slime.cross_job.broker import durability as durability_module
from slime.cross_job.broker.actor import Broker
from slime.cross_job.broker.durability import BEAT_S, Durability
from slime.cross_job.errors import (
    Fenced,
    Forgotten,
    NotStored,
    PayloadDamaged,
    Refused,
    StoreRefused,
    StoreUnreachable,
    Unreachable,
)
from slime.cross_job.ledger import Ledger
from slime.cross_job.ledger.state import SILENT
from slime.cross_job.storage import calls, open_store
from slime.cross_job.storage.payloads import Archive, mark_of, marked, new_name
from slime.cross_job.storage.recording import RECORDED, Header, Recording
from slime.cross_job.storage.wal import Journal, owner_of
from slime.cross_job.types import BROKER_NAME, Payload
from slime.cross_job.vault import durable as durable_module
from slime.cross_job.vault.actor import Vault
from slime.cross_job.vault.protocol import Durably, Target
from tests.support.ledger import attach, figures, publish, train
from tests.support.ray_stand_in import NAMESPACE, Hangs, batch, client, from_refs, payload, saved, settle


@pytest.fixture
def new(ray_stand_in, loop):
    """new(name): the durable side of a broker of this name, and its ledger."""

    def make(name: str) -> tuple[Durability, Ledger]:
        ledger = Ledger(loop.time, loop.time)
        return Durability(ledger, name), ledger

    return make


async def begin(made: tuple[Durability, Ledger], uri: str) -> tuple[Durability, Ledger]:
    durability, ledger = made
    await durability.open("exp", uri)
    attach(ledger, "p", store=uri)
    attach(ledger, "c")
    publish(ledger, 0, stored=saved(uri, "t0"))
    await keep(durability, ledger)
    return made


async def keep(durability: Durability, ledger: Ledger) -> None:
    ledger.jobs["exp"].revision += 1
    await durability.write(durability.entry("exp"))


async def beat(durability: Durability) -> None:
    while True:
        await asyncio.sleep(BEAT_S)
        await durability.beat()


def away(*_: Any) -> Any:
    raise StoreUnreachable("away")


async def test_who_attaches_to_a_job_that_was_idle_is_a_sign_of_life_at_once(new, uri, loop):
    """Or another cluster, which waits for that, would go on with the job a moment later."""
    (first, ledger), (second, _) = await begin(new("a"), uri), new("b")
    for name in ("p", "c"):
        ledger.membership.end(name, "finished")
    await keep(first, ledger)
    taking = loop.create_task(second.open("exp", uri))
    await asyncio.sleep(durability_module.SILENT_S - 0.1)
    await first.open("exp", uri)
    with pytest.raises(Fenced, match="which is alive: a client attaches there"):
        await taking


async def test_who_attaches_where_the_job_was_lost_unnoticed_hides_no_sign_of_life_of_its_owner(new, uri):
    (first, _), (second, again) = await begin(new("a"), uri), new("b")
    await second.open("exp", uri)
    attach(again, "c2", store=uri)
    await keep(second, again)
    beating = asyncio.ensure_future(beat(second))
    with pytest.raises(Fenced, match=r"\(b\), which is alive"):
        await first.open("exp", uri)
    beating.cancel()
    assert owner_of(open_store(uri), "exp")["broker"] == "b"


async def test_a_job_with_the_name_of_a_recording_is_refused_because_it_would_free_it(new, uri):
    durability, _ = new("a")
    Recording.make(open_store(uri), "exp", Header("other", RECORDED)).keep(0, [Batch.pack({"x": [1]})])
    with pytest.raises(Refused, match="has a recording of this name, exp, which a job would free"):
        await durability.open("exp", uri)


async def test_who_comes_after_an_owner_that_is_silent_goes_on_and_the_old_one_lets_go(new, uri, loop):
    (first, ledger), (second, again) = await begin(new("a"), uri), new("b")
    ledger.claim("c", 0)
    await keep(first, ledger)
    began = loop.time()
    await second.open("exp", uri)
    assert loop.time() - began >= durability_module.SILENT_S
    assert again.clients["c"].state == again.clients["p"].state == "dead"
    assert "its cluster was lost" in again.clients["c"].reason
    attach(again, "c2")
    assert again.claim("c2").rollout_id == 0, "the lease of a lost consumer has ended"
    await keep(second, again)
    ledger.demand("c", 5)
    with pytest.raises(Fenced, match="job exp is kept by another broker now"):
        await keep(first, ledger)
    assert "exp" not in ledger.jobs
    assert not first.is_open("exp")
    with pytest.raises(Forgotten):
        ledger.heartbeat("c", "I did not notice")
    await keep(second, again)


async def test_the_same_broker_goes_on_at_once_with_those_that_live(new, uri, loop):
    await begin(new("a"), uri)
    second, again = new("a")
    attach(again, "c", store=uri)
    again.jobs["exp"].revision = 0
    began = loop.time()
    await second.open("exp", uri)
    assert loop.time() == began
    assert again.clients["c"].live
    assert again.claim("c", 0).rollout_id == 0


async def test_a_journal_that_is_older_than_the_ledger_changes_nothing(new, uri):
    await begin(new("a"), uri)
    second, again = new("a")
    attach(again, "p", store=uri)
    again.jobs["exp"].revision = 10
    await second.open("exp", uri)
    assert figures(again, "published") == [0]
    await keep(second, again)


async def test_a_job_has_one_store(new, uri):
    durability, _ = await begin(new("a"), uri)
    await durability.open("exp", uri)
    with pytest.raises(Refused, match="give the same --cross-job-store"):
        await durability.open("exp", uri + "other")


async def test_what_is_acked_is_freed_and_what_nobody_knows_of_too_after_a_while(new, uri, monkeypatch):
    durability, ledger = await begin(new("a"), uri)
    archive = Archive(open_store(uri), "exp")
    kept = saved(uri, "t1")
    publish(ledger, 1, stored=kept, source={"n": 1})
    orphan = saved(uri, "orphan")
    train(ledger, 0)
    await durability.free()
    assert len(archive.names()) == 3, "what no entry gives up yet is kept"
    await keep(durability, ledger)
    await durability.free()
    assert {*archive.names()} == {kept, orphan}
    assert await durability.collect() == 0, "its writer may be about to say so"
    monkeypatch.setattr(durability_module, "_ORPHAN_S", -60.0)
    assert await durability.collect() == 1
    assert archive.names() == [kept]


@pytest.mark.parametrize("clock_s", [-10 * 365 * 86400.0, 10 * 365 * 86400.0])
async def test_what_nobody_knows_of_is_freed_by_the_brokers_own_patience_whatever_clocks_say(
    new, uri, monkeypatch, clock_s
):
    """The clock of a writer's node is ten years off, and with it what it names."""
    durability, ledger = await begin(new("a"), uri)
    archive, store = Archive(open_store(uri), "exp"), open_store(uri)
    now = time.time()
    with monkeypatch.context() as patched:
        patched.setattr("time.time", lambda: now + clock_s)
        begun, orphan = saved(uri, "begun"), saved(uri, "orphan")
        store.put(f"exp/payload/{new_name('part')}.0.arrow", b"its writer has died, or is at it")
    for _ in range(3):
        assert await durability.collect() == 0, "they may be about to be recorded"
        await asyncio.sleep(199)
    publish(ledger, 1, stored=begun)
    await asyncio.sleep(10)
    assert await durability.collect() == 1
    assert {*archive.names()} == {begun, *_alive(ledger)}
    assert orphan not in archive.names()
    assert len(archive.leftovers()) == 1
    await asyncio.sleep(3600)
    assert await durability.collect() == 1
    assert archive.leftovers() == []
    assert len(archive.names()) == 2


async def test_a_payload_that_is_recorded_while_others_are_listed_is_kept(new, uri):
    """Its vault could not reach the broker for long: it was an orphan in every collection before."""
    durability, ledger = await begin(new("a"), uri)
    store: Any = open_store(uri)
    late = saved(uri, "late")
    assert await durability.collect() == 0
    await asyncio.sleep(601)
    keys, listed = store.keys, []

    def slow(prefix: str) -> list[str]:
        found = keys(prefix)
        if prefix.endswith("quarantine"):  # looked at between the listing and the deletion
            listed.append(publish(ledger, 1, stored=late))
        return found

    store.keys = slow
    assert await durability.collect() == 0
    assert listed, "nothing was recorded meanwhile: nothing is tested"
    assert late in Archive(store, "exp").names()


async def test_a_store_that_is_away_keeps_no_other_job_from_being_collected(new, uri, monkeypatch):
    durability, ledger = new("a")
    monkeypatch.setattr(durability_module, "_ORPHAN_S", -60.0)
    other: Any = open_store(f"{uri}-other")
    await durability.open("another", f"{uri}-other")
    await begin((durability, ledger), uri)
    orphan = saved(uri, "orphan")
    other.exists = other.keys = away
    with pytest.raises(StoreUnreachable, match="away"):
        await durability.collect()
    assert orphan not in Archive(open_store(uri), "exp").names()


def _alive(ledger: Ledger) -> set[str]:
    return {record.payload.stored for record in ledger.jobs["exp"].records.values()}


async def test_what_is_in_quarantine_is_not_collected(new, uri, monkeypatch):
    """Whoever wants to know why it was damaged finds it there, although nobody needs it any more."""
    durability, _ = await begin(new("a"), uri)
    store = open_store(uri)
    archive = Archive(store, "exp")
    monkeypatch.setattr(durability_module, "_ORPHAN_S", -60.0)
    monkeypatch.setattr(durability_module, "_LEFTOVER_S", -60.0)
    bad, orphan = saved(uri, "bad"), saved(uri, "orphan")
    store.put(f"exp/payload/{bad}.0.arrow", b"")
    with pytest.raises(PayloadDamaged):
        archive.load(bad)
    before = [key for key in store.keys("exp") if orphan not in key]
    assert await durability.collect() == 1, "the orphan"
    assert store.keys("exp") == before
    assert [*archive.quarantined()] == [bad]


async def test_what_cannot_be_freed_now_is_freed_later(new, uri):
    durability, ledger = await begin(new("a"), uri)
    train(ledger, 0)
    await keep(durability, ledger)
    store: Any = open_store(uri)
    delete, troubles = store.delete, [StoreUnreachable("away"), None]

    def away(keys: Any) -> None:
        if (trouble := troubles.pop(0) if troubles else None) is not None:
            raise trouble
        delete(keys)

    store.delete = away
    await durability.free()
    assert Archive(store, "exp").names()
    await durability.free()
    assert Archive(store, "exp").names() == []


@pytest.mark.parametrize("is_written", [False, True])
async def test_an_entry_that_fails_for_long_is_said_and_what_follows_is_kept(new, uri, monkeypatch, is_written):
    """Also where it was written, and only the answer is lost: it fences nobody."""
    durability, ledger = await begin(new("a"), uri)
    monkeypatch.setattr(durability_module, "_AWAY_S", 0.0)
    store: Any = open_store(uri)
    create = store.create

    def away(key: str, data: Any) -> bool:
        if is_written:
            create(key, data)
        raise StoreUnreachable("away")

    store.create = away
    ledger.demand("c", 7)
    with pytest.raises(StoreUnreachable, match="the broker cannot keep how job exp stands: away"):
        await keep(durability, ledger)
    store.create = create
    ledger.demand("c", 8)
    await keep(durability, ledger)
    other, again = new("b")
    await other.open("exp", uri)
    assert again.jobs["exp"].demands == {7, 8}


async def test_a_broker_that_slept_while_another_went_on_frees_nothing_and_gives_no_sign_of_life(
    new, uri, monkeypatch
):
    (first, ledger), (second, again) = await begin(new("a"), uri), new("b")
    monkeypatch.setattr(durability_module, "_ORPHAN_S", -60.0)
    await second.open("exp", uri)
    attach(again, "p2")
    kept = saved(uri, "t9")
    publish(again, 9, stored=kept, producer="p2")
    await keep(second, again)
    for act in (first.collect, first.free, first.beat):
        await act()
    assert kept in Archive(open_store(uri), "exp").names()
    assert "exp" not in ledger.jobs
    await second.beat()
    assert second.is_open("exp")


async def test_a_job_that_has_begun_without_the_store_is_not_replaced(new, uri):
    await begin(new("a"), uri)
    second, again = new("a")
    attach(again, "p")
    with pytest.raises(Refused, match=r"has begun here without memory://.* give all of them the same"):
        await second.open("exp", uri)


async def test_a_store_that_hangs_does_not_keep_other_jobs_from_what_changed_by_itself(broker, vault):
    """Leases of two jobs end in the same moment, and the store of one hangs: the other one's is kept, and told."""
    bad, good = (f"memory://{uuid.uuid4().hex}" for _ in range(2))
    for job_id, uri in (("bad", bad), ("good", good)):
        for role in ("producer", "consumer"):
            info = replace(client(role, f"{role}-{job_id}"), job_id=job_id)
            await broker.attach(info, {"store": uri, "dead_after_s": 30.0})
        await broker.call("publish", f"producer-{job_id}", 0, replace(payload(f"t-{job_id}"), stored="n0"))
        await broker.call("claim", f"consumer-{job_id}", 0)
    hung, revisions = list[str](), {job_id: broker._ledger.jobs[job_id].revision for job_id in ("bad", "good")}

    def hang(*_: Any) -> bool:
        hung.append("create")
        raise Hangs

    store: Any = open_store(bad)
    store.create = hang
    await asyncio.sleep(32)
    assert hung, "nothing hung: nothing is tested"
    found = Journal(open_store(good), "good").load()
    assert found is not None
    assert found[0].revision > revisions["good"]
    assert {kept.state for kept in found[1]} == {SILENT}
    assert broker._ledger.clients["consumer-bad"].state == SILENT


async def handed_over(vault: Vault, uri: str, rollout_id: int) -> None:
    target = Target(f"t{rollout_id}", "p", rollout_id, durably=Durably(uri, "exp"))
    await vault.hand_over(target, from_refs(batch(rollout_id)), 30)


async def test_a_store_that_is_emptied_is_filled_again_and_what_is_lost_is_named(broker, vault, uri):
    """A folder deleted, or FLUSHALL, in mid-run: nobody dies of it, and a broker that restarts knows all."""
    await broker.attach(client("producer"), {"store": uri, "retain": 2})
    await broker.attach(client("consumer"), {})
    for rollout_id in range(3):
        await handed_over(vault, uri, rollout_id)
    await broker.call("claim", "c", 0)
    await broker.call("ack", "c", 0)  # retained: it lies in the store alone
    await broker.call("resume", "c", 0)  # and is wanted again
    store: Any = open_store(uri)
    store._values.clear()
    await broker.call("demand", "c", 3)
    await asyncio.sleep(10)
    status = (await broker.call("status", "exp"))["exp"]
    assert status["lost"] == [0]
    assert status["unstored"] == 0, "vaults have stored what they hold again"
    assert len(Archive(store, "exp").names()) == 2
    assert status["events"]["store emptied"] == 1
    (event,) = [e for e in broker._ledger.jobs["exp"].events.values() if e.kind == "store emptied"]
    assert event.text.startswith(f"{uri} lost what it had of this job: was it emptied?")
    assert event.text.endswith("2 payloads are stored again by their vaults; lost: rollout 0 version 1")
    found = Journal(store, "exp").load()
    assert found is not None
    assert sorted(found[0].lost) == [0]
    assert len(found[0].records) == 2
    assert (await broker.call("claim", "c", 1)).version == 1
    await broker.call("demand", "c", 0)
    assert await broker.wait(5, "next_demand", "p") == 0, "what is lost is generated again"


async def test_a_broker_that_begins_and_finds_its_store_emptied_goes_on_too(broker, vault, ray_stand_in, uri):
    await broker.attach(client("producer"), {"store": uri})
    await broker.attach(client("consumer"), {})
    await handed_over(vault, uri, 0)
    for task in broker._tasks:
        task.cancel()
    store: Any = open_store(uri)
    store._values.clear()
    mark = broker._durability.marks["exp"]
    again = ray_stand_in.actors[BROKER_NAME] = Broker(NAMESPACE)
    await again.hello()
    await asyncio.sleep(10)
    assert (await again.call("status", "exp"))["exp"]["events"]["store emptied"] == 1
    assert len(Archive(store, "exp").names()) == 1
    assert mark_of(store, "exp") == mark, "vaults that begin now look for the same"
    assert (await again.call("claim", "c", 0)).version == 1
    await again.call("end", "p", "finished")
    await again.call("end", "c", "finished")
    await again.call("forget", "exp")
    assert store.keys("exp") == []


@pytest.mark.parametrize("newer", [False, True])
async def test_a_journal_with_entries_missing_is_written_anew_by_who_knows_no_less(new, uri, newer):
    """Its writer died between an entry that is not whole, in a store that was emptied, and the one that is."""
    (first, ledger), (second, again) = await begin(new("a"), uri), new("a")
    attach(again, "p", store=uri)
    again.jobs["exp"].revision = ledger.jobs["exp"].revision
    for _ in range(1 + newer):
        await keep(first, ledger)
        again.jobs["exp"].revision += 1 - newer
    store = open_store(uri)
    store.delete(store.keys("exp/journal")[:-1])
    if newer:
        with pytest.raises(StoreRefused, match="no entry before it holds all"):
            await second.open("exp", uri)
        return
    await second.open("exp", uri)
    await keep(second, again)
    assert Journal(store, "exp").load() is not None


@pytest.fixture
def with_leftovers(broker, vault, uri):
    """Forget a job whose store then fails; returns (the store, what makes it work again)."""

    async def make() -> tuple[Any, Any]:
        await broker.attach(client("producer"), {"store": uri})
        await handed_over(vault, uri, 0)
        await broker.call("end", "p", "finished")
        store: Any = open_store(uri)
        delete = store.delete
        store.delete = away
        with pytest.raises(Unreachable, match=r"job exp is forgotten, but what it stored is left in .*: away") as told:
            await broker.call("forget", "exp")
        assert not isinstance(told.value, StoreUnreachable), "a client would ask again, and be told 'no job'"
        return store, lambda: setattr(store, "delete", delete)

    return make


async def test_a_job_is_forgotten_whatever_its_store_says(broker, vault, uri, with_leftovers):
    store, mend = await with_leftovers()
    assert await broker.call("status") == {}
    assert vault._snapshots == {}
    await asyncio.sleep(100)
    assert Archive(store, "exp").names(), "nothing is left: nothing is tested"
    mend()
    await asyncio.sleep(100)
    assert store.keys("exp") == []
    assert broker._durability.left == {}


async def test_a_new_run_does_not_go_on_as_the_forgotten_one_whose_store_failed(broker, vault, uri, with_leftovers):
    store, mend = await with_leftovers()
    with pytest.raises(StoreUnreachable, match="away"):
        await broker.attach(client("producer", "p2"), {"store": uri})
    mend()
    granted = await broker.attach(client("producer", "p2"), {"store": uri})
    assert (await broker.call("status", "exp"))["exp"]["published"] == 0
    await asyncio.sleep(100)
    assert mark_of(store, "exp") == granted["mark"], "the new run's files are not deleted later"


async def test_a_new_run_that_comes_while_its_name_is_being_forgotten_loses_nothing(
    broker, vault, loop, uri, monkeypatch
):
    """Deleting what a job stored takes seconds. Witness: the new run attaches before the deletion has begun."""
    in_thread, calls_made = calls.in_thread, list[float]()

    def first_is_slow(act: Any, done: Any) -> None:
        calls_made.append(loop.time())
        if len(calls_made) > 1:
            in_thread(act, done)
        else:
            loop.call_later(15.0, in_thread, act, done)

    await broker.attach(client("producer"), {"store": uri})
    await handed_over(vault, uri, 0)
    await broker.call("end", "p", "finished")
    await settle()
    monkeypatch.setattr(calls, "in_thread", first_is_slow)
    began = loop.time()
    forgetting = loop.create_task(broker.call("forget", "exp"))
    await settle()
    granted = loop.create_task(broker.attach(client("producer", "p2"), {"store": uri}))
    await asyncio.sleep(1)
    assert calls_made[0] == began
    assert not forgetting.done(), "nothing was slow: nothing is tested"
    mark = (await granted)["mark"]
    target = Target("t1", "p2", 0, durably=Durably(uri, "exp", mark=mark))
    published = await vault.hand_over(target, from_refs(batch()), 60)
    await forgetting
    await settle()
    store = open_store(uri)
    assert mark_of(store, "exp") == mark
    assert Archive(store, "exp").names() == [published.payload.stored]
    found = Journal(store, "exp").load()
    assert found is not None
    assert found[0].published == 1
    assert [*vault._snapshots] == ["exp"]
    assert [*vault._records] == ["t1"]


async def test_an_entry_of_a_job_that_was_forgotten_is_not_written_into_the_journal_of_the_next(new, uri):
    durability, ledger = await begin(new("a"), uri)
    late = durability.entry("exp")
    ledger.end("p", "finished")
    ledger.end("c", "finished")
    ledger.forget("exp")
    await durability.forget("exp")
    await durability.open("exp", uri)
    attach(ledger, "p2", store=uri)
    with pytest.raises(Forgotten, match="job exp was forgotten, or let go, while its state was being written"):
        await durability.write(late)
    assert open_store(uri).keys("exp/journal") == []
    await keep(durability, ledger)


async def test_an_outdated_entry_of_a_job_that_is_forgotten_meanwhile_is_no_error(new, uri):
    durability, ledger = await begin(new("a"), uri)
    store: Any = open_store(uri)
    create = store.create

    def emptied(key: str, data: Any) -> bool:
        store._values.clear()
        ledger.end("p", "finished")
        ledger.end("c", "finished")
        ledger.forget("exp")
        return create(key, data)

    store.create = emptied
    await keep(durability, ledger)
    assert "exp" not in ledger.jobs


async def test_a_vault_that_sees_another_folder_than_the_broker_refuses_to_store_there(
    broker, vault, uri, monkeypatch
):
    """A folder of the same name that is not shared: what is written there is lost with its node."""
    monkeypatch.setattr(durable_module, "_UNMARKED_S", -1.0)
    other = f"memory://{uuid.uuid4().hex}"
    granted = await broker.attach(client("producer"), {"store": uri})
    assert granted["mark"]
    words = "does not find in memory://.* the mark that the broker left there for job exp: it sees another folder"
    for there in ("", "of another run"):
        if there:
            marked(open_store(other), "exp", there)
        target = Target(f"t{there}", "p", 0, durably=Durably(other, "exp", mark=granted["mark"]))
        with pytest.raises(StoreRefused, match=words):
            await vault.hand_over(target, from_refs(batch()), 30)
    with pytest.raises(StoreUnreachable, match=words):
        await vault.load(f"memory://{uuid.uuid4().hex}", "exp", "n0")
    with pytest.raises(NotStored):
        await vault.load(uri, "exp", "n0")
    target = Target("t1", "p", 0, durably=Durably(uri, "exp", mark=granted["mark"]))
    assert (await vault.hand_over(target, from_refs(batch()), 30)).payload.stored


async def test_what_a_store_refuses_is_stored_behind_once_it_does_not(broker, vault, uri):
    """A password was changed, or access rights, and is mended after an hour; what was freed meanwhile is left."""
    store: Any = open_store(uri)
    put, tries = store.put, list[str]()

    def refused(key: str, data: Any) -> None:
        if "/payload/" in key:
            tries.append(key)
            raise StoreRefused("wrong password")
        put(key, data)

    async def hand_over(rollout_id: int, wait_s: float = 30.0) -> Any:
        await broker.call("heartbeat", "p", "publishing")
        target = Target(f"t{rollout_id}", "p", rollout_id, durably=Durably(uri, "exp", behind=True))
        return await vault.hand_over(target, from_refs(batch(rollout_id)), wait_s)

    settings = {"store": uri, "store_mode": "write-behind", "dead_after_s": 86400.0, "max_ahead": 100}
    await broker.attach(client("producer"), settings)
    await broker.attach(client("consumer"), {"dead_after_s": 86400.0})
    store.put = refused
    for rollout_id in range(8):
        await hand_over(rollout_id)
    assert await hand_over(8, 5.0) == "8 payloads have to be stored first: wrong password"
    await broker.call("claim", "c", 0)
    await broker.call("ack", "c", 0)
    await asyncio.sleep(3600)
    status = (await broker.call("status", "exp"))["exp"]
    assert status["unstored"] == 8
    texts = [one["text"] for one in status["standing"]]
    assert any(text.startswith("8 rollouts are not in the durable store after a minute") for text in texts), texts
    assert 9 * 50 < len(tries) < 9 * 75, "with a pause of a minute"
    store.put = put
    await asyncio.sleep(130)
    assert figures(broker._ledger, "unstored") == [0]
    assert len(Archive(store, "exp").names()) == 8
    assert vault._behind == {}
    assert vault._stores.troubles == {}


async def test_a_job_whose_store_fails_does_not_hold_up_another_one_that_stores_behind(broker, vault, uri):
    good = f"memory://{uuid.uuid4().hex}"

    async def hand_over(job_id: str, where: str, rollout_id: int) -> Any:
        target = Target(f"{job_id}{rollout_id}", job_id, rollout_id, durably=Durably(where, job_id, behind=True))
        return await vault.hand_over(target, from_refs(batch(rollout_id)), 2.0)

    for job_id, where in (("bad", uri), ("good", good)):
        settings = {"store": where, "store_mode": "write-behind", "max_ahead": 100}
        await broker.attach(replace(client("producer", job_id), job_id=job_id), settings)
    store: Any = open_store(uri)

    def refused(key: str, data: Any) -> None:
        raise StoreRefused("wrong password")

    store.put = refused
    for rollout_id in range(8):
        await hand_over("bad", uri, rollout_id)
    assert await hand_over("bad", uri, 8) == "8 payloads have to be stored first: wrong password"
    assert (await hand_over("good", good, 0)).version == 1
    await settle()
    assert len(Archive(open_store(good), "good").names()) == 1


async def test_what_is_freed_while_it_is_being_stored_leaves_nothing_there(broker, vault, uri, loop, monkeypatch):
    in_thread = calls.in_thread
    await broker.attach(client("producer"), {"store": uri, "store_mode": "write-behind"})
    store = open_store(uri)
    names = Archive(store, "exp").names
    monkeypatch.setattr(calls, "in_thread", lambda act, done: loop.call_later(1.0, in_thread, act, done))
    target = Target("t0", "p", 0, durably=Durably(uri, "exp", behind=True))
    await vault.hand_over(target, from_refs(batch()), 30)
    assert vault._behind
    await vault.drop(["t0"])
    await asyncio.sleep(1.5)
    assert len(names()) == 1, "it was not being stored: nothing is tested"
    await asyncio.sleep(5)
    assert names() == []
    assert store.keys("exp/payload") == []
    assert vault._behind == {}


def test_payloads_that_lie_in_a_store_do_not_go_with_their_vault(ledger):
    attach(ledger, "p")
    attach(ledger, "c")
    publish(ledger, 0, stored="n0")
    publish(ledger, 1)
    assert ledger.rollouts.vault_lost("v1") == {"exp": ["rollout 1 version 1"]}
    assert [located.rollout_id for located in ledger.catalog()] == [0]
    assert ledger.rollouts.payload_lost("exp", "t0") == "rollout 0 version 1", "the store has lost it, too"


def test_what_is_stored_behind_counts_once_it_is(ledger):
    attach(ledger, "p", store="memory://x")
    attach(ledger, "c")
    located = publish(ledger, 0, source={"n": 1}, source_apart=True)
    ledger.put_value("c", "weights", Payload("w", "v1/a", 1), 1)
    assert figures(ledger, "unstored") == [1]
    assert ledger.stored("exp", located.serial, "t0", "n0") is True
    assert ledger.stored("exp", located.serial, "of another life", "x") is False
    assert ledger.stored("exp", ledger.get_value("exp", "weights").serial, "w", "w0") is True
    assert figures(ledger, "unstored") == [0]
    assert ledger.get("exp", 0).payload.stored == "n0"
    assert [record.payload.stored for record in ledger.jobs["exp"].records.values()] == ["n0", "w0"]
    train(ledger, 0)
    assert ledger.stored("exp", located.serial, "t0", "late") is False
    publish(ledger, 1, source={"n": 2})
    assert ledger.garbage.take_store_drops() == [("exp", "n0")], "rollout 1 would be generated again from there"
    train(ledger, 1)
    assert ledger.garbage.take_store_drops() == [("exp", "n0-source")]
