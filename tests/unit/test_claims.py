"""A claim that is interrupted keeps nothing: what it was granted is what the next one returns.

`ToLedger` stands in for the way to the broker: every call reaches a real ledger, and its answer may be lost, as where
Ctrl-C comes between the two.
"""

import asyncio
import math
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from slime.cross_job.client.consumer import Consumer
from slime.cross_job.deadline import Deadline
from slime.cross_job.errors import (
    BadInput,
    ClusterUnreachable,
    EndOfStream,
    Fenced,
    Forgotten,
    NotOwner,
    RolloutNotFound,
    StoreUnreachable,
    WaitTimeout,
)
from slime.cross_job.ledger import Ledger
from slime.cross_job.proposal.data_broker import DataProducer
from slime.cross_job.settings import Settings
from tests.support.attached import attached
from tests.support.ledger import publish


class ToLedger:
    """See the module. `lost` is what happens to the next answers, in turn: an error in their place, or None."""

    def __init__(self, ledger: Ledger):
        self.ledger = ledger
        self.lost: list[BaseException | None] = []
        self.asked = threading.Event()
        self.may_answer = threading.Event()
        self.may_answer.set()
        self.lock = threading.Lock()

    def check_process(self) -> None:
        """It is the process that attached."""

    def call(self, operation: str, *args: Any, deadline: Deadline | None = None, **kwargs: Any) -> Any:
        with self.lock:
            found = getattr(self.ledger, operation)(*args, **kwargs)
        return self._answer(found)

    def ask(self, operation: str, deadline: Deadline, *args: Any) -> Any:
        return self.call(operation, *args[:2])

    def wait(self, deadline: Deadline, operation: str, *args: Any, **kwargs: Any) -> Any:
        while True:
            with self.lock:
                found = getattr(self.ledger, operation)(*args, **kwargs)
            if found is not None or not deadline:
                return self._answer(found)
            self.asked.set()
            self.may_answer.wait(0.01)

    def open_refs(self, payload: Any, suffix: str = "", deadline: Any = None) -> list[Any]:
        return self._answer([payload.token])

    def _answer(self, found: Any) -> Any:
        error = self.lost.pop(0) if self.lost else None
        if error is not None:
            raise error
        return found


def consumer_of(ledger: Ledger, name: str) -> Consumer:
    return attached(Consumer, name, ToLedger(ledger), Settings())


@pytest.fixture
def ledger(pair: Ledger) -> Ledger:
    return pair


@pytest.fixture
def consumer(ledger: Ledger) -> Consumer:
    return consumer_of(ledger, "c")


def leases(ledger: Ledger) -> list[int]:
    return sorted(ledger.jobs["exp"].groups["train"].leases)


INTERRUPTIONS = [KeyboardInterrupt(), SystemExit(3), StoreUnreachable("away"), WaitTimeout("late"), RuntimeError("?")]


@pytest.mark.parametrize("error", INTERRUPTIONS, ids=repr)
@pytest.mark.parametrize("at", [0, 1], ids=["the answer", "the refs"])
def test_what_an_interrupted_claim_was_granted_is_what_the_next_one_returns(ledger, consumer, error, at):
    for rollout_id in range(20):
        publish(ledger, rollout_id)
    got = []
    while len(got) < 20:
        consumer.connection.lost = [None] * at + [error]
        if isinstance(error, WaitTimeout) and at:
            consumer.connection.lost += [None, error]  # asked whether it is lost, and again
        with pytest.raises(type(error)):
            consumer.claim(timeout_s=0)
        consumer.connection.lost = []
        got.append(consumer.claim(timeout_s=0).rollout_id)
    assert got == [*range(20)]
    assert leases(ledger) == [*range(20)]
    assert consumer._tokens.open == {}


def test_also_a_claim_by_id(ledger, consumer):
    for rollout_id in range(3):
        publish(ledger, rollout_id)
    consumer.connection.lost = [KeyboardInterrupt()]
    with pytest.raises(KeyboardInterrupt):
        consumer.claim(2, timeout_s=0)
    assert consumer.claim(1, timeout_s=0).rollout_id == 1, "another id is another claim"
    assert [consumer.claim(timeout_s=0).rollout_id for _ in range(2)] == [2, 0]
    with pytest.raises(WaitTimeout):
        consumer.claim(timeout_s=0)


def test_asking_for_what_is_not_there_leaves_nothing_behind(ledger, consumer):
    for _ in range(100):
        with pytest.raises(WaitTimeout):
            consumer.claim(7, timeout_s=0)
        with pytest.raises(WaitTimeout):
            consumer.claim(timeout_s=0)
    assert len(consumer._tokens.open) <= 2
    publish(ledger, 7)
    assert consumer.claim(7, timeout_s=0).rollout_id == 7
    consumer.ack(7)
    for _ in range(100):
        with pytest.raises(RolloutNotFound):
            consumer.claim(7, timeout_s=0)
    assert len(consumer._tokens.open) <= 1


def test_two_threads_whose_answers_are_lost_get_two_rollouts(ledger, consumer):
    for rollout_id in range(4):
        publish(ledger, rollout_id)
    got: list[int] = []

    def claims() -> None:
        with pytest.raises(WaitTimeout):
            consumer.claim(timeout_s=0)
        got.append(consumer.claim(timeout_s=0).rollout_id)

    consumer.connection.lost = [WaitTimeout("late"), None, None, WaitTimeout("late")]  # None: a claim, and its refs
    in_turn(claims, claims)
    assert sorted(got) == [0, 1] == leases(ledger)


def in_turn(*calls: Callable[[], None]) -> None:
    for call in calls:
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()


def test_what_a_thread_that_ended_was_granted_is_not_stranded(ledger, consumer):
    publish(ledger, 0)
    consumer.connection.lost = [KeyboardInterrupt()]

    def claims() -> None:
        with pytest.raises(KeyboardInterrupt):
            consumer.claim(timeout_s=0)

    in_turn(claims)
    assert consumer.claim(timeout_s=0).rollout_id == 0


def test_a_release_whose_answer_was_lost_is_once(ledger, consumer):
    publish(ledger, 0)
    consumer.claim(timeout_s=0)
    consumer.connection.lost = [KeyboardInterrupt()]
    with pytest.raises(KeyboardInterrupt):
        consumer.release(0)
    consumer.release(0)
    assert leases(ledger) == []
    consumer.connection.lost = []
    consumer.claim(timeout_s=0)
    consumer.connection.lost = [KeyboardInterrupt()]
    with pytest.raises(KeyboardInterrupt):
        consumer.release(0)
    consumer.claim(timeout_s=0)
    consumer.release(0)  # of what was claimed since
    assert leases(ledger) == []
    with pytest.raises(NotOwner):
        consumer.release(0)
    assert consumer._releases == {}


def test_the_last_spans_of_a_client_that_ends_are_not_waited_for_as_long_as_its_end(consumer):
    asked: dict[str, float] = {}
    consumer.connection = SimpleNamespace(
        patience_s=3600.0, call=lambda operation, *_, timeout_s=None: asked.update({operation: timeout_s})
    )
    consumer._spans = [("train", 0, 1.0, 2.0)]
    consumer.finish()
    assert asked == {"heartbeat": 30.0, "end": 3600.0}


@pytest.mark.parametrize("error", [Fenced("replaced"), Forgotten("unknown"), ClusterUnreachable("left")], ids=repr)
def test_a_client_that_sends_no_sign_of_life_any_more_watches_no_cluster(ledger, consumer, error):
    consumer.settings = SimpleNamespace(heartbeat_s=0.0, dead_after_s=30.0)
    consumer.connection.call = Mock(side_effect=[WaitTimeout("late"), error])
    consumer._beat()
    assert consumer._beaten.is_set(), "which ends its ClusterWatch"
    with pytest.raises(type(error)):
        consumer.check()


# ---------------------------------------------------------------------- iterators


@pytest.mark.parametrize("how", [iter, lambda consumer: consumer.subscribe(timeout_s=0)], ids=["iter", "subscribe"])
def test_an_iterator_goes_on_after_an_interruption(ledger, consumer, how):
    consumer.settings = Settings(timeout_s=0)
    rollouts: Iterator[Any] = how(consumer)
    with pytest.raises(WaitTimeout):
        next(rollouts)
    for rollout_id in range(3):
        publish(ledger, rollout_id)
    got = []
    for error in (None, KeyboardInterrupt(), None):
        consumer.connection.lost = [None] * bool(got) * (how is not iter) + [error]
        if error is None:
            got.append(next(rollouts).rollout_id)
        else:
            with pytest.raises(KeyboardInterrupt):
                next(rollouts)
            consumer.connection.lost = []
    got.append(next(rollouts).rollout_id)
    assert got == [0, 1, 2]
    ledger.end("p", "finished")
    if how is iter:
        for rollout_id in got:
            ledger.ack("c", rollout_id)
    with pytest.raises(StopIteration):
        next(rollouts)


def test_a_subscription_that_is_closed_gives_back_what_was_not_seen(ledger, consumer):
    for rollout_id in range(3):
        publish(ledger, rollout_id)
    rollouts = consumer.subscribe(start=1)
    assert next(rollouts).rollout_id == 1
    assert leases(ledger) == [1]
    rollouts.close()
    assert leases(ledger) == []
    assert [*rollouts] == []
    again = consumer.subscribe()
    next(again).ack()
    again.close()  # seen by its own ack
    assert consumer.claim(timeout_s=0).rollout_id == 2


def test_a_subscription_goes_on_after_what_it_looked_at_went_to_another(ledger, consumer):
    for rollout_id in range(2):
        publish(ledger, rollout_id)
    rollouts = consumer.subscribe(timeout_s=0)
    next(rollouts).release()
    assert consumer_of(ledger, "c").claim(0, timeout_s=0)
    ledger.release("c", 0)
    with pytest.raises(NotOwner):
        next(rollouts)
    assert [next(rollouts).rollout_id for _ in range(2)] == [0, 1]


async def cancelled_wait(consumer: Consumer) -> tuple[Any, "asyncio.Future[Any]"]:
    """An asynchronous subscription, and a wait for its first rollout, which was asked for when it was cancelled."""
    rollouts = consumer.asubscribe(timeout_s=60)
    waiting = asyncio.ensure_future(anext(rollouts))
    assert await asyncio.to_thread(consumer.connection.asked.wait, 60)
    waiting.cancel()
    return rollouts, waiting


def test_what_came_before_the_end_of_an_asynchronous_subscription_is_not_handed_out_after_it(ledger, consumer):
    async def test() -> None:
        rollouts, _ = await cancelled_wait(consumer)
        publish(ledger, 0)
        await asyncio.wait([asyncio.wrap_future(rollouts._asking)])
        await rollouts.aclose()
        with pytest.raises(StopAsyncIteration):
            await anext(rollouts)

    asyncio.run(test())
    assert leases(ledger) == []


def test_a_cancelled_wait_takes_nothing(ledger, consumer):
    """The thread that waits goes on: what it gets is what the next `anext` returns."""

    async def test() -> None:
        rollouts, waiting = await cancelled_wait(consumer)
        with pytest.raises(asyncio.CancelledError):
            await waiting
        for rollout_id in range(3):
            publish(ledger, rollout_id)
        assert (await anext(rollouts)).rollout_id == 0
        assert (await anext(rollouts)).rollout_id == 1
        assert leases(ledger) == [1], "0 was seen"
        await rollouts.aclose()
        assert leases(ledger) == []
        with pytest.raises(StopAsyncIteration):
            await anext(rollouts)

    asyncio.run(test())
    assert consumer.claim(timeout_s=0).rollout_id == 1


def test_what_comes_for_a_wait_that_was_cancelled_is_given_back_at_the_end(ledger, consumer):
    async def test() -> None:
        rollouts, _ = await cancelled_wait(consumer)
        publish(ledger, 0)
        await rollouts.aclose()
        assert leases(ledger) == []

    asyncio.run(test())
    assert consumer.claim(timeout_s=0).rollout_id == 0


def test_an_asynchronous_subscription_ends_with_the_stream_and_raises_what_goes_wrong(ledger, consumer):
    async def test() -> None:
        rollouts = consumer.asubscribe(timeout_s=0)
        with pytest.raises(WaitTimeout):
            await anext(rollouts)
        publish(ledger, 0)
        ledger.end("p", "finished")
        assert [rollout.rollout_id async for rollout in rollouts] == [0]

    asyncio.run(test())
    with pytest.raises(EndOfStream):
        consumer.claim(timeout_s=0)


@pytest.mark.parametrize("bad", ["3", math.nan, True, [1]], ids=repr)
def test_a_deadline_that_is_no_number_is_refused_before_anything_is_asked(ledger, consumer, bad):
    publish(ledger, 0)
    for call in (consumer.claim, consumer.loaded, consumer.begin_update, lambda **kw: consumer.value("k", **kw)):
        with pytest.raises(BadInput, match="timeout_s"):
            call(timeout_s=bad)
    assert leases(ledger) == []


def test_numbers_that_are_none_are_refused_before_anything_is_asked(ledger, consumer):
    publish(ledger, 0)
    for call in (
        lambda: consumer.claim("0"),
        lambda: consumer.claim(0, version="1"),
        lambda: consumer.get(0, "1"),
        lambda: consumer.value("k", "1"),
        lambda: consumer.begin_update("1"),
        lambda: consumer.end_update("1", 1),
        lambda: consumer.resume(0, source=object()),
        lambda: consumer.resume("0"),
        lambda: consumer.subscribe("0"),
        lambda: consumer.publish_value(3, {"a": [1]}),
        lambda: consumer.value(["k"]),
        lambda: consumer.value_ref(""),
        lambda: DataProducer.get_data_ref(consumer, {}),
        lambda: consumer.publish_value("k", {"a": [1]}, "1"),
        lambda: consumer.publish_weights("1", {"w": np.ones(1)}),
        lambda: consumer.publish_weights(1, {"w": [1.0]}),
        lambda: consumer.publish_weights(1, [("w", np.ones(1))]),
        lambda: consumer.publish_weights(1, {3: np.ones(1)}),
    ):
        with pytest.raises(BadInput):
            call()
    assert leases(ledger) == []
    with pytest.raises(BadInput, match="version"):
        ledger.end_update("c", "1", 1)
