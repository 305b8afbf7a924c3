"""Two brokers, each on a Ray cluster of its own, and one job in a store: who goes on with it, and who is fenced."""

import asyncio

import pytest

from slime.cross_job.broker import actor as broker_module
from slime.cross_job.broker.actor import Broker
from slime.cross_job.broker.durability import REPLACED, SILENT_S
from slime.cross_job.errors import BadInput, EndOfStream, Fenced, Forgotten, StoreUnreachable
from slime.cross_job.ledger.records_json import decode, encode
from slime.cross_job.ledger.state import DEAD, Client
from slime.cross_job.storage import open_store
from slime.cross_job.storage.wal import owner_of
from slime.cross_job.types import ClientInfo, Payload
from tests.support.ray_stand_in import NAMESPACE, client


class OnCluster(Broker):
    """A broker that takes itself to be on a Ray cluster of this name."""

    def __init__(self, cluster: str):
        super().__init__(NAMESPACE)
        self._cluster = cluster

    async def _know_the_cluster(self) -> None:
        self._durability.me = f"{NAMESPACE}/{self._cluster}"

    def sleep(self) -> None:
        """It does nothing any more, until it wakes up: as with SIGSTOP, or without its cluster."""
        for task in self._tasks:
            task.cancel()

    def wake(self) -> None:
        for watch in (self._watch_clients, self._watch_stores):
            self._spawn(self._forever(watch))


@pytest.fixture
def two(ray_stand_in, run) -> tuple[OnCluster, OnCluster]:
    here, there = OnCluster("a"), OnCluster("b")
    for broker in (here, there):
        run(broker.hello())
    return here, there


def stored(number: int) -> Payload:
    return Payload(f"t{number}", "v1/a", 10, num_samples=2, stored=f"n{number}")


async def begin(broker: Broker, uri: str) -> None:
    """The producer p, the consumer c, and a rollout that c has claimed."""
    for role, name in (("producer", "p"), ("consumer", "c")):
        await broker.attach(client(role, name), {"store": uri, "dead_after_s": 600.0})
    await broker.call("publish", "p", 0, stored(0))
    assert (await broker.call("claim", "c", 0)).rollout_id == 0


async def test_a_job_that_is_alive_on_another_cluster_is_refused_and_undisturbed(two, uri):
    here, there = two
    await begin(here, uri)
    words = r"kept in memory://.* \(ns/a\), which is alive: the producer of job exp .* there. Stop its jobs"
    for role in ("producer", "consumer"):
        with pytest.raises(Fenced, match=words):
            await there.attach(client(role, "x", group="archive"), {"store": uri})
    assert "exp" not in there._ledger.jobs
    await here.call("ack", "c", 0)
    assert owner_of(open_store(uri), "exp")["broker"] == "ns/a"


async def test_a_cluster_that_is_lost_is_replaced_by_one_that_has_the_store(two, uri, loop, monkeypatch):
    """There, another job has the number of the one that was lost: Ray is not asked about that."""
    here, there = two
    monkeypatch.setattr(broker_module, "job_words", lambda _: ("RUNNING", "its Ray job is RUNNING"))
    await begin(here, uri)
    here.sleep()
    began = loop.time()
    await there.attach(client("consumer", "c2"), {"store": uri})
    assert SILENT_S <= loop.time() - began < SILENT_S + 5
    verdict = await there.call("peer_verdict", "c2")
    assert (verdict["kind"], verdict["reason"]) == ("dead", REPLACED)
    assert "RUNNING" not in verdict["message"]
    assert (await there.call("claim", "c2", 0)).payload.stored == "n0", "the lease of a lost consumer has ended"
    await there.attach(client("producer", "p2"), {"store": uri})
    await there.call("publish", "p2", 1, stored(1))
    await there.call("ack", "c2", 0)
    figures = (await there.call("status", "exp"))["exp"]
    assert (figures["published"], figures["acked"], figures["losses"]) == (2, 1, 0)


async def test_a_job_that_nobody_works_on_any_more_may_go_on_on_another_cluster(two, uri, loop):
    here, there = two
    await begin(here, uri)
    await here.call("end", "p", "stopped")
    await asyncio.sleep(60)
    with pytest.raises(Fenced, match=r"the consumer of job exp .* is attached there"):
        await there.attach(client("producer", "p2"), {"store": uri})
    await here.call("end", "c", "stopped")
    began = loop.time()
    await there.attach(client("producer", "p2"), {"store": uri})
    assert loop.time() - began < SILENT_S + 5
    await asyncio.sleep(5)
    assert "exp" not in here._ledger.jobs, "it has noticed it by itself"
    with pytest.raises(Fenced, match=r"the producer of job exp .* is attached there"):
        await here.attach(client("consumer", "c3"), {"store": uri})
    await there.attach(client("consumer", "c2"), {"store": uri})
    assert (await there.call("claim", "c2", 0)).payload.stored == "n0"


async def test_a_job_stays_where_memory_has_what_the_store_has_not(two, vault, uri):
    here, there = two
    await begin(here, uri)
    in_memory = Payload("t1", f"{vault._name}/{vault._incarnation}", 10, num_samples=2)
    await here.call("publish", "p", 1, in_memory)
    for client_id in ("p", "c"):
        await here.call("end", client_id, "stopped")
    await asyncio.sleep(60)
    with pytest.raises(Fenced, match="1 payloads are in memory there, and not in the store"):
        await there.attach(client("producer", "p2"), {"store": uri})


async def test_a_client_that_was_refused_leaves_no_owner(two, uri):
    here, there = two
    with pytest.raises(BadInput):
        await here.attach(client("producer", "p"), {"store": uri, "dead_after_s": -1.0})
    assert here._durability.is_open("exp"), "it was refused before: nothing is tested"
    await begin(there, uri)


async def test_of_two_brokers_that_keep_one_job_the_one_that_slept_is_fenced_with_its_clients(two, uri):
    here, there = two
    await begin(here, uri)
    waiting = asyncio.ensure_future(here.wait(60, "next_demand", "p"))
    await asyncio.sleep(0)
    here.sleep()
    await there.attach(client("consumer", "c2"), {"store": uri})
    assert here._durability.is_open("exp"), "only one of them keeps the job: nothing is tested"
    with pytest.raises(Fenced, match="job exp is kept by another broker now"):
        await here.call("ack", "c", 0)
    with pytest.raises(Forgotten):  # of which a client asks at its store
        await waiting
    for client_id in ("p", "c"):
        with pytest.raises(Fenced, match=r"\(ns/b\), which is alive"):
            await here.recall("exp", client_id, uri)
    assert "exp" not in here._ledger.jobs
    await there.call("claim", "c2", 0)
    await there.call("ack", "c2", 0)
    assert (await there.call("status", "exp"))["exp"]["acked"] == 1


async def test_a_broker_that_was_replaced_while_it_slept_lets_the_job_go_though_nobody_asks(two, vault, uri):
    here, there = two
    await here.vault_here(vault._name, vault._incarnation)
    await begin(here, uri)
    assert "exp" in vault._snapshots
    here.sleep()
    await there.attach(client("producer", "p2"), {"store": uri})
    here.wake()
    await asyncio.sleep(6)
    assert "exp" not in here._ledger.jobs
    assert "exp" not in vault._snapshots, "it is not what holds any more"
    await there.call("heartbeat", "p2", "undisturbed")
    await there.call("end", "p2", "finished")
    await there.attach(client("consumer", "c2"), {"store": uri})
    await there.call("claim", "c2", 0)
    with pytest.raises(EndOfStream):
        await there.call("claim", "c2", 1)


async def test_a_broker_that_was_restarted_after_it_was_replaced_is_fenced(two, vault, uri):
    """What its vaults remember of the job is older than what the other one has written since."""
    here, there = two
    await here.vault_here(vault._name, vault._incarnation)
    await begin(here, uri)
    here.sleep()
    await there.attach(client("consumer", "c2"), {"store": uri})
    assert "exp" in vault._snapshots, "nothing was remembered: nothing is tested"
    again = OnCluster("a")
    await again.hello()
    with pytest.raises(Forgotten):
        await again.call("heartbeat", "p", "I did not notice")
    with pytest.raises(Fenced, match="which is alive"):
        await again.recall("exp", "p", uri)
    await asyncio.sleep(6)
    assert "exp" not in vault._snapshots
    await there.call("claim", "c2", 0)


async def test_a_broker_without_memory_goes_on_with_its_own_clients_as_the_store_says(two, uri):
    here, _ = two
    await begin(here, uri)
    here.sleep()
    again = OnCluster("a")
    with pytest.raises(Forgotten):
        await again.call("ack", "c", 0)
    await again.recall("exp", "c", uri)
    await again.call("ack", "c", 0)
    await again.recall("exp", "p", uri)
    await again.call("publish", "p", 1, stored(1))


async def test_clients_of_a_lost_cluster_are_dead_also_where_who_takes_over_dies_before_it_wrote_so(two, uri):
    here, there = two
    await begin(here, uri)
    here.sleep()
    await there.recall("exp", "c", uri)  # which reads the job, and writes nothing of it
    there.sleep()
    again = OnCluster("b")  # as Ray restarts it, where no vault remembers anything
    await again.attach(client("consumer", "c2"), {"store": uri})
    assert {name: again._ledger.clients[name].state for name in ("p", "c")} == {"p": DEAD, "c": DEAD}


async def test_who_takes_over_and_cannot_write_at_first_keeps_the_job_all_the_same(two, uri, monkeypatch):
    here, there = two
    keep, troubles = there._replicas.keep, [StoreUnreachable("away")]

    async def fails_once(job_id: str) -> None:
        if troubles:
            raise troubles.pop()
        await keep(job_id)

    await begin(here, uri)
    here.sleep()
    monkeypatch.setattr(there._replicas, "keep", fails_once)
    with pytest.raises(StoreUnreachable):
        await there.attach(client("consumer", "c2"), {"store": uri})
    assert troubles == []
    await there.attach(client("consumer", "c2"), {"store": uri})  # as Connection.ask does: again
    await there.call("claim", "c2", 0)


def test_a_client_that_an_earlier_version_wrote_down_is_read():
    now = Client(ClientInfo("c", "exp", "consumer", group="train"), 1, 30.0, 0.0, 0.0)
    before = encode(now)
    for name, more in (
        (b'"client_id":', b'"cluster":"session_1","one_cluster":true,'),
        (b'"epoch":', b'"last_beat_wall":7.0,'),
    ):
        assert before.count(name) == 1
        before = before.replace(name, more + name)
    assert decode(before) == now
