"""What is left of a job that is complete: nothing that anybody is asked about again and again, and little to keep."""

import asyncio
from typing import Any

import pytest

from slime.cross_job.broker import durability as durability_module
from slime.cross_job.broker.actor import Broker
from slime.cross_job.broker.durability import BEAT_S, COLLECT_S
from slime.cross_job.errors import RolloutNotFound, StoreUnreachable
from slime.cross_job.ledger import Ledger
from slime.cross_job.ledger.history import SMALL_AFTER_S, SMALL_EVENTS, SMALL_PROGRESS
from slime.cross_job.storage import open_store
from slime.cross_job.storage.memory import MemoryStore
from slime.cross_job.storage.wal import Journal
from slime.cross_job.types import BROKER_NAME, Payload
from tests.support.ledger import attach, figures, publish, remembered, restarted, train
from tests.support.ray_stand_in import NAMESPACE, VAULT, client, saved

WEEK_S = 7 * 86_400


@pytest.fixture
def calls(uri, monkeypatch) -> list[str]:
    """Every call of the store."""
    store, made = open_store(uri), list[str]()

    def counted(name: str) -> Any:
        method = getattr(store, name)

        def call(*args: Any) -> Any:
            made.append(f"{name} {args[:1]}")
            return method(*args)

        return call

    for name in ("put", "create", "get", "delete", "keys", "exists", "drafts"):
        monkeypatch.setattr(store, name, counted(name))
    monkeypatch.setattr(durability_module, "open_store", lambda *args: made.append("open") or open_store(*args))
    return made


def keys(uri: str) -> list[str]:
    return [key.partition("/")[2] for key in MemoryStore.of(uri).keys("exp")]


async def begin(broker: Broker, uri: str, run: str = "", **settings: Any) -> None:
    for role in ("producer", "consumer"):
        stated = {"dead_after_s": 1e6, "store": uri, **settings}
        await broker.attach(client(role, name=f"{role[0]}{run}"), stated)


async def finished(broker: Broker, uri: str, rollouts: int = 5, **settings: Any) -> None:
    """A job that is complete a moment ago."""
    await begin(broker, uri, **settings)
    for number in range(rollouts):
        stored = saved(uri, f"t{number}")
        await broker.call("publish", "p", number, Payload(f"t{number}", f"{VAULT}/a", 10, stored=stored))
        await broker.call("claim", "c", number)
        await broker.call("ack", "c", number)
    saved(uri, "unknown")
    for name in ("p", "c"):
        await broker.call("end", name, "finished")
    assert (await broker.call("status", "exp"))["exp"]["complete"]


async def test_the_store_of_a_job_that_is_complete_is_not_asked_any_more(broker, vault, uri, calls, ray_stand_in):
    await finished(broker, uri)
    await asyncio.sleep(3 * BEAT_S)
    assert [key for key in keys(uri) if key.startswith(("payload", "keeper"))] == []
    assert len([key for key in keys(uri) if key.startswith("journal")]) == 1
    calls.clear()
    await asyncio.sleep(3 * COLLECT_S)
    assert calls == [], "no sign of life, no listing, no entry"
    ray_stand_in.actors[BROKER_NAME] = again = Broker(NAMESPACE)
    await again.hello()
    await asyncio.sleep(3 * COLLECT_S)
    assert (await again.call("status", "exp"))["exp"]["acked"] == 5
    assert calls == [], "nor does a broker that restarts open it"


async def test_an_unfinished_job_is_still_asked(broker, vault, uri, calls):
    await begin(broker, uri)
    await broker.call("end", "p", "finished")
    await asyncio.sleep(3 * BEAT_S)
    calls.clear()
    await asyncio.sleep(10 * BEAT_S)
    assert len([call for call in calls if "keeper.json" in call and call.startswith("put")]) >= 9


async def test_a_new_run_under_that_name_goes_the_usual_way(broker, vault, uri):
    await finished(broker, uri)
    await asyncio.sleep(3 * BEAT_S)
    await begin(broker, uri, run="2")
    await broker.call("publish", "p2", 0, Payload("again", f"{VAULT}/a", 10, stored=saved(uri, "again")))
    await asyncio.sleep(3 * BEAT_S)
    assert "keeper.json" in keys(uri)
    assert (await broker.call("status", "exp"))["exp"]["published"] == 1
    job, _ = Journal(open_store(uri), "exp").load()
    assert (job.published, job.complete, job.closed, [*job.records]) == (1, False, False, [5])
    for name in ("p2", "c2"):
        await broker.call("end", name, "failed")
    assert not (await broker.call("status", "exp"))["exp"]["complete"]


@pytest.mark.parametrize("known", [True, False])
async def test_a_new_run_may_begin_with_who_states_no_store(broker, vault, uri, ray_stand_in, known):
    await finished(broker, uri)
    await asyncio.sleep(3 * BEAT_S)
    there = broker
    if not known:  # as on another cluster
        vault._snapshots.clear()
        ray_stand_in.actors[BROKER_NAME] = there = Broker(NAMESPACE)
    await there.attach(client("consumer", name="c2"), {"dead_after_s": 1e6})
    await there.attach(client("producer", name="p2"), {"dead_after_s": 1e6, "store": uri})
    await there.call("publish", "p2", 0, Payload("again", f"{VAULT}/a", 10, stored=saved(uri, "again")))
    assert (await there.call("claim", "c2", 0)).payload.token == "again"
    job, clients = Journal(open_store(uri), "exp").load()
    assert (job.published, job.claimed, job.complete, len(job.records)) == (1, 1, False, 1)
    assert {one.info.client_id for one in clients if one.attached} == {"c2", "p2"}


@pytest.mark.parametrize("closed", [True, False])
async def test_a_complete_job_can_be_forgotten_at_once(broker, vault, uri, closed):
    await finished(broker, uri)
    await asyncio.sleep(3 * BEAT_S if closed else 0)
    assert broker._ledger.jobs["exp"].closed == closed
    await broker.call("forget", "exp")
    assert keys(uri) == []
    await asyncio.sleep(60)
    assert keys(uri) == []
    assert (vault._snapshots, broker._replicas._jobs, broker._durability._locks) == ({}, {}, {})


async def test_a_complete_job_is_forgotten_after_a_while(broker, vault, uri, ray_stand_in):
    await finished(broker, uri, forget_after_s=1000.0)
    open_store(uri).put("exp/data/of-a-communicator", b"1")
    await asyncio.sleep(600)
    assert (await broker.call("status", "exp"))["exp"]["forget_after_s"] == 1000
    ray_stand_in.actors[BROKER_NAME] = again = Broker(NAMESPACE)
    await again.hello()
    await asyncio.sleep(1100)
    with pytest.raises(RolloutNotFound, match="no job 'exp'"):
        await again.call("status", "exp")
    assert keys(uri) == ["data/of-a-communicator"], "others keep something under that name"
    assert vault._snapshots == {}


async def test_a_store_that_is_away_is_closed_later_and_what_is_left_of_a_job_that_is_forgotten_is_said(
    broker, vault, uri, monkeypatch, caplog
):
    await finished(broker, uri, forget_after_s=1000.0)
    store, away = open_store(uri), StoreUnreachable("it is away")

    def fail(*_: Any) -> Any:
        raise away

    with monkeypatch.context() as patch:
        patch.setattr(store, "delete", fail)
        await asyncio.sleep(200)
        assert not broker._ledger.jobs["exp"].closed
    await asyncio.sleep(100)
    assert broker._ledger.jobs["exp"].closed
    with monkeypatch.context() as patch:
        patch.setattr(store, "delete", fail)
        await asyncio.sleep(1000)
    assert "exp" not in broker._ledger.jobs
    assert "job exp is forgotten, but what it stored is left in memory://" in caplog.text


async def test_what_a_vault_stores_late_of_a_complete_job_goes(broker, vault, uri):
    await finished(broker, uri)
    await asyncio.sleep(3 * BEAT_S)
    late = saved(uri, "late")
    assert await broker.call("stored", "exp", 3, "t3", late) is False
    await asyncio.sleep(100)
    assert [key for key in keys(uri) if key.startswith(("payload", "keeper"))] == []
    assert broker._ledger.jobs["exp"].closed


async def test_a_job_with_a_writer_that_lives_stays_open(broker, vault, uri):
    await broker.attach(client("writer", name="w"), {"dead_after_s": 1e6})
    await finished(broker, uri)
    await asyncio.sleep(5 * BEAT_S)
    assert not broker._ledger.jobs["exp"].closed
    await broker.call("end", "w", "finished")
    await asyncio.sleep(100)
    assert broker._ledger.jobs["exp"].closed


# ---------------------------------------------------------------------- in the ledger


def complete(ledger: Ledger, rollouts: int) -> None:
    attach(ledger, "p")
    attach(ledger, "c")
    for rollout_id in range(rollouts):
        publish(ledger, rollout_id)
        train(ledger, rollout_id)
    for number in range(100):
        ledger.note_event("exp", "quarantined", str(number))
    ledger.heartbeat("c", "x", [("train", 0, 1.0, 2.0)])
    ledger.end("c", "finished")
    ledger.end("p", "finished")


def test_a_complete_job_is_kept_small_after_an_hour(ledger, clock):
    complete(ledger, 500)
    job = ledger.jobs["exp"]
    assert ledger.lifetime.expire() == []
    assert len(ledger.look("exp")["progress"]) == 500, "reports are made when it has just ended"
    clock.now += SMALL_AFTER_S + 1
    assert ledger.lifetime.expire() == ["exp"]
    assert [*job.progress] == [*range(500 - SMALL_PROGRESS, 500)]
    assert (len(job.events), len(ledger.history.spans)) == (SMALL_EVENTS, 0)
    assert figures(ledger, "published", "acked", "complete") == [500, 500, True]
    assert ledger.lifetime.expire() == []


def test_it_counts_as_complete_since_it_was_whatever_broker_keeps_it(ledger, clock):
    complete(ledger, 3)
    clock.now += WEEK_S - 100
    assert ledger.lifetime.through() == {"exp": False}
    kept = remembered(ledger)
    assert kept[0][0].job.aged_s == WEEK_S - 100
    again = restarted(ledger)
    again.registry.clock = clock
    again.jobs["exp"].aged_at = clock.now
    assert again.lifetime.through() == {"exp": False}
    clock.now += 101
    assert again.lifetime.through() == {"exp": True}


def test_the_last_entry_of_a_journal_is_small_and_whole(ledger, uri):
    complete(ledger, 500)
    store = open_store(uri)
    journal = Journal(store, "exp")
    for _ in range(3):
        journal.entry(ledger.jobs["exp"], []).write()
    last = journal.last_entry(ledger.jobs["exp"], [*ledger.clients.values()])
    last.write()
    journal.delete_before(last)
    (key,) = store.keys("exp/journal")
    assert memoryview(store.get(key)).nbytes < 150_000
    job, clients = Journal(store, "exp").load()
    assert (len(job.progress), len(job.events), job.acked, len(clients)) == (SMALL_PROGRESS, SMALL_EVENTS, 500, 2)
    assert len(ledger.jobs["exp"].progress) == 500
