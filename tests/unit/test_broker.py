"""Broker and vault without a cluster: their undecorated classes on an event loop whose clock the test moves.

Stand-ins: `RayStandIn` for the parts of `ray` that they use (actors by name, put, refs, the errors are Ray's own),
`Loop` for the event loop (it never sleeps: where the real one would wait for time, its clock jumps). The ledger and
all logic are the real ones.
"""

import asyncio
import selectors
from collections.abc import Callable, Coroutine, Generator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray

from slime.cross_job import broker as broker_module
from slime.cross_job import vault as vault_module
from slime.cross_job.batch import Batch
from slime.cross_job.broker import Broker
from slime.cross_job.errors import (
    ActorLost,
    BadInput,
    BrokerLost,
    EndOfStream,
    Fenced,
    JobIdTaken,
    PayloadLost,
    PeerFailed,
    Refused,
    StoreFull,
)
from slime.cross_job.ledger import Ledger
from slime.cross_job.producer import returned
from slime.cross_job.records import DEAD, FAILED, FINISHED, Client
from slime.cross_job.types import BROKER_NAME, PROTOCOL, ClientInfo, Payload
from slime.cross_job.vault import FromMethod, FromRefs, Target, Vault
from slime.cross_job.verdicts import verdict, who

VAULT = "vault1"


class Loop(asyncio.SelectorEventLoop):
    """Stands in for the event loop's clock: waiting for a moment brings it at once."""

    def __init__(self) -> None:
        self.now = 1000.0
        super().__init__(_Selector(self))

    def time(self) -> float:
        return self.now


class _Selector(selectors.SelectSelector):
    def __init__(self, loop: Loop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        assert timeout is not None, "everybody waits, and nothing will ever happen"
        self._loop.now += max(timeout, 0.0)
        return super().select(0)


class Ref:
    """Stands in for an ObjectRef: to be awaited, again and again."""

    def __init__(self, value: Any):
        self._value = value

    def __await__(self) -> Generator[Any, None, Any]:
        yield from asyncio.sleep(0).__await__()
        if isinstance(self._value, Exception):
            raise self._value
        return self._value


class Remote:
    """Stands in for an actor handle: `handle.method.remote(...)`; errors arrive wrapped as Ray wraps them."""

    def __init__(self, actor: Any):
        self._actor = actor

    def __getattr__(self, method: str) -> Any:
        async def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return await getattr(self._actor, method)(*args, **kwargs)
            except ray.exceptions.RayError:
                raise
            except Exception as error:
                raise ray.exceptions.RayTaskError(method, "traceback", error).as_instanceof_cause() from None

        return SimpleNamespace(remote=call)


class RayStandIn:
    """Stands in for the module `ray`: actors by name, an object store that copies nothing."""

    exceptions = ray.exceptions

    def __init__(self) -> None:
        self.actors: dict[str, Any] = {}
        self.asked: list[tuple[str, str]] = []

    def get_actor(self, name: str, namespace: str) -> Remote:
        self.asked.append((name, namespace))
        if name not in self.actors:
            raise ValueError(f"Failed to look up actor with name '{name}'")
        return Remote(self.actors[name])

    def put(self, value: Any) -> Ref:
        return Ref(value)

    def get_runtime_context(self) -> Any:
        return SimpleNamespace(get_actor_id=lambda: "actor1", get_node_id=lambda: "node1")


class VaultStandIn:
    """Stands in for a vault that is told what to free; `answers` says what comes of each call."""

    def __init__(self, *answers: Exception | float):
        self.dropped: list[list[str]] = []
        self._answers = [*answers]

    async def drop(self, tokens: list[str]) -> None:
        answer = self._answers.pop(0) if self._answers else 0.0
        if isinstance(answer, Exception):
            raise answer
        await asyncio.sleep(answer)
        self.dropped.append([*tokens])


class Actor:
    """Stands in for a producer's actor whose method a vault calls; the values it returns, or what it raises."""

    def __init__(self, *values: Any):
        self.values = values
        self.calls: list[tuple[int, tuple[Any, ...], dict[str, Any]]] = []

    @property
    def generate(self) -> Any:
        def options(num_returns: int) -> Any:
            def remote(*args: Any, **kwargs: Any) -> list[Ref]:
                self.calls.append((num_returns, args, kwargs))
                return [Ref(value) for value in self.values]

            return SimpleNamespace(remote=remote)

        return SimpleNamespace(options=options)


@pytest.fixture
def loop():
    loop = Loop()
    asyncio.set_event_loop(loop)
    yield loop
    for task in asyncio.all_tasks(loop):
        task.cancel()
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    asyncio.set_event_loop(None)


@pytest.fixture
def run(loop) -> Callable[[Coroutine[Any, Any, Any]], Any]:
    return loop.run_until_complete


@pytest.fixture
def over() -> dict[str, str]:
    """Client id -> why Ray says that it is over."""
    return {}


@pytest.fixture
def asked() -> list[str]:
    """Ids of the clients that Ray was asked about."""
    return []


@pytest.fixture
def ray_stand_in(loop, monkeypatch, over, asked) -> RayStandIn:
    async def at_once(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        await asyncio.sleep(0)
        return function(*args, **kwargs)

    def over_reason(info: ClientInfo) -> str | None:
        asked.append(info.client_id)
        return over.get(info.client_id)

    stand_in = RayStandIn()
    for module in (broker_module, vault_module):
        monkeypatch.setattr(module, "ray", stand_in)
    monkeypatch.setattr(asyncio, "to_thread", at_once)
    monkeypatch.setattr(broker_module, "over_reason", over_reason)
    monkeypatch.setattr(broker_module, "Ledger", lambda: Ledger(loop.time, loop.time))
    return stand_in


@pytest.fixture
def broker(ray_stand_in) -> Broker:
    made = Broker("ns")
    ray_stand_in.actors[BROKER_NAME] = made
    return made


@pytest.fixture
def vault(ray_stand_in) -> Vault:
    made = Vault(VAULT, "ns")
    ray_stand_in.actors[VAULT] = made
    return made


def client(role: str, name: str | None = None, group: str = "train", ray_job: str = "") -> ClientInfo:
    name = name or role[0]
    return ClientInfo(
        name, "exp", role, group=group if role == "consumer" else "", ray_job_id=ray_job or f"r-{name}", host="h"
    )


async def attach_both(broker: Broker) -> None:
    await broker.attach(client("producer"), {})
    await broker.attach(client("consumer"), {})


def payload(token: str, vault: str = VAULT) -> Payload:
    return Payload(token, vault, 1)


async def publish_and_ack(broker: Broker, rollout_id: int, vault: str = VAULT) -> None:
    await broker.call("publish", "p", rollout_id, payload(f"t{rollout_id}", vault))
    await broker.call("claim", "c", rollout_id)
    await broker.call("ack", "c", rollout_id)


async def settle() -> None:
    """Let everything run that needs no time."""
    for _ in range(30):
        await asyncio.sleep(0)


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


def test_what_is_offered_exists(broker):
    for operation in broker_module._OPERATIONS:
        assert callable(getattr(broker._ledger, operation))
        assert not operation.startswith("_")


def test_hello_says_who_is_here(broker, run):
    assert run(broker.hello()) == {"protocol": PROTOCOL, "namespace": "ns", "actor_id": "actor1"}
    watch = broker._watch
    run(broker.hello())
    assert broker._watch is watch


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
        assert granted == {"epoch": 2, "max_ahead": 2, "retain": 0}
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
    assert 1003 <= loop.time() <= 1006


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
    def broken(info: ClientInfo) -> str | None:
        raise RuntimeError("dashboard on fire")

    async def test() -> None:
        await broker.hello()
        await broker.attach(client("producer"), {"dead_after_s": 30})
        monkeypatch.setattr(broker_module, "over_reason", broken)
        await asyncio.sleep(20)
        assert "dashboard on fire" in caplog.text
        await asyncio.sleep(20)
        assert broker._ledger.clients["p"].state == DEAD

    run(test())


# ---------------------------------------------------------------------- what vaults are told


def test_vaults_are_told_at_once_what_they_may_free(broker, run, ray_stand_in):
    ray_stand_in.actors |= {"vault1": (one := VaultStandIn()), "vault2": (two := VaultStandIn())}

    async def test() -> None:
        await attach_both(broker)
        await publish_and_ack(broker, 0, "vault1")
        await publish_and_ack(broker, 1, "vault2")
        await settle()

    run(test())
    assert (one.dropped, two.dropped) == ([["t0"]], [["t1"]])
    assert ("vault1", "ns") in ray_stand_in.asked
    assert broker._drops == {}


@pytest.mark.parametrize(
    "trouble",
    [ray.exceptions.ActorUnavailableError("its node does not answer", b"1" * 16), 31.0],
    ids=["unavailable", "no answer for 30 s"],
)
def test_a_vault_that_does_not_answer_is_told_later(broker, run, ray_stand_in, caplog, trouble):
    ray_stand_in.actors |= {"vault1": (one := VaultStandIn(trouble)), "vault2": (two := VaultStandIn())}

    async def test() -> None:
        await broker.hello()
        await broker.attach(client("producer"), {"dead_after_s": 1000})
        await broker.attach(client("consumer"), {"dead_after_s": 1000})
        await publish_and_ack(broker, 0, "vault1")
        await asyncio.sleep(30.5)
        await publish_and_ack(broker, 1, "vault2")
        await asyncio.sleep(5)

    run(test())
    assert (one.dropped, two.dropped) == ([["t0"]], [["t1"]])
    assert "vault vault1 does not answer" in caplog.text
    assert broker._drops == {}


@pytest.mark.parametrize("died", [True, False], ids=["died", "no such actor"])
def test_what_a_vault_that_is_gone_held_is_forgotten(broker, run, ray_stand_in, died):
    if died:
        ray_stand_in.actors[VAULT] = VaultStandIn(ray.exceptions.ActorDiedError())

    async def test() -> None:
        await attach_both(broker)
        await publish_and_ack(broker, 0)
        await settle()

    run(test())
    assert broker._drops == {}


# ---------------------------------------------------------------------- vault


def batch(first: int = 1) -> Batch:
    return Batch.pack({"tokens": [[first, 2], [3]]})


def from_refs(value: Any, num_samples: int = 2) -> FromRefs:
    nbytes = value.nbytes if isinstance(value, Batch) else 0
    return FromRefs([Ref(value)], {"nbytes": nbytes, "num_samples": num_samples})


def test_a_vault_owns_what_it_is_handed_before_the_broker_knows_it(vault, broker, run, loop):
    async def test() -> None:
        await attach_both(broker)
        known: list[list[str]] = []
        call = broker.call

        async def watched(operation: str, *args: Any, **kwargs: Any) -> Any:
            known.append([*vault._held])
            return await call(operation, *args, **kwargs)

        broker.call = watched
        located = await vault.hand_over(Target("t0", "p", rollout_id=0), from_refs(batch()), 30)
        assert known == [["t0"]]
        assert (located.version, located.payload.token, located.payload.vault) == (1, "t0", VAULT)
        assert (located.payload.nbytes, located.payload.num_samples) == (batch().nbytes, 2)
        (ref,) = await vault.open("t0")
        assert (await ref)["tokens"].tolist() == [[1, 2], [3]]
        assert await vault.stats() == {"payloads": 1, "nbytes": batch().nbytes}

    run(test())


def test_a_vault_calls_the_producers_method_itself(vault, broker, run):
    actor = Actor(*returned(batch(), batch(5), meta={"step": 3}, weight_version=7))

    async def test() -> None:
        await attach_both(broker)
        source = FromMethod(actor, "generate", (0,), {"greedy": True}, parts=2)
        located = await vault.hand_over(Target("t0", "p", rollout_id=0), source, 30)
        assert actor.calls == [(3, (0,), {"greedy": True})]
        found = located.payload
        assert (found.parts, found.num_samples, found.weight_version, found.meta) == (2, 4, 7, {"step": 3})
        assert [await ref for ref in await vault.open("t0")] == [*actor.values[1:]]

    run(test())


@pytest.mark.parametrize(
    ("header", "error", "message"),
    [
        ({"rollout": 1}, BadInput, r"generate\(\) must return .*returned.* 1 part.* is a dict"),
        (np.arange(3), BadInput, "is a ndarray"),
        (ray.exceptions.ActorDiedError(), ActorLost, r"died in generate\(\).*Nothing of this call was published"),
        (RuntimeError("out of memory"), RuntimeError, "out of memory"),
        (ray.exceptions.OutOfDiskError(), StoreFull, "nothing was published"),
    ],
    ids=["no header", "not even a dict", "died", "raised", "full"],
)
def test_a_method_that_goes_wrong_leaves_nothing_behind(vault, broker, run, header, error, message):
    async def test() -> None:
        await attach_both(broker)
        source = FromMethod(Actor(header, batch()), "generate", (), {}, parts=1)
        with pytest.raises(error, match=message):
            await vault.hand_over(Target("t0", "p", rollout_id=0), source, 30)
        assert await vault.stats() == {"payloads": 0, "nbytes": 0}
        assert await broker.call("catalog") == []

    run(test())


def test_what_the_broker_refuses_is_not_kept(vault, broker, run):
    async def test() -> None:
        await attach_both(broker)
        await broker.call("end", "p", FINISHED)
        with pytest.raises(Fenced) as raised:
            await vault.hand_over(Target("t0", "p", rollout_id=0), from_refs(batch()), 30)
        assert type(raised.value) is Fenced  # without Ray's wrapping
        assert await vault.stats() == {"payloads": 0, "nbytes": 0}

    run(test())


def test_the_same_content_is_the_same_version_and_kept_once(vault, broker, run):
    async def test() -> None:
        await attach_both(broker)
        for token in ("t0", "retried"):
            located = await vault.hand_over(Target(token, "p", rollout_id=0), from_refs(batch()), 30)
            assert (located.version, located.payload.token) == (1, "t0")
        assert [*vault._held] == ["t0"]
        located = await vault.hand_over(Target("t1", "p", rollout_id=0), from_refs(batch(9)), 30)
        assert (located.version, located.payload.token) == (2, "t1")
        assert [*vault._held] == ["t0", "t1"]

    run(test())


def test_content_is_compared_with_that_in_another_vault(vault, broker, run, ray_stand_in):
    ray_stand_in.actors["vault2"] = other = Vault("vault2", "ns")

    async def test() -> None:
        await attach_both(broker)
        await vault.hand_over(Target("t0", "p", rollout_id=0), from_refs(batch()), 30)
        assert (await other.hand_over(Target("t1", "p", rollout_id=0), from_refs(batch()), 30)).version == 1
        assert (await other.stats())["payloads"] == 0
        del ray_stand_in.actors[VAULT]  # gone: nothing to compare with
        assert (await other.hand_over(Target("t2", "p", rollout_id=0), from_refs(batch()), 30)).version == 2

    run(test())


def test_opaque_values_are_not_compared(vault, broker, run):
    async def test() -> None:
        await attach_both(broker)
        for number in (1, 2):
            source = from_refs({"any": "thing"}, num_samples=-1)
            located = await vault.hand_over(Target(f"t{number}", "p", rollout_id=0), source, 30)
            assert located.version == number

    run(test())


def test_handing_over_again_joins_what_is_under_way(vault, broker, run, loop):
    class Slow(Ref):
        def __await__(self) -> Generator[Any, None, Any]:
            yield from asyncio.sleep(50).__await__()
            return self._value

    async def test() -> None:
        await broker.attach(client("producer"), {"dead_after_s": 1000})
        source, target = FromRefs([Slow(batch())], {"nbytes": 5, "num_samples": 2}), Target("t0", "p", rollout_id=0)
        assert await vault.hand_over(target, source, 30) is None
        assert loop.time() == pytest.approx(1030)
        both = [vault.hand_over(target, source, 30), vault.hand_over(target, source, 30)]
        assert [located.version for located in await asyncio.gather(*both)] == [1, 1]
        assert loop.time() == pytest.approx(1050)

    run(test())
    assert broker._ledger.status("exp")["exp"]["published"] == 1


def test_handing_over_again_because_the_answer_was_lost_calls_nothing_twice(vault, broker, run):
    actor = Actor(*returned(batch()))

    async def test() -> None:
        await attach_both(broker)
        target, source = Target("t0", "p", rollout_id=0), FromMethod(actor, "generate", (), {}, parts=1)
        first = await vault.hand_over(target, source, 30)
        await broker.call("claim", "c", 0)
        await broker.call("ack", "c", 0)  # and it is freed before the producer asks again
        assert await vault.hand_over(target, source, 30) == first

    run(test())
    assert len(actor.calls) == 1


def test_results_are_remembered_for_a_while_only(vault, broker, run, monkeypatch):
    monkeypatch.setattr(vault_module, "_REMEMBERED_CALLS", 3)

    async def test() -> None:
        await attach_both(broker)
        for number in range(10):
            await vault.hand_over(Target(f"t{number}", "p", rollout_id=number), from_refs(batch()), 30)
        assert [*vault._under_way] == ["t7", "t8", "t9"]
        assert (await vault.stats())["payloads"] == 10

    run(test())


def test_values_of_the_job_go_the_same_way(vault, broker, run):
    async def test() -> None:
        await attach_both(broker)
        for number in (0, 1):
            target = Target(f"w{number}", "c", key="weights", version=number)
            assert (await vault.hand_over(target, from_refs(batch()), 30)).version == number
        await settle()
        assert [*vault._held] == ["w1"]  # the broker told it to free the older one
        with pytest.raises(Refused, match="not newer"):
            await vault.hand_over(Target("w2", "c", key="weights", version=1), from_refs(batch()), 30)
        assert [*vault._held] == ["w1"]

    run(test())


def test_what_was_dropped_is_lost_and_dropping_twice_is_once(vault, broker, run):
    async def test() -> None:
        await attach_both(broker)
        await vault.hand_over(Target("t0", "p", rollout_id=0), from_refs(batch()), 30)
        await vault.drop(["t0", "never held"])
        await vault.drop(["t0"])
        with pytest.raises(PayloadLost, match="vault1 holds no payload t0"):
            await vault.open("t0")
        assert await vault.stats() == {"payloads": 0, "nbytes": 0}

    run(test())


def test_a_part_that_the_store_had_no_room_for_is_an_error_not_a_rollout(vault, broker, run):
    actor = Actor(returned(batch())[0], ray.exceptions.ObjectStoreFullError())

    async def test() -> None:
        await attach_both(broker)
        source = FromMethod(actor, "generate", (), {}, parts=1)
        with pytest.raises(StoreFull, match="nothing was published"):
            await vault.hand_over(Target("t0", "p", rollout_id=0), source, 30)
        assert await broker.call("catalog") == []

    run(test())


def test_a_broker_that_comes_back_in_time_is_told(vault, broker, run, ray_stand_in, loop):
    async def test() -> None:
        await attach_both(broker)
        del ray_stand_in.actors[BROKER_NAME]
        handing = loop.create_task(vault.hand_over(Target("t0", "p", rollout_id=0), from_refs(batch()), 600))
        await asyncio.sleep(40)
        ray_stand_in.actors[BROKER_NAME] = broker
        await asyncio.sleep(1)
        assert handing.done()
        assert (await handing).version == 1

    run(test())


def test_an_answer_of_the_broker_that_was_lost_is_asked_for_again(vault, broker, run):
    call, answers = broker.call, [ray.exceptions.ActorUnavailableError("the network", b"1" * 16)]

    async def forgetful(operation: str, *args: Any, **kwargs: Any) -> Any:
        result = await call(operation, *args, **kwargs)
        if answers and operation == "publish":
            raise answers.pop()
        return result

    async def test() -> None:
        await attach_both(broker)
        broker.call = forgetful
        assert (await vault.hand_over(Target("t0", "p", rollout_id=0), from_refs(batch()), 30)).version == 1
        assert answers == []
        assert [*vault._held] == ["t0"]

    run(test())
    assert broker._ledger.status("exp")["exp"]["published"] == 1


def test_a_broker_that_is_gone_is_said_so_and_the_payload_stays(vault, broker, run, ray_stand_in, loop):
    async def test() -> None:
        await attach_both(broker)
        del ray_stand_in.actors[BROKER_NAME]
        with pytest.raises(BrokerLost, match="did not answer vault vault1"):
            await vault.hand_over(Target("t0", "p", rollout_id=0), from_refs(batch()), 600)
        assert [*vault._held] == ["t0"]  # it may have been recorded: nobody knows

    run(test())
    assert 1060 <= loop.time() <= 1062


def test_a_vault_says_where_it_is(vault, run):
    assert run(vault.hello()) == {"protocol": PROTOCOL, "name": VAULT, "node_id": "node1"}


# ---------------------------------------------------------------------- verdicts


def described(state: str = "live", reason: str = "", beat: float = 990.0) -> Client:
    info = ClientInfo(
        "id", "exp", "producer", ray_job_id="02000000", submission_id="raysubmit_1", host="node7", pid=4711
    )
    return Client(info, 3, 30.0, 900.0, beat, 5000.0, "publishing rollout 5", state, reason)


WHO = "producer of job exp (epoch 3, Ray job 02000000 (raysubmit_1), pid 4711 on node7)"


@pytest.mark.parametrize(
    ("peer", "kind", "message"),
    [
        (None, "absent", "no rollout job has attached to job exp yet: start it with --job-id exp, on this cluster"),
        (
            described(beat=998.0),
            "alive",
            f"the {WHO} gave its last sign of life 2.0 s ago, doing: publishing rollout 5",
        ),
        (described(beat=998.0), "alive", "; it is still at work: allow more time"),
        (described(), "slow", f"the {WHO} gave its last sign of life 10.0 s ago, doing: publishing rollout 5"),
        (described(), "slow", "; it may be stuck: look at its log"),
        (described(beat=400.0), "slow", "gave its last sign of life 10 min ago"),
        (described(FINISHED), "finished", f"the {WHO} finished"),
        (described(FINISHED, "all 100 steps"), "finished", f"the {WHO} finished: all 100 steps"),
        (
            described(FAILED, "ValueError: boom"),
            "failed",
            f"the {WHO} failed: ValueError: boom; mend it and start the",
        ),
        (described(DEAD, "its Ray job is FAILED"), "dead", f"the {WHO} is dead: its Ray job is FAILED; it was last"),
        (
            described(DEAD, "its Ray job is FAILED"),
            "dead",
            "Start the rollout job again: what it had published is still",
        ),
    ],
)
def test_verdicts(peer, kind, message):
    found = verdict(peer, "producer", "exp", now=1000.0, now_wall=6000.0)
    assert found["kind"] == kind
    assert message in found["message"]
    if peer is not None:
        facts = {"who": WHO, "activity": "publishing rollout 5", "ray_job_id": "02000000", "state": peer.state}
        assert {name: found[name] for name in facts} == facts
        assert found["silent_s"] == 1000.0 - peer.last_beat
        assert found["reason"] == peer.reason


def test_a_verdict_of_the_other_side_names_it():
    assert verdict(None, "consumer", "exp", 0.0, 0.0)["message"].startswith("no train job has attached")
    consumer = Client(ClientInfo("id", "exp", "consumer", group="archive"), 1, 30.0, 0.0, 0.0, 0.0)
    assert who(consumer) == "consumer of job exp (epoch 1, group archive, Ray job ?, pid 0 on ?)"
