"""What a vault keeps for a broker that restarts: snapshots of jobs, their tables, the records of payloads."""

import asyncio
import gc
import uuid
import weakref
from typing import Any

import numpy as np
import pytest
import ray

from slime.cross_job.errors import CrossJobError, Fenced, PayloadLost, Refused, StoreFull
from slime.cross_job.ledger.snapshot import Snapshot, gathered
from slime.cross_job.ledger.state import Job
from slime.cross_job.ledger.tables import Change
from slime.cross_job.types import Payload
from slime.cross_job.vault.actor import Vault
from slime.cross_job.vault.protocol import Durably, FromMethod, FromRefs, Target
from tests.support.ray_stand_in import VAULT, Actor, Ref, attach_both, batch, from_refs, payload


def snapshot_of(job_id: str, broker: int, serial: int) -> Snapshot:
    return Snapshot(broker, serial, Job(job_id), [])


def kept(vault: Vault) -> list[tuple[str, int, int, list[int]]]:
    """(job, broker, serial, positions of its sources) of each snapshot."""
    return [(s.job.job_id, s.broker, s.serial, [*tables["sources"]]) for s, tables in vault._snapshots.values()]


async def inventory(vault: Vault, broker: int) -> Any:
    """(snapshots with their tables, records), as a broker of this number reads them."""
    page = await vault.inventory(broker, "", f"{uuid.uuid4()}", 0)
    assert page.left == 0
    return gathered(page.items)


async def test_a_vault_keeps_the_newest_snapshot_of_each_job(vault):
    for found in (snapshot_of("a", 1, 5), snapshot_of("a", 1, 4), snapshot_of("b", 1, 6), snapshot_of("b", 1, 7)):
        assert await vault.remember(found, {}, None)
    assert kept(vault) == [("a", 1, 5, []), ("b", 1, 7, [])]
    assert [found.order for found, _ in (await inventory(vault, 2))[0]] == [(1, 5), (1, 7)]
    assert await vault.remember(snapshot_of("a", 2, 1), {}, None)
    assert kept(vault) == [("a", 2, 1, []), ("b", 1, 7, [])]
    await vault.forget("a")
    await vault.forget("never known")
    assert kept(vault) == [("b", 1, 7, [])]
    assert [*vault._since] == ["b"]


async def test_a_vault_adds_up_the_sources_of_a_job(vault):
    def sources(whole: bool, over: list[int], **new: Payload) -> dict[str, Change[Payload]]:
        return {"sources": Change(whole, over, {int(n[1:]): found for n, found in new.items()})}

    found = [payload(f"t{n}") for n in range(4)]
    assert await vault.remember(snapshot_of("a", 1, 1), sources(True, [], n0=found[0], n1=found[1]), None)
    assert await vault.remember(snapshot_of("b", 1, 2), sources(True, [], n7=found[3]), None)
    assert await vault.remember(snapshot_of("a", 1, 3), sources(False, [0, 5], n1=found[2]), (1, 1))
    assert kept(vault) == [("a", 1, 3, [1]), ("b", 1, 2, [7])]
    assert vault._snapshots["a"][1]["sources"][1] is found[2]
    assert await vault.remember(snapshot_of("a", 1, 2), sources(False, [1]), (1, 1)), "late, and nothing new"
    assert kept(vault)[0] == ("a", 1, 3, [1])
    assert await vault.remember(snapshot_of("a", 1, 4), sources(True, [], n9=found[0]), None)
    assert kept(vault)[0] == ("a", 1, 4, [9])


async def test_a_vault_that_lacks_what_changes_build_on_says_so_and_keeps_nothing(vault):
    assert not await vault.remember(snapshot_of("a", 1, 2), {"sources": Change(False, [0], {})}, (1, 1))
    assert kept(vault) == []
    assert await vault.remember(snapshot_of("a", 1, 3), {"sources": Change(True, [], {0: payload("t")})}, None)
    assert not await vault.remember(snapshot_of("a", 1, 5), {"sources": Change(False, [0], {})}, (1, 4))
    assert kept(vault) == [("a", 1, 3, [0])]


async def test_a_broker_that_was_replaced_is_told_so(vault):
    assert await vault.remember(snapshot_of("a", 2, 1), {}, None)
    for job_id in ("a", "b"):
        with pytest.raises(Fenced, match="broker 1 was replaced by broker 2"):
            await vault.remember(snapshot_of(job_id, 1, 99), {}, None)
    assert kept(vault) == [("a", 2, 1, [])]


async def test_an_order_of_a_broker_that_has_not_read_the_vault_is_refused_not_passed_over(vault):
    """Whatever its number: it does not know what it would overwrite."""
    assert await vault.remember(snapshot_of("a", 1, 50), {}, None)
    assert await vault.remember(snapshot_of("a", 1, 50), {}, None), "the same again, whose answer was lost"
    older, newer = (Snapshot(1, serial, Job("a"), [], "another process") for serial in (3, 99))
    higher = Snapshot(9, 1, Job("a"), [], "another process")
    for found, number in ((older, 1), (newer, 1), (higher, 9)):
        with pytest.raises(Fenced, match=f"broker {number} was replaced by broker 1, says vault {VAULT}"):
            await vault.remember(found, {}, None)
    with pytest.raises(Fenced):
        await vault.inventory(1, "another process", "r", 0)
    assert kept(vault) == [("a", 1, 50, [])]
    assert await vault.inventory(9, "another process", "r", 0)
    assert await vault.remember(higher, {}, None)
    assert kept(vault) == [("a", 9, 1, [])]


async def test_what_a_broker_that_was_replaced_meanwhile_answered_is_asked_of_the_next_one(vault, broker):
    """Its answer came late, as to a vault that was stopped: the next one has read that nothing of it is here."""
    await attach_both(broker)
    broker._replicas.keep = lambda job_id: asyncio.sleep(0)  # it stands for both of them
    call, asked = broker.call, []

    async def answered(operation: str, *args: Any, **kwargs: Any) -> Any:
        answer = await call(operation, *args, **kwargs)
        asked.append(operation)
        if len(asked) == 1:
            await vault.inventory(vault._broker[0] + 1, "the next one", "r", 0)
        return answer

    broker.call = answered
    located = await vault.hand_over(Target("t0", "p", rollout_id=0), from_refs(batch()), 30)
    await asyncio.sleep(0)
    assert asked == ["publish", "publish"]
    assert [*vault._records.values()] == [located]


async def test_a_vault_remembers_what_it_holds_as_the_broker_recorded_it(vault, broker):
    await attach_both(broker)
    first = await vault.hand_over(Target("t0", "p", rollout_id=0), from_refs(batch()), 30)
    value = await vault.hand_over(Target("w3", "c", key="weights", version=3), from_refs(batch()), 30)
    await vault.hand_over(Target("same", "p", rollout_id=0), from_refs(batch()), 30)
    assert (await inventory(vault, 2))[1] == [first, value]
    await vault.drop(["t0"])
    assert (await inventory(vault, 2))[1] == [value]


async def test_a_vault_can_tell_whether_a_payload_is_readable(vault, broker):
    await attach_both(broker)
    await vault.hand_over(Target("t0", "p", rollout_id=0), from_refs(batch()), 30)
    await vault.check("t0")
    with pytest.raises(PayloadLost, match="freed, or the vault was restarted"):
        await vault.check("t1")
    vault._held["t0"] = [*vault._held["t0"], Ref(ray.exceptions.ObjectLostError("ab" * 28, None, ""))]
    with pytest.raises(PayloadLost, match="lost payload t0"):
        await vault.check("t0")


async def test_a_snapshot_ages_while_it_lies_in_a_vault(vault, monkeypatch):
    """So that what is kept for a time is not kept longer because the broker was away."""
    assert await vault.remember(snapshot_of("a", 1, 1), {}, None)
    came = vault._since["a"]
    monkeypatch.setattr("slime.cross_job.vault.actor.time.monotonic", lambda: came + 3600)
    for _ in range(2):
        assert (await inventory(vault, 2))[0][0][0].job.aged_s == pytest.approx(3600)
    assert vault._snapshots["a"][0].job.aged_s == 0.0


LINE = 'ray::generate()\n  File "rollout.py", line 1, in generate\n'  # of a traceback


class Value:
    """What is published, to see when nobody holds it any more."""


@pytest.mark.parametrize("kind", ["store full", "refused", "no pickle in a store", "its method raised"])
async def test_a_hand_over_that_failed_lets_go_of_its_payload_at_once(vault, broker, kind):
    """Its outcome is remembered for a while: without the frames, whose variables hold the refs."""
    seen: list[weakref.ref[Any]] = []

    def value() -> Value:
        made = Value()
        seen.append(weakref.ref(made))
        return made

    async def hand_over(token: str) -> None:
        refs, error, target = [Ref(value())], CrossJobError, Target(token, "p", rollout_id=0)
        source: FromRefs | FromMethod = FromRefs(refs, {"nbytes": 1, "num_samples": -1})
        if kind == "store full":
            refs.append(Ref(ray.exceptions.OutOfDiskError("full")))
            error = StoreFull
        elif kind == "refused":
            target, error = Target(token, "p", key="k", version=3), Refused
        elif kind == "no pickle in a store":
            source.header["meta"] = {"an": np.arange(2)}
            target = Target(token, "p", rollout_id=0, durably=Durably("memory://x", "exp"))
        else:
            raised = ray.exceptions.RayTaskError("generate", LINE, KeyError("reward")).as_instanceof_cause()
            source, error = FromMethod(Actor(raised, value(), None), "generate", (value(),), {}, parts=1), KeyError
        for _ in range(2):  # the second joins the first, or asks again because the answer was lost
            with pytest.raises(error):
                await vault.hand_over(target, source, 30)

    await attach_both(broker)
    await broker.call("put_value", "c", "k", payload("weights"), 3)
    gc.collect()
    gc.disable()
    try:
        for number in range(3):
            await hand_over(f"t{number}")
        assert len(vault._under_way) == 3, "asked again, it says the same"
        assert seen
        assert [ref() for ref in seen if ref() is not None] == []
    finally:
        gc.enable()
    assert await vault.stats() == {"payloads": 0, "nbytes": 0, "behind": 0}


async def test_an_error_that_nobody_expected_leaves_no_payload_behind(vault, broker):
    await attach_both(broker)
    vault._tell = None
    with pytest.raises(TypeError):
        await vault.hand_over(Target("t0", "p", rollout_id=0), from_refs(batch()), 30)
    assert await vault.stats() == {"payloads": 0, "nbytes": 0, "behind": 0}
