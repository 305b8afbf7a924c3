"""The broker without a cluster: the real class and ledger on stand-ins for Ray and time (ray_stand_in.py)."""

import asyncio
from typing import Any

import pytest
import ray

from slime.cross_job.broker import actor as broker_module
from slime.cross_job.broker.actor import Broker
from slime.cross_job.errors import EndOfStream, Fenced, JobIdTaken, NotOwner, PeerFailed
from slime.cross_job.ledger.operations import Operation
from slime.cross_job.ledger.state import FAILED, FINISHED, LIVE, SILENT
from slime.cross_job.types import PROTOCOL, ClientInfo
from tests.support.ray_stand_in import (
    NAMESPACE,
    OTHER,
    VAULT,
    Troubled,
    attach_both,
    client,
    payload,
    settle,
    unavailable,
)


async def publish_and_ack(broker: Broker, rollout_id: int, vault: str = VAULT) -> None:
    await broker.call("publish", "p", rollout_id, payload(f"t{rollout_id}", vault))
    await broker.call("claim", "c", rollout_id)
    await broker.call("ack", "c", rollout_id)


# ---------------------------------------------------------------------- waiting


async def test_a_wait_ends_at_once_when_what_it_waits_for_comes(broker, loop):
    await attach_both(broker)
    waiting = loop.create_task(broker.wait(60, "claim", "c", 0))
    await settle()
    assert not waiting.done()
    await broker.call("publish", "p", 0, payload("t0"))
    await settle()
    assert waiting.done()
    assert waiting.result().payload.token == "t0"
    assert loop.time() == 1000.0


async def test_a_wait_that_finds_something_does_not_wait(broker, loop):
    await attach_both(broker)
    await broker.call("publish", "p", 0, payload("t0"))
    assert (await broker.wait(0, "claim", "c")).rollout_id == 0
    assert loop.time() == 1000.0


@pytest.mark.parametrize("wait_s", [0, 0.5, 5.25])
async def test_a_wait_ends_with_none_at_its_deadline(broker, loop, wait_s):
    await attach_both(broker)
    assert await broker.wait(wait_s, "claim", "c", 0) is None
    assert loop.time() == pytest.approx(1000.0 + wait_s)


async def test_every_waiter_is_woken_and_those_without_luck_wait_on(broker, loop):
    await attach_both(broker)
    await broker.attach(client("consumer", "c2"), {})
    waiting = [loop.create_task(broker.wait(60, "claim", name)) for name in ("c", "c2")]
    await settle()
    await broker.call("publish", "p", 0, payload("t0"))
    await settle()
    assert [task.done() for task in waiting] == [True, False]
    await broker.call("publish", "p", 1, payload("t1"))
    await settle()
    assert [task.result().rollout_id for task in waiting] == [0, 1]
    assert loop.time() == 1000.0


async def test_a_wait_ends_with_what_the_ledger_raises(broker, loop):
    await attach_both(broker)
    waiting = loop.create_task(broker.wait(60, "claim", "c", 3))
    await settle()
    await broker.call("end", "p", FINISHED)
    with pytest.raises(EndOfStream):
        await waiting
    assert loop.time() == 1000.0


async def test_a_wait_notices_what_changes_with_time_alone(broker, loop):
    await attach_both(broker)
    await broker.call("end", "p", FAILED, "ValueError: boom")
    with pytest.raises(PeerFailed, match="boom"):
        await broker.wait(60, "claim", "c", 3, grace_s=10)
    assert 1010 <= loop.time() <= 1011


async def test_signs_of_life_wake_nobody(broker):
    await attach_both(broker)
    changed = broker._changed
    await broker.call("heartbeat", "p", "at work")
    assert broker._changed is changed
    await broker.call("demand", "c", 0)
    assert broker._changed is not changed
    assert changed.is_set()


@pytest.mark.parametrize("way", ["call", "wait"])
@pytest.mark.parametrize(
    "operation",
    ["nonsense", "attach", "tick", "silent", "note", "take_drops", "_drop", "_owed", "__init__", "jobs"],
)
def test_operations_that_are_not_offered_are_refused(broker, run, way, operation):
    method = broker.call if way == "call" else lambda *args: broker.wait(0, *args)
    with pytest.raises(AttributeError, match=f"the broker has no operation '{operation}'"):
        run(method(operation))


def test_an_operation_is_declared_where_it_is_defined_once(broker):
    ledger = broker._ledger
    assert ledger.operations["claim"] == ledger.leases.claim
    assert ledger.operations["claim"].operation == Operation(changes=True, of_job=False, proxied=False)
    assert ledger.operations["status"].operation == Operation(changes=False, of_job=True, proxied=False)


def test_hello_says_who_is_here(broker, run):
    here = {"protocol": PROTOCOL, "namespace": NAMESPACE, "actor_id": "actor1", "gcs_survives": None}
    assert run(broker.hello()) == here
    watches = {*broker._tasks}
    assert len(watches) == 8
    run(broker.hello())
    assert broker._tasks == watches


# ---------------------------------------------------------------------- who is alive


async def watched(broker: Broker, **dead_after_s: float) -> None:
    """The broker watches these clients, which are named as in tests/support/ledger.py."""
    await broker.hello()
    for name, seconds in dead_after_s.items():
        role = {"p": "producer", "c": "consumer"}[name[0]]
        await broker.attach(client(role, name), {"dead_after_s": seconds})


async def test_a_second_producer_is_refused_only_after_ray_was_asked_about_the_first(broker, asked):
    await broker.attach(client("producer", "p1"), {})
    assert asked == []
    with pytest.raises(JobIdTaken, match="is alive"):
        await broker.attach(client("producer", "p2"), {})
    assert asked == ["p1"]
    await broker.call("heartbeat", "p1", "still here")


async def test_a_second_producer_takes_the_place_of_one_that_ray_calls_over_also_with_another_setting(broker, over):
    over["p1"] = "its Ray job is FAILED"
    await broker.attach(client("producer", "p1"), {"max_ahead": 1})
    granted = await broker.attach(client("producer", "p2"), {"max_ahead": 2})
    assert (granted["epoch"], granted["max_ahead"]) == (2, 2)
    with pytest.raises(Fenced, match="its Ray job is FAILED"):
        await broker.call("heartbeat", "p1", "I was only asleep")


async def test_the_watch_asks_ray_about_silent_clients_and_wakes_who_waits_for_them(broker, over, asked, loop):
    await broker.hello()
    await attach_both(broker)
    over["p"] = "its Ray job is STOPPED"
    with pytest.raises(PeerFailed, match="its Ray job is STOPPED") as raised:
        await broker.wait(60, "claim", "c", 0)
    assert raised.value.verdict["kind"] == "dead"
    assert "p" in asked
    assert 1002 < loop.time() <= 1006


async def test_the_watch_does_not_ask_about_clients_that_speak(broker, asked):
    await broker.hello()
    await attach_both(broker)
    for _ in range(20):
        await asyncio.sleep(1)
        for name in ("p", "c"):
            await broker.call("heartbeat", name, "at work")
    assert asked == []


async def test_the_watch_outlives_what_ray_throws(broker, monkeypatch, caplog):
    def broken(info: ClientInfo, silent_s: float) -> str | None:
        raise RuntimeError("dashboard on fire")

    await watched(broker, p=30)
    monkeypatch.setattr(broker_module, "over_reason", broken)
    await asyncio.sleep(20)
    assert "dashboard on fire" in caplog.text
    await asyncio.sleep(20)
    assert broker._ledger.clients["p"].state == SILENT


async def test_a_lease_ends_on_time_though_ray_does_not_answer(broker, monkeypatch, asked, loop):
    async def hangs(function: Any, info: ClientInfo, *args: Any) -> Any:
        asked.append(info.client_id)
        await asyncio.sleep(10_000)

    monkeypatch.setattr(broker_module, "ask_ray", hangs)
    await watched(broker, **dict.fromkeys(("c0", "c1", "c2", "c3", "c4", "p"), 30))
    await asyncio.sleep(29.5)
    assert {one.state for one in broker._ledger.clients.values()} == {LIVE}
    await asyncio.sleep(1.5)
    assert {one.state for one in broker._ledger.clients.values()} == {SILENT}
    assert loop.time() <= 1031.5
    assert {*asked[:6]} == {*broker._ledger.clients}, "all are asked about at once"


async def test_only_the_time_that_the_broker_itself_stood_still_is_forgiven(broker, loop, caplog):
    await watched(broker, p=30)
    await asyncio.sleep(20)
    loop.now += 100  # as if this process had been stopped
    await asyncio.sleep(9)
    assert broker._ledger.clients["p"].state == LIVE
    await asyncio.sleep(2)
    assert broker._ledger.clients["p"].state == SILENT
    assert "this broker stood still for" in caplog.text


async def test_a_peer_that_ray_calls_alive_is_waited_for_and_goes_on_when_it_wakes(broker, over):
    over["p"] = ""
    await watched(broker, p=10, c=100)
    assert await broker.wait(60, "claim", "c", 0) is None
    found = await broker.call("peer_verdict", "c")
    assert found["kind"] == "silent"
    assert "silent, not dead: no sign of life for 60" in found["message"]
    assert (await broker.call("heartbeat", "p", "awake"))["epoch"] == 2
    await broker.call("publish", "p", 0, payload("t0"))
    assert (await broker.call("claim", "c", 0)).epoch == 2


@pytest.mark.parametrize("waits", [False, True])
async def test_who_wakes_up_with_a_claim_is_heard_before_others_may_take_what_it_holds(broker, over, waits):
    over.update(c="", c2="")
    await watched(broker, p=1000, c=10, c2=1000)
    await asyncio.sleep(12)
    assert broker._ledger.clients["c"].state == SILENT
    await broker.call("publish", "p", 0, payload("t0"))
    claim = broker.wait(10, "claim", "c", 0) if waits else broker.call("claim", "c", 0)
    assert (await claim).rollout_id == 0
    assert broker._ledger.clients["c"].state == LIVE
    assert await broker.call("claim", "c2", 0) is None
    await broker.call("ack", "c", 0)


async def test_that_somebody_woke_up_is_kept_whatever_it_asked_for(broker, over):
    over["c"] = ""
    await watched(broker, c=10)
    await asyncio.sleep(12)
    before = broker._ledger.jobs["exp"].revision
    with pytest.raises(NotOwner):
        await broker.call("ack", "c", 0)
    assert broker._ledger.jobs["exp"].revision == before + 1
    assert (await broker.call("heartbeat", "c", "awake"))["epoch"] == 2


async def test_who_falls_silent_while_it_waits_is_not_heard_by_what_the_broker_asks_itself(broker, over):
    over["c"] = ""
    await watched(broker, p=1000, c=10)
    assert await broker.wait(20, "claim", "c", 0) is None
    await broker.call("publish", "p", 0, payload("t0"))
    assert broker._ledger.clients["c"].state == SILENT


async def test_a_peer_of_whom_nobody_can_tell_counts_as_dead_and_may_still_wake_up(broker, loop):
    await watched(broker, p=10, c=100)
    words = r"no sign of life for 1\d\.\d s, and Ray cannot tell whether it lives"
    with pytest.raises(PeerFailed, match=words) as raised:
        await broker.wait(60, "claim", "c", 0)
    assert raised.value.verdict["kind"] == "dead"
    assert 1010 <= loop.time() <= 1012
    assert (await broker.call("heartbeat", "p", "awake"))["epoch"] == 2
    assert await broker.wait(1, "claim", "c", 0) is None


async def test_a_producer_that_was_replaced_in_its_silence_is_fenced_when_it_wakes(broker, over):
    over["p1"] = ""
    await watched(broker, p1=10)
    with pytest.raises(JobIdTaken):
        await broker.attach(client("producer", "p2"), {})
    await asyncio.sleep(11)
    assert (await broker.attach(client("producer", "p2"), {}))["epoch"] == 2
    with pytest.raises(Fenced, match=r"replaced by a newer producer after 11.* s without a sign of life"):
        await broker.call("heartbeat", "p1", "awake")


async def test_of_a_process_that_is_gone_it_is_said_how_its_job_ended_once_ray_knows(broker, over, monkeypatch):
    words = iter([("RUNNING", "its Ray job is RUNNING"), ("FAILED", "its Ray job is FAILED (boom | exit 1)")])
    monkeypatch.setattr(broker_module, "job_words", lambda ray_job_id: next(words))
    await attach_both(broker)
    over["p"] = "its actor a1 died; its Ray job is RUNNING"
    await asyncio.sleep(8)
    found = await broker.call("peer_verdict", "c")
    assert found["reason"] == "its actor a1 died; its Ray job is FAILED (boom | exit 1)"


async def test_a_verdict_on_who_lives_says_how_its_job_stands(broker, monkeypatch):
    monkeypatch.setattr(broker_module, "job_words", lambda ray_job_id: ("RUNNING", f"its Ray job is {ray_job_id}"))
    await attach_both(broker)
    assert (await broker.call("peer_verdict", "c"))["message"].endswith("; its Ray job is r-p")


# ---------------------------------------------------------------------- what vaults are told


@pytest.fixture
def two_vaults(ray_stand_in) -> tuple[Troubled, Troubled]:
    vaults = Troubled(VAULT, drop=[]), Troubled(OTHER, drop=[])
    ray_stand_in.actors |= dict(zip((VAULT, OTHER), vaults))
    return vaults


async def test_the_end_of_a_client_that_nobody_remembers_is_no_error(broker):
    await broker.call("end", "of another life", "failed")


async def test_vaults_are_told_at_once_what_they_may_free(broker, two_vaults, ray_stand_in):
    await attach_both(broker)
    await publish_and_ack(broker, 0, f"{VAULT}/incarnation")
    await publish_and_ack(broker, 1, OTHER)
    await settle()
    assert [vault.told("drop") for vault in two_vaults] == [[["t0"]], [["t1"]]]
    assert (VAULT, NAMESPACE) in ray_stand_in.asked
    assert broker._drops == {}


@pytest.mark.parametrize("trouble", [unavailable(), 31.0], ids=["unavailable", "no answer for 30 s"])
async def test_a_vault_that_does_not_answer_is_told_later(broker, ray_stand_in, caplog, trouble):
    ray_stand_in.actors |= {VAULT: (one := Troubled(VAULT, drop=[trouble])), OTHER: (two := Troubled(OTHER, drop=[]))}
    await attach_both(broker, dead_after_s=1000)
    await publish_and_ack(broker, 0, f"{VAULT}/{one._incarnation}")
    await asyncio.sleep(30.5)
    await publish_and_ack(broker, 1, f"{OTHER}/{two._incarnation}")
    await asyncio.sleep(5)
    assert one.told("drop")[-1] == ["t0"]
    assert two.told("drop") == [["t1"]]
    assert f"vault {VAULT} is silent" in caplog.text
    assert broker._drops == {}


@pytest.mark.parametrize("died", [True, False], ids=["died", "no such actor"])
async def test_what_a_vault_that_is_gone_held_is_forgotten(broker, ray_stand_in, died):
    if died:
        ray_stand_in.actors[VAULT] = Troubled(VAULT, drop=[ray.exceptions.ActorDiedError()])
    await attach_both(broker)
    await publish_and_ack(broker, 0)
    await settle()
    assert broker._drops == {}


# ---------------------------------------------------------------------- going back to a checkpoint


async def test_a_consumer_resumes_in_place_of_one_that_ray_calls_over(broker, over, asked):
    await attach_both(broker)
    await broker.attach(client("consumer", "c2"), {})
    await broker.attach(client("consumer", "bystander", group="archive"), {})
    with pytest.raises(JobIdTaken, match="is alive"):
        await broker.call("resume", "c2", 0)
    over["c"] = "its Ray job is FAILED"
    assert await broker.call("resume", "c2", 0) == {"again": [], "acked": []}
    with pytest.raises(Fenced, match="its Ray job is FAILED"):
        await broker.call("heartbeat", "c", "I was only asleep")
    await broker.call("heartbeat", "bystander", "here")
    assert asked == ["c", "c"]


@pytest.mark.parametrize(
    ("reason", "crashes"),
    [
        ("its process 7 on host died", {4: 1}),
        ("its actor a died; its Ray job is FAILED (CUDA error)", {4: 1}),
        ("its actor a died; its Ray job is STOPPED", {}),
        ("its node n1 (host) died; its actor a died; its Ray job is FAILED", {}),
    ],
)
def test_a_train_job_that_ray_calls_over_crashed_unless_its_node_died_or_it_was_stopped(
    broker, run, over, reason, crashes
):
    run(attach_both(broker))
    run(broker.call("training", "c", 4))
    over["c"] = reason
    run(asyncio.sleep(60))
    assert broker._ledger.clients["c"].reason.startswith(reason)
    assert broker._ledger.jobs["exp"].crashes == crashes


def test_what_is_trained_on_agreed_and_set_aside_is_in_a_vault_before_the_answer(broker, vault, run):
    run(broker.vault_here(VAULT, vault._incarnation))
    run(attach_both(broker))
    run(broker.call("training", "c", 4))
    kept = vault._snapshots["exp"][0]
    assert [client.training for client in kept.clients if client.info.client_id == "c"] == [4]
    run(broker.call("agree", "c", "wandb run id", "abc"))
    assert vault._snapshots["exp"][0].job.agreed == {"wandb run id": "abc"}
    run(broker.call("set_aside", "p", 5, "an object"))
    assert [*vault._snapshots["exp"][0].job.dead_letters] == [5]
