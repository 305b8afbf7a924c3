"""Two brokers, of two Ray clusters, and one experiment between them: the real classes, a store in memory."""

import asyncio
import contextlib
import uuid
from dataclasses import replace
from typing import Any

import pytest

from slime.cross_job.broker import Broker
from slime.cross_job.clusters import TAKE_OVER_S
from slime.cross_job.errors import (
    BadInput,
    CrossJobError,
    EndOfStream,
    Forgotten,
    JobIdTaken,
    NotOwner,
    Refused,
    StoreUnreachable,
)
from slime.cross_job.mail import Mail
from slime.cross_job.stores import open_store
from slime.cross_job.types import Payload

from .ray_stand_in import client


@pytest.fixture
def uri() -> str:
    return f"memory://{uuid.uuid4().hex}"


class Cluster:
    """A broker that believes to be on a Ray cluster of this name."""

    def __init__(self, name: str):
        self.name, self.broker = name, Broker(name)

    async def start(self) -> "Cluster":
        await self.broker.hello()
        self.broker._books.me = self.broker._books.cluster = self.name
        self.broker._books.nodes = set()
        return self

    async def attach(self, role: str, name: str, uri: str, group: str = "train", **more: Any) -> dict[str, Any]:
        info = replace(
            client(role, name, group), **{k: more.pop(k) for k in ("one_cluster", "ray_job_id") if k in more}
        )
        return await self.broker.attach(info, {"store": uri, **more})

    def sleep(self) -> None:
        """It does nothing any more, until it wakes up: as with SIGSTOP."""
        for task in self.broker._tasks:
            task.cancel()

    def wake(self) -> None:
        for watch in (self.broker._watch_clients, self.broker._watch_stores, self.broker._watch_followers):
            self.broker._spawn(self.broker._forever(watch))
        self.broker._spawn(self.broker._forever(self.broker._serve))


@pytest.fixture
def two(ray_stand_in, run) -> tuple[Cluster, Cluster]:
    async def start() -> tuple[Cluster, Cluster]:
        return await Cluster("a").start(), await Cluster("b").start()

    return run(start())


def stored(number: int) -> Payload:
    return Payload(f"t{number}", "v1/a", 10, num_samples=2, stored=f"n{number}")


def test_a_rollout_goes_from_one_cluster_to_the_other_and_its_ack_back(two, run, uri):
    here, there = two

    async def test() -> None:
        await here.attach("producer", "p", uri)
        assert (await there.attach("consumer", "c", uri, max_ahead=1))["max_ahead"] == 1
        assert (await here.broker.call("heartbeat", "p", "x"))["max_ahead"] == 1
        wanted = asyncio.ensure_future(here.broker.wait(60, "next_demand", "p"))
        await there.broker.call("demand", "c", 0)
        assert await wanted == 0
        claimed = asyncio.ensure_future(there.broker.wait(60, "claim", "c", 0))
        await asyncio.sleep(1)
        assert not claimed.done()
        assert (await here.broker.call("publish", "p", 0, stored(0)))[0]
        assert (await claimed).payload == stored(0)
        await there.broker.call("ack", "c", 0)
        status = (await there.broker.call("status", "exp"))["exp"]
        assert (status["published"], status["claimed"], status["acked"]) == (1, 1, 1)
        assert [*await there.broker.call("status")] == ["exp"]
        assert await there.broker.call("listed") == {"exp": []}
        assert "exp" not in there.broker._ledger.jobs
        await here.broker.call("end", "p", "finished")
        with pytest.raises(EndOfStream):
            await there.broker.wait(60, "claim", "c", 1)
        with pytest.raises(NotOwner, match="claim it first"):
            await there.broker.call("ack", "c", 7)

    run(test())


def test_what_a_follower_publishes_lies_in_the_store_alone(two, run, uri):
    here, there = two

    async def test() -> None:
        await here.attach("consumer", "c", uri)
        await there.attach("producer", "p", uri)
        _, located = await there.broker.call("publish", "p", 0, stored(0))
        assert located.payload == replace(stored(0), vault="")
        assert (await here.broker.call("claim", "c")).payload.vault == ""
        await here.broker.call("ack", "c", 0)
        assert here.broker._ledger.take_drops() == []
        with pytest.raises(Refused, match="--cross-job-store-mode write-through"):
            await there.broker.call("publish", "p", 1, replace(stored(1), stored=""))
        with pytest.raises(Refused, match="handles of this one's actors are of no use there"):
            await there.broker.call("announce", "p", [object()])
        with pytest.raises(BadInput, match="cannot be kept in a durable store"):
            await there.broker.call("publish", "p", 1, replace(stored(1), meta={"x": object()}))

    run(test())


def test_two_clusters_need_write_through(two, run, uri):
    here, there = two

    async def test() -> None:
        await here.attach("producer", "p", uri, store_mode="write-behind")
        with pytest.raises(Refused, match="--cross-job-store-mode write-through"):
            await there.attach("consumer", "c", uri)

    run(test())


def test_a_ray_job_of_another_cluster_is_not_the_same_because_it_has_the_same_number(two, run, uri):
    here, there = two

    async def test() -> None:
        await here.attach("producer", "p", uri, ray_job_id="01000000")
        with pytest.raises(JobIdTaken, match="is alive"):
            await there.attach("producer", "p2", uri, ray_job_id="01000000")
        await here.attach("producer", "p3", uri, ray_job_id="01000000")

    run(test())


def test_a_silent_keeper_is_replaced_and_goes_on_as_a_follower(two, run, uri, loop):
    here, there = two

    async def test() -> None:
        await here.attach("producer", "p", uri, dead_after_s=60.0)
        await there.attach("consumer", "c", uri, dead_after_s=60.0)
        await here.broker.call("publish", "p", 0, stored(0))
        assert (await there.broker.call("claim", "c", 0)).rollout_id == 0
        here.sleep()
        began = loop.time()
        while True:
            try:
                await there.broker.call("demand", "c", 1)
                break
            except StoreUnreachable:
                pass  # as Link.ask does: again
        assert TAKE_OVER_S <= loop.time() - began < TAKE_OVER_S + 30
        assert there.broker._books.is_open("exp")
        await there.broker.call("ack", "c", 0)
        here.wake()
        await asyncio.sleep(3)
        await here.broker.call("heartbeat", "p", "I have slept")
        assert not here.broker._books.is_open("exp")
        assert await here.broker.wait(60, "next_demand", "p") == 1
        await here.broker.call("publish", "p", 1, stored(1))
        assert (await there.broker.call("claim", "c")).rollout_id == 1
        figures = (await here.broker.call("status", "exp"))["exp"]
        assert (figures["published"], figures["acked"], figures["losses"]) == (2, 1, 0)

    run(test())


def test_who_is_not_heard_after_a_keeper_was_replaced_is_silent_when_its_lease_ends(two, run, uri, loop):
    here, there = two

    async def test() -> None:
        await here.attach("producer", "p", uri, dead_after_s=30.0)
        await there.attach("consumer", "c", uri, dead_after_s=600.0)
        here.sleep()
        for _ in range(40):
            await asyncio.sleep(1)
            with contextlib.suppress(StoreUnreachable):
                await there.broker.call("heartbeat", "c", "waiting")
        producer = (await there.broker.call("status", "exp"))["exp"]["producer"]
        assert (producer["state"], producer["presumed_dead"]) == ("silent", True)
        here.wake()
        await asyncio.sleep(3)
        assert (await here.broker.call("heartbeat", "p", "I have slept, and nobody took my place"))["epoch"] == 2

    run(test())


def test_a_job_that_nobody_works_on_elsewhere_is_handed_on_to_who_needs_it(two, run, uri, loop):
    here, there = two

    async def test() -> None:
        await here.attach("producer", "p", uri)
        await here.attach("consumer", "archive", uri, group="archive")
        await here.broker.call("publish", "p", 0, stored(0))
        with pytest.raises(Refused, match="is kept on another Ray cluster, where the producer of job exp"):
            await there.attach("consumer", "c", uri, one_cluster=True)
        await here.broker.call("end", "p", "stopped")
        began = loop.time()
        await there.attach("consumer", "c", uri, one_cluster=True)
        assert loop.time() - began < 2
        assert there.broker._books.is_open("exp")
        assert (await there.broker.call("claim", "c")).rollout_id == 0
        await there.broker.call("announce", "c", ["a ref"])
        assert (await here.broker.call("claim", "archive")).rollout_id == 0, "who stays follows"
        await here.attach("producer", "p2", uri)

    run(test())


def test_a_keeper_that_others_need_on_their_cluster_is_not_replaced(two, run, uri, loop):
    here, there = two

    async def test() -> None:
        await here.attach("consumer", "c", uri, one_cluster=True, dead_after_s=600.0)
        await there.attach("consumer", "archive", uri, group="archive", dead_after_s=600.0)
        here.sleep()
        with pytest.raises(StoreUnreachable, match="does not answer"):
            await there.broker.call("heartbeat", "archive", "waiting")
        await asyncio.sleep(60)
        assert not there.broker._books.is_open("exp")
        here.wake()
        await there.broker.call("heartbeat", "archive", "waiting")

    run(test())


def test_a_follower_that_was_restarted_is_told_by_its_clients(two, run, uri):
    here, there = two

    async def test() -> None:
        await here.attach("producer", "p", uri)
        await there.attach("consumer", "c", uri)
        there.sleep()
        again = await Cluster("b").start()
        with pytest.raises(Forgotten):
            await again.broker.call("demand", "c", 0)
        await again.broker.follow(client("consumer", "c"), uri)
        await again.broker.call("demand", "c", 0)
        assert await here.broker.call("next_demand", "p") == 0

    run(test())


def test_a_broker_that_lost_its_memory_goes_on_with_its_own_clients(two, run, uri):
    here, _ = two

    async def test() -> None:
        await here.attach("producer", "p", uri)
        await here.broker.call("publish", "p", 0, stored(0))
        here.sleep()
        again = await Cluster("a").start()
        await again.broker.follow(client("producer", "p"), uri)
        await again.broker.call("publish", "p", 1, stored(1))
        assert len(await again.broker.call("catalog", "exp")) == 2

    run(test())


def test_a_client_that_dies_on_its_cluster_is_noticed_by_its_broker(two, run, uri, over):
    here, there = two

    async def test() -> None:
        await here.attach("producer", "p", uri)
        await there.attach("consumer", "c", uri)
        await here.broker.call("publish", "p", 0, stored(0))
        await there.broker.call("claim", "c", 0)
        over["c"] = "its Ray job is FAILED"
        await asyncio.sleep(6)
        assert (await here.broker.call("status", "exp"))["exp"]["consumers"]["train"]["state"] == "dead"

    run(test())


def test_ray_is_not_asked_about_clients_of_other_clusters(two, run, uri, asked):
    here, there = two

    async def test() -> None:
        await here.attach("producer", "p", uri)
        await there.attach("consumer", "c", uri)
        there.sleep()
        await asyncio.sleep(10)
        assert "c" not in asked

    run(test())


def test_what_is_asked_in_a_foreign_way_is_answered_with_an_error(two, run, uri):
    here, _ = two

    async def test() -> None:
        await here.attach("producer", "p", uri)
        mail = Mail(open_store(uri), "exp")
        mail.ask("0000000000001-x", "me", {"method": "explode", "args": [], "kwargs": {}, "wait_s": 0.0})
        mail.ask("0000000000001-y", "me", {"method": "call", "args": ["nonsense"], "kwargs": {}, "wait_s": 0.0})
        open_store(uri).put("exp/mail/question/0000000000001-z.json", b"{ not a letter")
        await asyncio.sleep(3)
        assert {*mail.answers("me")} == {"0000000000001-x", "0000000000001-y"}
        for name in mail.answers("me"):
            with pytest.raises(CrossJobError, match=r"explode|nonsense"):
                mail.take(name, "me")
        assert mail.questions() == []

    run(test())


def test_a_job_that_is_followed_for_nobody_is_forgotten(two, run, uri):
    here, there = two

    async def test() -> None:
        await here.attach("producer", "p", uri)
        await there.attach("consumer", "c", uri)
        await there.broker.call("end", "c", "finished")
        assert there.broker._followers
        here.sleep()
        await asyncio.sleep(130)
        assert not there.broker._followers
        assert not there.broker._books.is_open("exp"), "nobody here needs it"

    run(test())


def test_a_broker_that_was_restarted_while_another_took_its_place_follows(two, vault, run, uri):
    """What its vaults remember of the job is older than what the other has written since."""
    here, there = two

    async def test() -> None:
        await here.attach("producer", "p", uri, dead_after_s=600.0)
        await there.attach("consumer", "c", uri, dead_after_s=600.0)
        await here.broker.vault_here(vault._name, vault._incarnation)
        here.sleep()
        while not there.broker._books.is_open("exp"):
            await asyncio.sleep(1)
        await there.broker.call("demand", "c", 3)
        again = Cluster("a")
        again.broker._books.me, again.broker._books.cluster = "a", "a"
        again.broker._know_the_cluster = lambda: asyncio.sleep(0)
        again.broker._keeper._namespace = "ns"  # where that vault is
        await again.broker.hello()
        assert await again.broker.wait(60, "next_demand", "p") == 3
        assert "exp" not in again.broker._ledger.jobs
        await asyncio.sleep(1)
        assert "exp" not in vault._snapshots, "it is not what holds any more"

    run(test())


def test_an_operator_may_start_anew_on_the_cluster_of_a_follower(two, run, uri):
    """The keeper's cluster is lost, with slime's jobs on it; those of a follower do not wait for its leases."""
    here, there = two

    async def test() -> None:
        await here.attach("producer", "p", uri, one_cluster=True, dead_after_s=600.0)
        await there.attach("consumer", "archive", uri, group="archive", dead_after_s=600.0)
        here.sleep()
        await asyncio.sleep(20)
        assert not there.broker._books.is_open("exp")
        await there.attach("producer", "p2", uri, one_cluster=True)
        assert there.broker._books.is_open("exp")
        assert there.broker._ledger.clients["p"].reason == "its cluster was lost"
        await there.broker.call("heartbeat", "archive", "waiting")

    run(test())


def test_who_takes_over_and_cannot_write_at_first_keeps_the_job_all_the_same(two, run, uri, monkeypatch):
    """Its clients ask it itself from then on, not the mail."""
    here, there = two
    keep, troubles = there.broker._keeper.keep, [StoreUnreachable("away")]

    async def fails_once(job_id: str) -> None:
        if troubles:
            raise troubles.pop()
        await keep(job_id)

    async def test() -> None:
        await here.attach("producer", "p", uri, dead_after_s=600.0)
        await there.attach("consumer", "c", uri, dead_after_s=600.0)
        monkeypatch.setattr(there.broker._keeper, "keep", fails_once)
        here.sleep()
        while not there.broker._books.is_open("exp"):
            await asyncio.sleep(1)
        await asyncio.sleep(1)
        assert troubles == []
        assert not there.broker._followers
        await there.broker.call("demand", "c", 0)

    run(test())
