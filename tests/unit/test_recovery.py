"""Vaults and brokers that die, without a cluster: what is lost is known, and the next broker goes on from there."""

import asyncio
import dataclasses
from typing import Any

import pytest
import ray

from slime.cross_job.broker import replicas as replicas_module
from slime.cross_job.broker.actor import Broker
from slime.cross_job.errors import BadInput, BrokerLost, RolloutNotFound
from slime.cross_job.ledger.state import FAILED
from slime.cross_job.types import BROKER_NAME
from slime.cross_job.vault.actor import Vault
from slime.cross_job.vault.protocol import Target
from tests.support.ray_stand_in import (
    NAMESPACE,
    OTHER,
    VAULT,
    Ref,
    Troubled,
    attach_both,
    batch,
    client,
    from_refs,
    settle,
    unavailable,
)

# ---------------------------------------------------------------------- vaults that die


async def claimed(broker: Broker, vault: Vault) -> Any:
    """Rollout 0 lies in the vault, and the consumer holds it."""
    await attach_both(broker, dead_after_s=1000)
    located = await vault.hand_over(Target("t0", "p", rollout_id=0), from_refs(batch()), 30)
    assert await broker.call("claim", "c", 0) == located
    return located.payload


async def test_what_a_consumer_cannot_read_although_the_vault_has_it_stays_its_own(broker, vault):
    found = await claimed(broker, vault)
    assert await broker.unreadable("c", 0, found.vault, found.token) is False
    assert (await broker.call("claim", "c", 0)).payload == found
    assert await broker.wait(0, "next_demand", "p") is None


@pytest.mark.parametrize("gone", ["vault", "restarted", "dead", "object", "node"])
async def test_what_a_consumer_cannot_read_because_it_is_lost_is_generated_again(broker, vault, ray_stand_in, gone):
    ray_stand_in.actors[OTHER] = Vault(OTHER, NAMESPACE)  # which keeps what becomes of it
    found = await claimed(broker, vault)
    if gone == "vault":
        del ray_stand_in.actors[VAULT]
    elif gone == "restarted":
        ray_stand_in.actors[VAULT] = Vault(VAULT, NAMESPACE)
    elif gone == "dead":
        ray_stand_in.actors[VAULT] = Troubled(check=[ray.exceptions.ActorDiedError()])
    elif gone == "node":  # of which Ray says for a while that its actors are to be restarted
        ray_stand_in.dead_nodes.add(VAULT.rpartition("_")[2])
        ray_stand_in.actors[VAULT] = Troubled(check=[1e6])
    else:
        vault._held["t0"] = [Ref(ray.exceptions.ObjectLostError("ab" * 28, None, ""))]
    assert await broker.unreadable("c", 0, found.vault, found.token) is True
    assert await broker.wait(0, "claim", "c", 0) is None
    assert await broker.wait(0, "next_demand", "p") == 0
    status = (await broker.call("status", "exp"))["exp"]
    assert (status["lost"], status["losses"], status["leased"]) == ([0], 1, 0)


@pytest.mark.parametrize("trouble", [unavailable(), 31.0], ids=["unavailable", "no answer for 30 s"])
async def test_of_a_vault_that_does_not_answer_nobody_says_that_it_lost_anything(
    broker, ray_stand_in, caplog, trouble
):
    ray_stand_in.actors[VAULT] = vault = Troubled(check=[trouble])
    found = await claimed(broker, vault)
    assert await broker.unreadable("c", 0, found.vault, found.token) is False
    assert (await broker.call("claim", "c", 0)).payload == found
    assert "nobody can tell whether it holds rollout 0" in caplog.text


async def test_a_vault_that_comes_back_says_what_is_lost_at_once(broker, vault, loop, caplog):
    await claimed(broker, vault)
    waiting = loop.create_task(broker.wait(60, "next_demand", "p"))
    await broker.call("release", "c", 0)
    await broker.call("demand", "c", 0)
    await broker.vault_here(VAULT, vault._incarnation)  # the same one: nothing is lost
    await settle()
    assert not waiting.done()
    await broker.vault_here(VAULT, "another")
    await broker.call("demand", "c", 0)
    await settle()
    assert await waiting == 0
    assert loop.time() == 1000.0
    assert f"vault {VAULT} died, and with it rollout 0 version 1" in caplog.text


@pytest.mark.parametrize("how", ["restarted", "gone", "its node is dead"])
async def test_the_watch_finds_vaults_that_died_without_a_word(broker, vault, ray_stand_in, how):
    await claimed(broker, vault)
    await asyncio.sleep(20)
    assert (await broker.call("status", "exp"))["exp"]["lost"] == []
    if how == "restarted":
        ray_stand_in.actors[VAULT] = Vault(VAULT, NAMESPACE)
    elif how == "gone":
        del ray_stand_in.actors[VAULT]
    else:
        ray_stand_in.dead_nodes.add(VAULT.rpartition("_")[2])
    await asyncio.sleep(11)
    assert (await broker.call("status", "exp"))["exp"]["lost"] == [0]


# ---------------------------------------------------------------------- a broker that dies


def restarted_broker(ray_stand_in: Any) -> Broker:
    """What Ray makes of a broker that was killed: the same actor, with nothing in its memory."""
    ray_stand_in.actors[BROKER_NAME] = made = Broker(NAMESPACE)
    return made


async def test_a_broker_that_restarts_goes_on_where_it_was(broker, vault, ray_stand_in):
    await broker.vault_here(VAULT, vault._incarnation)
    found = await claimed(broker, vault)
    await vault.hand_over(Target("t1", "p", rollout_id=1), from_refs(batch(5)), 30)
    await vault.hand_over(Target("w7", "c", key="weights", version=7), from_refs(batch()), 30)
    await broker.call("demand", "c", 2)
    before = (await broker.call("status", "exp"))["exp"]
    again = restarted_broker(ray_stand_in)
    after = (await again.call("status", "exp"))["exp"]
    since = ("producer", "consumers", "idle_s", "oldest_queued_s")
    assert after["events"].pop("restarted") == 1
    before, after = ({k: v for k, v in found.items() if k not in since} for found in (before, after))
    assert after == before
    assert (await again.call("claim", "c", 0)).payload == found
    await again.call("ack", "c", 0)
    assert await again.wait(0, "next_demand", "p") == 2
    assert (await again.call("get_value", "exp", "weights")).version == 7
    await settle()
    assert [*vault._held] == ["t1", "w7"]


async def test_what_was_acked_before_the_broker_died_is_freed_by_the_next_one_if_the_vault_was_not_told(
    broker, vault, ray_stand_in
):
    await broker.vault_here(VAULT, vault._incarnation)
    await claimed(broker, vault)
    broker._tell_vaults = lambda: asyncio.sleep(0)  # it dies before it can
    await broker.call("ack", "c", 0)
    again = restarted_broker(ray_stand_in)
    assert "t0" in vault._held
    await again.hello()
    await settle()
    assert "t0" not in vault._held
    with pytest.raises(RolloutNotFound, match="freed"):
        await again.call("claim", "c", 0)


def test_a_broker_begins_only_when_ray_has_told_which_vaults_there_are(broker, run, ray_stand_in, loop, caplog):
    answers = [ray.exceptions.RayError("GCS is away"), ray.exceptions.RayError("GCS is away")]
    named = ray_stand_in.util.list_named_actors

    def list_named_actors(all_namespaces: bool) -> Any:
        if answers:
            raise answers.pop()
        return named(all_namespaces)

    ray_stand_in.util.list_named_actors = list_named_actors
    run(broker.hello())
    assert loop.time() == pytest.approx(1003)
    assert "the broker cannot begin, and tries again" in caplog.text


async def test_a_broker_that_fails_to_begin_once_begins_all_the_same(broker, vault, ray_stand_in, monkeypatch):
    await broker.vault_here(VAULT, vault._incarnation)
    await claimed(broker, vault)
    again = restarted_broker(ray_stand_in)
    know, failures = again._know_the_cluster, [OSError("a full disk"), KeyError("Alive")]

    async def fails() -> None:
        if failures:
            raise failures.pop()
        await know()

    again._know_the_cluster = fails
    assert (await again.call("claim", "c", 0)).rollout_id == 0
    assert await again.starting() is None


async def test_a_broker_that_cannot_begin_says_why_and_goes_on_trying(broker, vault, ray_stand_in, loop):
    broken, know = True, broker._know_the_cluster

    async def fails() -> None:
        if broken:
            raise TypeError("a record of another version")
        await know()

    broker._know_the_cluster = fails
    with pytest.raises(BrokerLost, match="failed 3 times, and tries again: TypeError: a record of another version"):
        await broker.hello()
    found = await broker.starting()
    assert "failed 3 times" in found["message"]
    assert (found["failures"], found["stuck"]) == (3, True)
    broken = False
    await asyncio.sleep(30)
    assert await broker.starting() is None
    await broker.hello()


async def test_a_broker_that_waits_for_a_vault_says_so_and_can_be_told_to_go_on_without_it(
    broker, ray_stand_in, loop, caplog
):
    ray_stand_in.actors[VAULT] = Troubled(hello=[1000.0])
    waiting = loop.create_task(broker.call("status"))
    await asyncio.sleep(40)
    assert not waiting.done()
    found = await broker.starting()
    assert found["waits_for"] == [{"vault": VAULT, "node_id": "1", "silent_s": pytest.approx(40, abs=1)}]
    assert found["since_s"] == pytest.approx(40, abs=1)
    assert found["stuck"]
    for words in (f"{VAULT} on node 1 (silent for 40 s)", "Ray calls it alive", f"give-up {VAULT}"):
        assert words in found["message"]
    with pytest.raises(BadInput, match="does not wait for nobody"):
        await broker.give_up("nobody")
    await broker.give_up(VAULT)
    assert await waiting == {}
    assert await broker.starting() is None
    with pytest.raises(BadInput, match="has begun: it waits for no vault"):
        await broker.give_up(VAULT)
    await asyncio.sleep(1000)  # it answers again
    assert broker._given_up == set()
    assert VAULT in broker._replicas._vaults


async def test_what_is_forgotten_is_forgotten_by_the_vaults_too(broker, vault):
    await broker.vault_here(VAULT, vault._incarnation)
    await claimed(broker, vault)
    for name in ("p", "c"):
        await broker.call("end", name, FAILED)
    assert [*vault._records] == ["t0"]
    await broker.call("forget", "exp")
    await settle()
    assert (vault._records, vault._snapshots) == ({}, {})
    assert await vault.stats() == {"payloads": 0, "nbytes": 0, "behind": 0}


async def test_a_broker_that_begins_with_nothing_is_none_of_before(broker, vault, ray_stand_in, monkeypatch):
    """Vaults that have forgotten every job still know how many brokers there were."""
    exits: list[int] = []
    monkeypatch.setattr(replicas_module.os, "_exit", exits.append)
    await broker.vault_here(VAULT, vault._incarnation)
    await attach_both(broker)
    second = restarted_broker(ray_stand_in)
    for name in ("p", "c"):
        await second.call("end", name, FAILED)
    await second.call("forget", "exp")
    await settle()
    third = restarted_broker(ray_stand_in)
    await attach_both(third)
    assert [found.broker for found, _ in vault._snapshots.values()] == [3]
    assert exits == []


async def test_a_broker_that_lives_on_beside_the_next_one_is_fenced_before_that_has_written(
    broker, vault, ray_stand_in, monkeypatch
):
    class Exited(Exception):
        """Stands in for the end of the broker's process."""

    def exit_now(code: int) -> None:
        raise Exited(code)

    monkeypatch.setattr(replicas_module.os, "_exit", exit_now)
    await broker.vault_here(VAULT, vault._incarnation)
    await claimed(broker, vault)
    await vault.inventory(2, "the next one", "r", 0)  # which reads, and may be waiting for another vault
    with pytest.raises(Exited):
        await broker.call("ack", "c", 0)


async def test_what_a_client_is_told_is_kept_although_its_vault_has_not_introduced_itself(
    broker, ray_stand_in, monkeypatch
):
    late = ray_stand_in.actors[VAULT] = Vault(VAULT, NAMESPACE)
    info = dataclasses.replace(client("producer"), node_id=VAULT.rpartition("_")[2])
    await broker.attach(info, {"dead_after_s": 30.0})
    assert [*late._snapshots] == ["exp"]
    assert (await restarted_broker(ray_stand_in).call("status", "exp"))["exp"]["producer"]["state"] == "live"
