"""The vault without a cluster: the real class on stand-ins for Ray and time (ray_stand_in.py)."""

import asyncio
import json
from collections.abc import Generator
from typing import Any

import numpy as np
import pytest
import ray

from slime.cross_job.client.producer import returned
from slime.cross_job.errors import (
    ActorLost,
    BadInput,
    Fenced,
    MethodFailed,
    PayloadLost,
    Refused,
    StoreFull,
    Unreachable,
)
from slime.cross_job.ledger.state import FINISHED
from slime.cross_job.types import BROKER_NAME, PROTOCOL, Payload
from slime.cross_job.vault import actor as vault_module
from slime.cross_job.vault.actor import Vault
from slime.cross_job.vault.protocol import FromMethod, FromRefs, Target
from tests.support.ray_stand_in import (
    NAMESPACE,
    OTHER,
    VAULT,
    Actor,
    Ref,
    attach_both,
    batch,
    from_refs,
    settle,
    unavailable,
)


@pytest.fixture
def broker(broker, run):
    """The producer p and the consumer c are attached."""
    run(attach_both(broker, dead_after_s=1000))
    return broker


async def test_a_vault_owns_what_it_is_handed_before_the_broker_knows_it(vault, broker, loop):
    known: list[list[str]] = []
    call = broker.call

    async def watched(operation: str, *args: Any, **kwargs: Any) -> Any:
        known.append([*vault._held])
        return await call(operation, *args, **kwargs)

    broker.call = watched
    located = await vault.hand_over(Target("t0", "p", rollout_id=0), from_refs(batch()), 30)
    assert known == [["t0"]]
    assert (located.version, located.payload.token, located.payload.vault) == (
        1,
        "t0",
        f"{VAULT}/{vault._incarnation}",
    )
    assert (located.payload.nbytes, located.payload.num_samples) == (batch().nbytes, 2)
    (ref,) = await vault.open("t0")
    assert (await ref)["tokens"].tolist() == [[1, 2], [3]]
    assert await vault.stats() == {"payloads": 1, "nbytes": batch().nbytes, "behind": 0}


async def test_a_vault_calls_the_producers_method_itself(vault, broker):
    actor = Actor(*returned(batch(), batch(5), meta={"step": 3}, weight_version=7))
    source = FromMethod(actor, "generate", (0,), {"greedy": True}, parts=2)
    located = await vault.hand_over(Target("t0", "p", rollout_id=0), source, 30)
    assert actor.calls == [(4, (0,), {"greedy": True})]  # header, two parts, source
    found = located.payload
    assert (found.parts, found.num_samples, found.weight_version, found.meta) == (2, 4, 7, {"step": 3})
    assert [await ref for ref in await vault.open("t0")] == [*actor.values[1:3]]


LINE = 'ray::generate()\n  File "rollout.py", line 1, in generate\n'  # of a traceback


class Unfit(Exception):
    """Cannot be pickled."""

    def __reduce__(self):
        raise TypeError("no pickle")


def raised(error: Exception, traceback: str = LINE) -> Exception:
    """As Ray says it of a method."""
    return ray.exceptions.RayTaskError("generate", f"{traceback}{error!r}", error).as_instanceof_cause()


def without_pickle() -> Exception:
    made = raised(KeyError("x"))
    made.cause = Unfit("boo")  # type: ignore[attr-defined]
    return made


DIED = ray.exceptions.ActorDiedError()
JUNK = {**returned(batch())[0], "weight_version": "3"}


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        (({"rollout": 1}, batch(), None), BadInput, r"generate\(\) must return .*returned.* 1 part.* is a dict"),
        ((np.arange(3), batch(), None), BadInput, "is a ndarray"),
        ((DIED, batch(), None), ActorLost, r"died in generate\(\).*Nothing of this call was published"),
        ((RuntimeError("out of memory"), batch(), None), RuntimeError, "out of memory"),
        ((ray.exceptions.OutOfDiskError(), batch(), None), StoreFull, "nothing was published"),
        ((returned(batch())[0], ray.exceptions.ObjectStoreFullError(), None), StoreFull, "nothing was published"),
        ((raised(TypeError("object of type 'NoneType' has no len()"), ""),), BadInput, "must return.*has no len"),
        ((raised(ValueError("Task returned 4 objects, but num_returns=3."), ""),), BadInput, "must return.*4 objects"),
        ((raised(ValueError("my num_returns is bad")),), ValueError, "my num_returns is bad"),
        ((raised(KeyError("abc")),), KeyError, "abc"),
        ((raised(ray.exceptions.TaskCancelledError()),), MethodFailed, "rollout.py"),
        ((raised(DIED),), MethodFailed, "rollout.py"),  # another one, which it asked
        ((without_pickle(),), MethodFailed, "rollout.py"),
        ((ray.exceptions.UnserializableException("Weird: x"),), MethodFailed, "Weird: x"),
        ((returned(batch())[0], "no batch", None), BadInput, "value 1 after the header is a str"),
        ((returned(batch())[0], batch(), batch()), BadInput, "value 2 after the header is a Batch"),
        (({"slime_cross_job": 6}, batch(), None), BadInput, f"of protocol {PROTOCOL}; what it returned is of 6"),
        ((JUNK, batch(), None), BadInput, "weight_version '3' is a str"),
        (({**JUNK, "weight_version": 3, "meta": {"a": np.ones(1)}}, batch(), None), BadInput, r"meta\['a'\]"),
        (({**JUNK, "weight_version": 3, "nbytes": "1"}, batch(), None), BadInput, "nbytes"),
        (({**JUNK, "weight_version": 3, "columns": "tokens"}, batch(), None), BadInput, "columns"),
    ],
)
async def test_what_a_method_returns_or_raises_comes_as_one_clear_error(vault, broker, values, error, message):
    source = FromMethod(Actor(*values), "generate", (), {}, parts=1)
    with pytest.raises(error, match=message) as found:
        await vault.hand_over(Target("t0", "p", rollout_id=0), source, 30)
    assert not isinstance(found.value, ray.exceptions.RayError)
    if error in (ValueError, KeyError):  # the method's own comes with the traceback of its process
        assert 'File "rollout.py", line 1' in found.value.__notes__[0]
    assert await vault.stats() == {"payloads": 0, "nbytes": 0, "behind": 0}
    assert await broker.call("catalog") == []


async def test_the_same_content_is_the_same_version_and_kept_once(vault, broker):
    for token in ("t0", "retried"):
        located = await vault.hand_over(Target(token, "p", rollout_id=0), from_refs(batch()), 30)
        assert (located.version, located.payload.token) == (1, "t0")
    assert [*vault._held] == ["t0"]
    located = await vault.hand_over(Target("t1", "p", rollout_id=0), from_refs(batch(9)), 30)
    assert (located.version, located.payload.token) == (2, "t1")
    assert [*vault._held] == ["t0", "t1"]


async def test_content_is_compared_with_that_in_another_vault(vault, broker, ray_stand_in):
    ray_stand_in.actors[OTHER] = other = Vault(OTHER, NAMESPACE)
    await broker.vault_here(OTHER, other._incarnation)
    await vault.hand_over(Target("t0", "p", rollout_id=0), from_refs(batch()), 30)
    assert (await other.hand_over(Target("t1", "p", rollout_id=0), from_refs(batch()), 30)).version == 1
    assert (await other.stats())["payloads"] == 0
    del ray_stand_in.actors[VAULT]  # gone: nothing to compare with
    assert (await other.hand_over(Target("t2", "p", rollout_id=0), from_refs(batch()), 30)).version == 2


async def test_opaque_values_are_not_compared(vault, broker):
    for number in (1, 2):
        source = from_refs({"any": "thing"}, num_samples=-1)
        located = await vault.hand_over(Target(f"t{number}", "p", rollout_id=0), source, 30)
        assert located.version == number


async def test_an_opaque_value_has_the_size_of_its_copy(vault, broker):
    """Whoever hands in a ref says 0: bounds on bytes would mean nothing."""

    class Large:
        size = 1_000_000

    located = await vault.hand_over(Target("t0", "p", rollout_id=0), from_refs(Large(), num_samples=-1), 30)
    assert located.payload.nbytes == 1_000_000
    assert (await broker.call("status", "exp"))["exp"]["held_bytes"] == 1_000_000
    assert (await vault.stats())["nbytes"] == 1_000_000


async def test_handing_over_again_joins_what_is_under_way(vault, broker, loop):
    class Slow(Ref):
        def __await__(self) -> Generator[Any, None, Any]:
            yield from asyncio.sleep(50).__await__()
            return self._value

    source, target = FromRefs([Slow(batch())], {"nbytes": 5, "num_samples": 2}), Target("t0", "p", rollout_id=0)
    assert await vault.hand_over(target, source, 30) == ""
    assert loop.time() == pytest.approx(1030)
    both = [vault.hand_over(target, source, 30), vault.hand_over(target, source, 30)]
    assert [located.version for located in await asyncio.gather(*both)] == [1, 1]
    assert loop.time() == pytest.approx(1050)
    assert broker._ledger.status("exp")["exp"]["published"] == 1


async def test_handing_over_again_because_the_answer_was_lost_calls_nothing_twice(vault, broker):
    actor = Actor(*returned(batch()))
    target, source = Target("t0", "p", rollout_id=0), FromMethod(actor, "generate", (), {}, parts=1)
    first = await vault.hand_over(target, source, 30)
    await broker.call("claim", "c", 0)
    await broker.call("ack", "c", 0)  # and it is freed before the producer asks again
    assert await vault.hand_over(target, source, 30) == first
    assert len(actor.calls) == 1


async def test_a_call_that_is_joined_only_is_never_made_again(vault, broker):
    target = Target("t0", "p", rollout_id=0)
    with pytest.raises(PayloadLost, match="knows nothing of t0"):
        await vault.hand_over(target, None, 30)
    located = await vault.hand_over(target, from_refs(batch()), 30)
    assert await vault.hand_over(target, None, 30) == located


async def test_results_are_remembered_for_a_while_only(vault, broker, monkeypatch):
    monkeypatch.setattr(vault_module, "_REMEMBERED_CALLS", 3)
    for number in range(10):
        await vault.hand_over(Target(f"t{number}", "p", rollout_id=number), from_refs(batch()), 30)
    assert [*vault._under_way] == ["t7", "t8", "t9"]
    assert (await vault.stats())["payloads"] == 10


async def test_values_of_the_job_go_the_same_way(vault, broker):
    for number in (0, 1):
        target = Target(f"w{number}", "c", key="weights", version=number)
        assert (await vault.hand_over(target, from_refs(batch()), 30)).version == number
    await settle()
    assert [*vault._held] == ["w1"]  # the broker told it to free the older one
    with pytest.raises(Refused, match="not newer") as raised:
        await vault.hand_over(Target("w2", "c", key="weights", version=1), from_refs(batch()), 30)
    assert type(raised.value) is Refused  # without Ray's wrapping
    assert [*vault._held] == ["w1"]


async def test_what_was_dropped_is_lost_and_dropping_twice_is_once(vault, broker):
    await vault.hand_over(Target("t0", "p", rollout_id=0), from_refs(batch()), 30)
    await vault.drop(["t0", "never held"])
    await vault.drop(["t0"])
    with pytest.raises(PayloadLost, match=f"{VAULT} holds no payload t0"):
        await vault.open("t0")
    assert await vault.stats() == {"payloads": 0, "nbytes": 0, "behind": 0}


async def test_a_broker_that_comes_back_in_time_is_told(vault, broker, ray_stand_in, loop):
    del ray_stand_in.actors[BROKER_NAME]
    handing = loop.create_task(vault.hand_over(Target("t0", "p", rollout_id=0), from_refs(batch()), 600))
    await asyncio.sleep(40)
    ray_stand_in.actors[BROKER_NAME] = broker
    await asyncio.sleep(1)
    assert handing.done()
    assert (await handing).version == 1


async def test_an_answer_of_the_broker_that_was_lost_is_asked_for_again(vault, broker):
    call, answers = broker.call, [unavailable()]

    async def forgetful(operation: str, *args: Any, **kwargs: Any) -> Any:
        result = await call(operation, *args, **kwargs)
        if answers and operation == "publish":
            raise answers.pop()
        return result

    broker.call = forgetful
    assert (await vault.hand_over(Target("t0", "p", rollout_id=0), from_refs(batch()), 30)).version == 1
    assert answers == []
    assert [*vault._held] == ["t0"]
    assert broker._ledger.status("exp")["exp"]["published"] == 1


async def test_a_broker_that_is_gone_is_said_so_and_nothing_is_kept(vault, broker, ray_stand_in, loop):
    del ray_stand_in.actors[BROKER_NAME]
    with pytest.raises(Unreachable, match=f"did not answer vault {VAULT}"):
        await vault.hand_over(Target("t0", "p", rollout_id=0), from_refs(batch()), 600)
    assert await vault.stats() == {"payloads": 0, "nbytes": 0, "behind": 0}
    assert 1120 <= loop.time() <= 1122


async def test_a_vault_says_where_it_is_and_which_incarnation(vault):
    found = await vault.hello()
    facts = {"protocol": PROTOCOL, "name": VAULT, "node_id": "node1", "broker": 0, "given_up": []}
    assert found == {**facts, "incarnation": vault._incarnation}
    assert (await Vault(VAULT, NAMESPACE).hello())["incarnation"] != found["incarnation"]


# ---------------------------------------------------------------------- where the source of prompts stood


async def test_a_small_source_travels_with_the_record(vault, broker):
    actor = Actor(*returned(batch(), source={"epoch": 2, "at": 17}))
    source = FromMethod(actor, "generate", (), {}, parts=1)
    found = (await vault.hand_over(Target("t0", "p", rollout_id=0), source, 30)).payload
    assert (found.source, found.source_apart) == ({"epoch": 2, "at": 17}, False)
    assert [*vault._held] == ["t0"]


async def test_a_large_source_lies_beside_the_payload_until_nobody_may_need_it(vault, broker):
    where = {"order": [*range(3000)]}
    actor = Actor(*returned(batch(), source=where))
    for number in (0, 1):
        source = FromMethod(actor, "generate", (), {}, parts=1)
        found = (await vault.hand_over(Target(f"t{number}", "p", rollout_id=number), source, 30)).payload
        assert (found.source, found.source_apart) == (None, True)
    (ref,) = await vault.open("t0.source")
    assert json.loads(bytes((await ref)["json"][0])) == where
    for number in (0, 1):
        await broker.call("claim", "c", number)
        await broker.call("ack", "c", number)
    await settle()
    assert [*vault._held] == ["t1.source"]  # what comes next begins where rollout 1 ended


async def test_a_source_goes_with_a_payload_that_is_refused_or_known(vault, broker):
    source = FromMethod(Actor(*returned(batch(), source=[*range(3000)])), "generate", (), {}, parts=1)
    await vault.hand_over(Target("t0", "p", rollout_id=0), source, 30)
    await vault.hand_over(Target("same", "p", rollout_id=0), source, 30)
    assert [*vault._held] == ["t0", "t0.source"]
    await broker.call("end", "p", FINISHED)
    with pytest.raises(Fenced):
        await vault.hand_over(Target("t1", "p", rollout_id=1), source, 30)
    assert [*vault._held] == ["t0", "t0.source"]


async def test_a_source_that_a_checkpoint_kept_lies_in_a_vault_until_nobody_may_need_it(vault, broker):
    for number in (1, 2):
        where = await vault.keep_source(f"s{number}", FromRefs([Ref(f"source {number}")], {}))
        kept = Payload(f"s{number}", where, 10**9, source_apart=True)
        await broker.call("resume", "c", number, kept, f"r{number}")
    await settle()
    assert [*vault._held] == ["s2.source"], "what replaced it is all that counts"
    assert await broker.call("source_before", "p", 2) == (1, kept)
    (ref,) = await vault.open("s2.source")
    assert await ref == "source 2"
