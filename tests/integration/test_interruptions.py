"""A call that is interrupted on a real cluster: Ctrl-C in a claim, a wait in an event loop that is cancelled."""

import asyncio
import os
import random
import signal
import threading
import time

import pytest
from speak import columns

from patience import patient
from slime.cross_job import Consumer, Producer
from slime.cross_job.errors import WaitTimeout

pytestmark = pytest.mark.usefixtures("driver")

ROLLOUTS = 20


@pytest.fixture
def pair(job_id):
    with Producer(job_id) as producer, Consumer(job_id) as consumer:
        yield producer, consumer


def interrupt_in(seconds: float) -> threading.Timer:
    timer = threading.Timer(seconds, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    return timer


def test_ctrl_c_in_a_claim_strands_nothing(pair):
    producer, consumer = pair
    interrupt_in(1.0)
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        consumer.claim(timeout_s=300)
    assert time.monotonic() - began < patient(60)
    for rollout_id in range(ROLLOUTS):
        producer.publish(rollout_id, columns(rollout_id))
    got, interrupted = [], 0
    while len(got) < ROLLOUTS:
        timer = interrupt_in(random.uniform(0, 0.02))
        try:
            got.append(consumer.claim(timeout_s=60).rollout_id)
            timer.join()
            time.sleep(0.1)  # the signal comes here at the latest
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
