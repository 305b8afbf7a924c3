"""A call that is interrupted on a real cluster: Ctrl-C in a claim, a wait in an event loop that is cancelled."""

import asyncio
import os
import random
import signal
import threading
from types import FrameType

import pytest

from slime.cross_job import Consumer, Producer
from slime.cross_job.errors import WaitTimeout
from tests.integration.jobs.speak import columns
from tests.support.patience import patient, within

pytestmark = pytest.mark.usefixtures("driver")

ROLLOUTS = 20


@pytest.fixture
def pair(job_id):
    with Producer(job_id) as producer, Consumer(job_id) as consumer:
        yield producer, consumer


@pytest.fixture
def ctrl_c():
    """Sends Ctrl-C after so many seconds. It is ignored outside of a claim, where it would end the whole run."""

    def handle(number: int, frame: FrameType | None) -> None:
        while frame and frame.f_code is not Consumer.claim.__code__:
            frame = frame.f_back
        if frame:
            raise KeyboardInterrupt

    def send_in(seconds: float) -> threading.Timer:
        timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        return timer

    before = signal.signal(signal.SIGINT, handle)
    yield send_in
    signal.signal(signal.SIGINT, before)


@pytest.mark.ci
def test_ctrl_c_in_a_claim_strands_nothing(pair, ctrl_c):
    producer, consumer = pair
    timer = ctrl_c(1.0)
    with within(60), pytest.raises(KeyboardInterrupt):
        consumer.claim(timeout_s=patient(300))
    timer.join()
    for rollout_id in range(ROLLOUTS):
        producer.publish(rollout_id, columns(rollout_id))
    got, interrupted = [], 0
    while len(got) < ROLLOUTS:
        timer = ctrl_c(random.uniform(0, 0.02))
        try:
            got.append(consumer.claim(timeout_s=60).rollout_id)
        except KeyboardInterrupt:
            interrupted += 1
        timer.join()
    assert interrupted, "no claim was interrupted"
    assert sorted(got) == [*range(ROLLOUTS)]


def test_a_wait_that_is_cancelled_in_an_event_loop_takes_nothing(pair):
    producer, consumer = pair

    async def test() -> None:
        rollouts = consumer.asubscribe(timeout_s=300)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(anext(rollouts), 1)
        for rollout_id in range(2):
            await asyncio.to_thread(producer.publish, rollout_id, columns(rollout_id))
        assert (await asyncio.wait_for(anext(rollouts), 60)).rollout_id == 0
        assert (await asyncio.wait_for(anext(rollouts), 60)).rollout_id == 1
        await rollouts.aclose()

    asyncio.run(test())
    assert consumer.claim(timeout_s=60).rollout_id == 1, "it was looked at, and not seen"
    with pytest.raises(WaitTimeout):
        consumer.claim(timeout_s=1)
