"""The broker without a cluster: the real class and ledger on stand-ins for Ray and time (ray_stand_in.py)."""

import asyncio
from typing import Any

import pytest
import ray

from slime.cross_job import broker as broker_module
from slime.cross_job.broker import Broker
from slime.cross_job.errors import EndOfStream, Fenced, JobIdTaken, NotOwner, PeerFailed
from slime.cross_job.records import FAILED, FINISHED, LIVE, SILENT
from slime.cross_job.types import PROTOCOL, ClientInfo

from .ray_stand_in import (
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


def test_a_wait_ends_at_once_when_what_it_waits_for_comes(broker, run, loop):
    async def test() -> None:
        await attach_both(broker)
        waiting = loop.create_task(broker.wait(60, "claim", "c", 0))
        await settle()
        assert not waiting.done()
        await broker.call("publish", "p", 0, payload("t0"))
        await settle()
        assert waiting.done()
        assert waiting.result().payload.token == "t0"

    before = loop.time()
    run(test())
    assert loop.time() == before


def test_a_wait_that_finds_something_does_not_wait(broker, run, loop):
    async def test() -> Any:
        await attach_both(broker)
        await broker.call("publish", "p", 0, payload("t0"))
        return await broker.wait(0, "claim", "c")

    assert run(test()).rollout_id == 0
    assert loop.time() == 1000.0


@pytest.mark.parametrize("wait_s", [0, 0.5, 5.25])
def test_a_wait_ends_with_none_at_its_deadline(broker, run, loop, wait_s):
    async def test() -> Any:
        await attach_both(broker)
        return await broker.wait(wait_s, "claim", "c", 0)

    assert run(test()) is None
    assert loop.time() == pytest.approx(1000.0 + wait_s)


def test_every_waiter_is_woken_and_those_without_luck_wait_on(broker, run, loop):
    async def test() -> None:
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

    run(test())
    assert loop.time() == 1000.0


def test_a_wait_ends_with_what_the_ledger_raises(broker, run, loop):
    async def test() -> None:
        await attach_both(broker)
        waiting = loop.create_task(broker.wait(60, "claim", "c", 3))
        await settle()
        await broker.call("end", "p", FINISHED)
        with pytest.raises(EndOfStream):
            await waiting

    run(test())
    assert loop.time() == 1000.0


def test_a_wait_notices_what_changes_with_time_alone(broker, run, loop):
    async def test() -> None:
        await attach_both(broker)
        await broker.call("end", "p", FAILED, "ValueError: boom")
        with pytest.raises(PeerFailed, match="boom"):
            await broker.wait(60, "claim", "c", 3, grace_s=10)

    run(test())
    assert 1010 <= loop.time() <= 1011


def test_signs_of_life_wake_nobody(broker, run):
    async def test() -> None:
        await attach_both(broker)
        changed = broker._changed
        await broker.call("heartbeat", "p", "at work")
        assert broker._changed is changed
        await broker.call("demand", "c", 0)
        assert broker._changed is not changed
        assert changed.is_set()

    run(test())


@pytest.mark.parametrize("way", ["call", "wait"])
@pytest.mark.parametrize(
    "operation", ["nonsense", "attach", "tick", "silent", "take_drops", "_drop", "__init__", "jobs"]
)
def test_operations_that_are_not_offered_are_refused(broker, run, way, operation):
    method = broker.call if way == "call" else lambda *args: broker.wait(0, *args)
    with pytest.raises(AttributeError, match="no operation"):
        run(method(operation))


def test_what_is_offered_exists_and_either_changes_something_or_does_not(broker):
    for operation in broker_module._READS | broker_module._WRITES:
        assert callable(getattr(broker._ledger, operation))
        assert not operation.startswith("_")
    assert not broker_module._READS & broker_module._WRITES
    assert broker_module._OF_A_JOB <= broker_module._WRITES


def test_hello_says_who_is_here(broker, run):
    here = {"protocol": PROTOCOL, "namespace": NAMESPACE, "actor_id": "actor1"}
    here |= {"loop_lag_s": 0.0, "gcs_survives": None}
    assert run(broker.hello()) == here
    watches = {*broker._tasks}
    assert len(watches) == 10
    run(broker.hello())
    assert broker._tasks == watches


# ---------------------------------------------------------------------- who is alive


def test_a_second_producer_is_refused_only_after_ray_was_asked_about_the_first(broker, run, asked):
    async def test() -> None:
        await broker.attach(client("producer", "p1"), {})
        assert asked == []
        with pytest.raises(JobIdTaken, match="is alive"):
            await broker.attach(client("producer", "p2"), {})
        assert asked == ["p1"]
        await broker.call("heartbeat", "p1", "still here")

    run(test())


def test_a_second_producer_takes_the_place_of_one_that_ray_calls_over(broker, run, over):
    over["p1"] = "its Ray job is FAILED"

    async def test() -> None:
        await broker.attach(client("producer", "p1"), {})
        granted = await broker.attach(client("producer", "p2"), {"max_ahead": 2})
        assert (granted["epoch"], granted["max_ahead"]) == (2, 2)
        with pytest.raises(Fenced, match="its Ray job is FAILED"):
            await broker.call("heartbeat", "p1", "I was only asleep")

    run(test())


def test_a_restart_with_another_setting_is_not_refused_for_the_sake_of_a_dead_producer(broker, run, over):
    over["p1"] = "its Ray job is FAILED"

    async def test() -> None:
        await broker.attach(client("producer", "p1"), {"max_ahead": 1})
        assert (await broker.attach(client("producer", "p2"), {"max_ahead": 2}))["max_ahead"] == 2

    run(test())


def test_the_watch_asks_ray_about_silent_clients_and_wakes_who_waits_for_them(broker, run, over, asked, loop):
    async def test() -> None:
        await broker.hello()
        await attach_both(broker)
        over["p"] = "its Ray job is STOPPED"
        with pytest.raises(PeerFailed, match="its Ray job is STOPPED") as raised:
            await broker.wait(60, "claim", "c", 0)
        assert raised.value.verdict["kind"] == "dead"

    run(test())
    assert "p" in asked
    assert 1002 < loop.time() <= 1006


def test_the_watch_does_not_ask_about_clients_that_speak(broker, run, asked, loop):
    async def test() -> None:
        await broker.hello()
        await attach_both(broker)
        for _ in range(20):
            await asyncio.sleep(1)
            for name in ("p", "c"):
                await broker.call("heartbeat", name, "at work")

    run(test())
    assert asked == []


def test_the_watch_ends_who_is_silent_too_long_even_if_ray_knows_nothing(broker, run, loop):
    async def test() -> None:
        await broker.hello()
        await broker.attach(client("producer"), {"dead_after_s": 10})
        await broker.attach(client("consumer"), {"dead_after_s": 100})
        with pytest.raises(PeerFailed, match=r"no sign of life for 1\d\.\d s"):
            await broker.wait(60, "claim", "c", 0)

    run(test())
    assert 1010 <= loop.time() <= 1012


def test_the_watch_outlives_what_ray_throws(broker, run, monkeypatch, caplog, loop):
    def broken(info: ClientInfo, silent_s: float) -> str | None:
        raise RuntimeError("dashboard on fire")

    async def test() -> None:
        await broker.hello()
        await broker.attach(client("producer"), {"dead_after_s": 30})
        monkeypatch.setattr(broker_module, "over_reason", broken)
        await asyncio.sleep(20)
        assert "dashboard on fire" in caplog.text
        await asyncio.sleep(20)
        assert broker._ledger.clients["p"].state == SILENT

    run(test())


def test_a_lease_ends_on_time_though_ray_does_not_answer(broker, run, monkeypatch, asked, loop):
    async def hangs(function: Any, info: ClientInfo, *args: Any) -> Any:
        asked.append(info.client_id)
        await asyncio.sleep(10_000)

    monkeypatch.setattr(broker_module, "ask_ray", hangs)

    async def test() -> None:
        await broker.hello()
        for number in range(5):
            await broker.attach(client("consumer", f"c{number}"), {"dead_after_s": 30})
        await broker.attach(client("producer"), {"dead_after_s": 30})
        await asyncio.sleep(29.5)
        assert {one.state for one in broker._ledger.clients.values()} == {LIVE}
        await asyncio.sleep(1.5)
        assert {one.state for one in broker._ledger.clients.values()} == {SILENT}
        assert loop.time() <= 1031.5

    run(test())
    assert {*asked[:6]} == {"p", *(f"c{number}" for number in range(5))}, "all are asked about at once"


def test_only_the_time_that_the_broker_itself_stood_still_is_forgiven(broker, run, loop, caplog):
    async def test() -> None:
        await broker.hello()
        await broker.attach(client("producer"), {"dead_after_s": 30})
        await asyncio.sleep(20)
        loop.now += 100  # as if this process had been stopped
        await asyncio.sleep(9)
        assert broker._ledger.clients["p"].state == LIVE
        assert (await broker.hello())["loop_lag_s"] == pytest.approx(100, abs=1)
        await asyncio.sleep(2)
        assert broker._ledger.clients["p"].state == SILENT

    run(test())
    assert "this broker stood still for" in caplog.text


def test_a_peer_that_ray_calls_alive_is_waited_for_and_goes_on_when_it_wakes(broker, run, over, loop):
    over["p"] = ""

    async def test() -> None:
        await broker.hello()
        await broker.attach(client("producer"), {"dead_after_s": 10})
        await broker.attach(client("consumer"), {"dead_after_s": 100})
        assert await broker.wait(60, "claim", "c", 0) is None
        found = await broker.call("peer_verdict", "c")
        assert found["kind"] == "silent"
        assert "silent, not dead: no sign of life for 60" in found["message"]
        assert (await broker.call("heartbeat", "p", "awake"))["epoch"] == 2
        await broker.call("publish", "p", 0, payload("t0"))
        assert (await broker.call("claim", "c", 0)).epoch == 2

    run(test())


@pytest.mark.parametrize("waits", [False, True])
def test_who_wakes_up_with_a_claim_is_heard_before_others_may_take_what_it_holds(broker, run, over, waits):
    over.update(c="", c2="")

    async def test() -> None:
        await broker.hello()
        await broker.attach(client("producer"), {"dead_after_s": 1000})
        await broker.attach(client("consumer"), {"dead_after_s": 10})
        await broker.attach(client("consumer", "c2"), {"dead_after_s": 1000})
        await asyncio.sleep(12)
        assert broker._ledger.clients["c"].state == SILENT
        await broker.call("publish", "p", 0, payload("t0"))
        claim = broker.wait(10, "claim", "c", 0) if waits else broker.call("claim", "c", 0)
        assert (await claim).rollout_id == 0
        assert broker._ledger.clients["c"].state == LIVE
        assert await broker.call("claim", "c2", 0) is None
        await broker.call("ack", "c", 0)

    run(test())


def test_that_somebody_woke_up_is_kept_whatever_it_asked_for(broker, run, over):
    over["c"] = ""

    async def test() -> None:
        await broker.hello()
        await broker.attach(client("consumer"), {"dead_after_s": 10})
        await asyncio.sleep(12)
        before = broker._ledger.jobs["exp"].revision
        with pytest.raises(NotOwner):
            await broker.call("ack", "c", 0)
        assert broker._ledger.jobs["exp"].revision == before + 1
        assert (await broker.call("heartbeat", "c", "awake"))["epoch"] == 2

    run(test())


def test_who_falls_silent_while_it_waits_is_not_heard_by_what_the_broker_asks_itself(broker, run, over):
    over["c"] = ""

    async def test() -> None:
        await broker.hello()
        await broker.attach(client("producer"), {"dead_after_s": 1000})
        await broker.attach(client("consumer"), {"dead_after_s": 10})
        assert await broker.wait(20, "claim", "c", 0) is None
        await broker.call("publish", "p", 0, payload("t0"))
        assert broker._ledger.clients["c"].state == SILENT

    run(test())


def test_a_peer_of_whom_nobody_can_tell_counts_as_dead_and_may_still_wake_up(broker, run, loop):
    async def test() -> None:
        await broker.hello()
        await broker.attach(client("producer"), {"dead_after_s": 10})
        await broker.attach(client("consumer"), {"dead_after_s": 100})
        with pytest.raises(PeerFailed, match="Ray cannot tell whether it lives") as raised:
            await broker.wait(60, "claim", "c", 0)
        assert raised.value.verdict["kind"] == "dead"
        assert (await broker.call("heartbeat", "p", "awake"))["epoch"] == 2
        assert await broker.wait(1, "claim", "c", 0) is None

    run(test())


def test_a_producer_that_was_replaced_in_its_silence_is_fenced_when_it_wakes(broker, run, over, loop):
    over["p1"] = ""

    async def test() -> None:
        await broker.hello()
        await broker.attach(client("producer", "p1"), {"dead_after_s": 10})
        with pytest.raises(JobIdTaken):
            await broker.attach(client("producer", "p2"), {})
        await asyncio.sleep(11)
        assert (await broker.attach(client("producer", "p2"), {}))["epoch"] == 2
        with pytest.raises(Fenced, match=r"replaced by a newer producer after 11.* s without a sign of life"):
            await broker.call("heartbeat", "p1", "awake")

    run(test())


def test_of_a_process_that_is_gone_it_is_said_how_its_job_ended_once_ray_knows(broker, run, over, monkeypatch):
    words = iter([("RUNNING", "its Ray job is RUNNING"), ("FAILED", "its Ray job is FAILED (boom | exit 1)")])
    monkeypatch.setattr(broker_module, "job_words", lambda ray_job_id: next(words))

    async def test() -> None:
        await attach_both(broker)
        over["p"] = "its actor a1 died; its Ray job is RUNNING"
        await asyncio.sleep(8)
        found = await broker.call("peer_verdict", "c")
        assert found["reason"] == "its actor a1 died; its Ray job is FAILED (boom | exit 1)"

    run(test())


def test_a_verdict_on_who_lives_says_how_its_job_stands(broker, run, monkeypatch):
    monkeypatch.setattr(broker_module, "job_words", lambda ray_job_id: ("RUNNING", f"its Ray job is {ray_job_id}"))

    async def test() -> None:
        await attach_both(broker)
        assert (await broker.call("peer_verdict", "c"))["message"].endswith("; its Ray job is r-p")

    run(test())


# ---------------------------------------------------------------------- what vaults are told


@pytest.fixture
def two_vaults(ray_stand_in) -> tuple[Troubled, Troubled]:
    vaults = Troubled(VAULT, drop=[]), Troubled(OTHER, drop=[])
    ray_stand_in.actors |= dict(zip((VAULT, OTHER), vaults))
    return vaults


def test_the_end_of_a_client_that_nobody_remembers_is_no_error(broker, run):
    run(broker.call("end", "of another life", "failed"))


def test_vaults_are_told_at_once_what_they_may_free(broker, run, two_vaults, ray_stand_in):
    async def test() -> None:
        await attach_both(broker)
        await publish_and_ack(broker, 0, f"{VAULT}/incarnation")
        await publish_and_ack(broker, 1, OTHER)
        await settle()

    run(test())
    assert [vault.told("drop") for vault in two_vaults] == [[["t0"]], [["t1"]]]
    assert (VAULT, NAMESPACE) in ray_stand_in.asked
    assert broker._drops == {}


@pytest.mark.parametrize("trouble", [unavailable(), 31.0], ids=["unavailable", "no answer for 30 s"])
def test_a_vault_that_does_not_answer_is_told_later(broker, run, ray_stand_in, caplog, trouble):
    ray_stand_in.actors |= {VAULT: (one := Troubled(VAULT, drop=[trouble])), OTHER: (two := Troubled(OTHER, drop=[]))}

    async def test() -> None:
        await attach_both(broker, dead_after_s=1000)
        await publish_and_ack(broker, 0, f"{VAULT}/{one._incarnation}")
        await asyncio.sleep(30.5)
        await publish_and_ack(broker, 1, f"{OTHER}/{two._incarnation}")
        await asyncio.sleep(5)

    run(test())
    assert one.told("drop")[-1] == ["t0"]
    assert two.told("drop") == [["t1"]]
    assert f"vault {VAULT} is silent" in caplog.text
    assert broker._drops == {}


@pytest.mark.parametrize("died", [True, False], ids=["died", "no such actor"])
def test_what_a_vault_that_is_gone_held_is_forgotten(broker, run, ray_stand_in, died):
    if died:
        ray_stand_in.actors[VAULT] = Troubled(VAULT, drop=[ray.exceptions.ActorDiedError()])

    async def test() -> None:
        await attach_both(broker)
        await publish_and_ack(broker, 0)
        await settle()

    run(test())
    assert broker._drops == {}


# ---------------------------------------------------------------------- going back to a checkpoint


def test_a_consumer_resumes_in_place_of_one_that_ray_calls_over(broker, run, over, asked):
    async def test() -> None:
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

    run(test())
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
