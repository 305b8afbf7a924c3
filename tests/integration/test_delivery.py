"""Deaths on a real cluster, of broker, vault and consumer: what is lost, who is told, how soon it is mended."""

import logging
import os
import signal
import threading
import time
from typing import Any

import numpy as np
import psutil
import pytest
import ray

from slime.cross_job import Consumer, Producer
from slime.cross_job.batch import Batch
from slime.cross_job.client.connection import Connection
from slime.cross_job.client.producer import returned
from slime.cross_job.errors import EndOfStream, HeldBack, NoResources, NotOwner, Refused, RolloutNotFound, WaitTimeout
from slime.cross_job.types import BROKER_NAME, VAULT_NAME
from tests.integration.jobs.speak import columns
from tests.support.actors import kill, pid_of
from tests.support.patience import patient, within
from tests.support.ray_jobs import wait_for

pytestmark = pytest.mark.usefixtures("driver")


@ray.remote(num_cpus=0)
class Generator:
    def generate(self, rollout_id: int, source: int) -> Any:
        return returned(columns(rollout_id), source={"next": source + 1, "ballast": "x" * 10_000 * (rollout_id % 2)})


@pytest.fixture
def pair(job_id):
    """In a namespace of their own, whose broker and vault may be killed."""
    names = {"namespace": job_id}
    with Producer(job_id, retain=2, **names) as producer, Consumer(job_id, timeout_s=patient(20), **names) as consumer:
        yield producer, consumer


@pytest.mark.core
def test_a_broker_that_is_killed_forgets_nothing(pair, job_id):
    producer, consumer = pair
    for rollout_id in range(3):
        producer.publish(rollout_id, columns(rollout_id), weight_version=rollout_id)
    consumer.publish_weights(4, {"w": np.array([1.0])})
    consumer.demand(7)
    held = consumer.claim(0)
    consumer.claim(1).ack()
    before = consumer.status()
    os.kill(pid_of(job_id, BROKER_NAME), signal.SIGKILL)
    with within(10):  # from the broker's death to the next claim
        claimed = consumer.claim(2)
    assert claimed.batch.to_pydict() == columns(2)
    claimed.release()
    after = consumer.status()
    changing = {"claimed", "requeued", "producer", "consumers", "events", "bytes", "idle_s", "oldest_queued_s"}
    changing |= {"waited", "recent", "bottleneck", "standing"}
    assert {k: v for k, v in after.items() if k not in changing} == {
        k: v for k, v in before.items() if k not in changing
    }
    assert [after["producer"]["epoch"], after["consumers"]["train"]["epoch"]] == [1, 1]
    held.ack()
    with Consumer(job_id, namespace=job_id) as second, pytest.raises(RolloutNotFound, match="acked"):
        second.claim(1)
    assert producer.next_demand(5) == 7
    assert producer.weights().version == 4
    assert producer.publish(3, columns(3)).version == 1


@pytest.mark.core
def test_a_broker_that_was_ended_for_good_is_made_again_with_its_memory(pair, job_id):
    producer, consumer = pair
    producer.publish(0, columns(0))
    ray.kill(ray.get_actor(BROKER_NAME, namespace=job_id), no_restart=True)
    assert consumer.claim(0).batch.to_pydict() == columns(0)


def test_a_thousand_rollouts_are_known_again_within_5_s(job_id):
    with Producer(job_id, namespace=job_id) as producer, Consumer(job_id, namespace=job_id) as consumer:
        for rollout_id in range(1000):
            producer.publish(rollout_id, {"a": [rollout_id]})
        pid = pid_of(job_id, BROKER_NAME)
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not psutil.pid_exists(pid), 10)
        # the process itself takes a second or two to be there
        with within(5):
            assert len(consumer.catalog()) == 1000
            assert consumer.rollout_ids() == [*range(1000)]
        assert consumer.claim().batch["a"].tolist() == [0]


@pytest.mark.core
def test_a_vault_that_dies_takes_its_payloads_only_and_they_are_generated_again(pair, job_id, caplog):
    producer, consumer = pair
    generator = Generator.remote()
    for rollout_id in range(3):
        position, source = producer.source_before(rollout_id)
        assert (position, (source or {}).get("next", 0)) == (rollout_id, rollout_id)
        producer.publish_from(rollout_id, generator, "generate", rollout_id=rollout_id, source=position)
    consumer.claim(0).ack()
    kill(job_id, VAULT_NAME)
    wait_for(lambda: consumer.status()["lost"] == [1, 2], 20)
    assert consumer.catalog() == []
    with pytest.raises(RolloutNotFound, match="lost with its vault: demand it"):
        consumer.get(1)
    consumer.demand(1)
    assert producer.next_demand(5) == 1
    assert producer.source_before(1) == (1, {"next": 1, "ballast": ""}), "it begins where it began the first time"
    again = producer.publish_from(1, generator, "generate", rollout_id=1, source=1)
    assert again.version == 2
    assert consumer.claim(1).batch.to_pydict() == columns(1)
    assert consumer.status()["lost"] == [2]


@pytest.mark.ci
def test_what_a_consumer_cannot_read_is_demanded_by_itself(pair, job_id, caplog):
    producer, consumer = pair
    producer.publish(0, columns(0))
    consumer.demand(0)
    kill(job_id, VAULT_NAME)
    with caplog.at_level(logging.WARNING), pytest.raises(WaitTimeout):
        consumer.claim(0, timeout_s=3)
    assert producer.next_demand(5) == 0
    producer.publish(0, columns(0))
    assert consumer.claim(0).version == 2


@pytest.mark.core
def test_a_consumer_that_was_killed_loses_its_lease_within_5_s(submit, job_id):
    with Producer(job_id, namespace=job_id) as producer, Consumer(job_id, namespace=job_id) as second:
        producer.publish(0, columns(0))
        first = submit("hold.py", job_id, job_id, 30, patient(10))
        pid = first.said()["pid"]
        with pytest.raises(WaitTimeout, match="it is leased"):
            second.claim(0, timeout_s=0.1)
        os.kill(pid, signal.SIGKILL)
        with within(5):
            second.claim(0, timeout_s=patient(20))
        second.ack(0)


@pytest.mark.core
def test_a_consumer_that_stalls_loses_its_lease_and_is_fenced_when_it_wakes(submit, job_id):
    lease_s = 3.0
    with Producer(job_id, namespace=job_id) as producer, Consumer(job_id, namespace=job_id) as second:
        producer.publish(0, columns(0))
        first = submit("hold.py", job_id, job_id, lease_s, patient(10))
        pid = first.said()["pid"]
        os.kill(pid, signal.SIGSTOP)
        stopped = time.monotonic()
        second.claim(0, timeout_s=patient(30))
        assert lease_s - patient(1.5) < time.monotonic() - stopped < lease_s + patient(3)
        os.kill(pid, signal.SIGCONT)
        assert first.wait() == "FAILED"
        assert "Fenced" in first.logs
        assert "acked" not in first.logs.split("SAID")[2], "a zombie acked what another holds"
        assert first.client.get_job_info(first.id).driver_exit_code == 3
        second.ack(0)


@pytest.mark.core
def test_a_job_that_is_asked_to_stop_ends_well_and_keeps_what_it_has(submit, job_id):
    with Producer(job_id, namespace=job_id) as producer:
        producer.publish(0, columns(0))
        first = submit("hold.py", job_id, job_id, 30, 0)
        first.all_said(2)  # it has acked, and waits for what nobody publishes
        first.client.stop_job(first.id)
        assert first.wait() == "STOPPED"
        wait_for(lambda: producer.status()["consumers"]["train"]["state"] == "stopped", 10)
        assert producer.status()["complete"] is False


@pytest.mark.core
def test_going_back_to_an_older_checkpoint(job_id):
    names = {"namespace": job_id}
    with Producer(job_id, retain=2, **names) as producer:
        for rollout_id in range(4):
            producer.publish(rollout_id, columns(rollout_id))
        first = Consumer(job_id, **names)
        for rollout_id in range(3):
            first.claim(rollout_id).ack()
        first.publish_weights(3, {"w": np.array([3.0])})
        held = first.claim(3)
        with Consumer(job_id, **names) as second:
            with pytest.raises(RolloutNotFound, match="cannot go back to rollout 0"):
                second.resume(0)
            second.resume(1)
            with pytest.raises(Refused, match="resumed its group at rollout 1"):
                held.ack()
            second.publish_weights(1, {"w": np.array([1.0])})
            assert producer.weights().version == 1
            assert [second.claim().rollout_id for _ in range(3)] == [1, 2, 3]
            assert second.claim(1).batch.to_pydict() == columns(1)
            with pytest.raises(NotOwner):
                second.ack(0) or second.ack(17)


@pytest.mark.core
def test_pause_and_drain(pair, job_id):
    producer, consumer = pair
    connection = Connection(job_id)
    producer.publish(0, columns(0))
    assert connection.call("control", job_id, "paused") == "running"
    consumer.demand(1)
    with pytest.raises(HeldBack, match="is paused") as paused:
        producer.next_demand(0.5)
    assert paused.value.verdict["kind"] == "paused"
    with pytest.raises(WaitTimeout, match="is paused"):
        consumer.claim(1, timeout_s=0.5)
    assert consumer.claim(0).rollout_id == 0, "what is published can be claimed"
    connection.call("control", job_id, "running")
    assert producer.next_demand(5) == 1
    connection.call("control", job_id, "draining")
    with pytest.raises(EndOfStream, match="drained"):
        producer.next_demand(5)
    producer.finish()
    with pytest.raises(EndOfStream, match="drained"):
        consumer.claim(1, timeout_s=5)
    consumer.finish()
    status = connection.call("status", job_id)[job_id]
    assert (status["complete"], status["producer"]["state"]) == (False, "stopped")
    with Consumer(job_id, namespace=job_id) as later:  # with other resources, say
        assert later.status()["control"] == "running"
        assert later.claim(0).batch.to_pydict() == columns(0)


@pytest.mark.core
def test_jobs_that_disagree_are_told_both_values_before_anything_is_generated(job_id):
    with Producer(job_id, terms={"samples": 8, "tokenizer": "abc", "mine": 1}):
        with pytest.raises(Refused, match=r"samples is 4 here and 8 there; tokenizer is 'xyz' here and 'abc' there"):
            Consumer(job_id, terms={"tokenizer": "xyz", "samples": 4})
        with Consumer(job_id, terms={"samples": 8}):
            pass


@pytest.mark.ci
def test_columns_that_are_missing_are_named(job_id):
    with Producer(job_id) as producer, Consumer(job_id, columns=["tokens", "log_probs"], timeout_s=5) as consumer:
        producer.publish(0, columns(0))
        with pytest.raises(Refused, match=r"needs tokens, log_probs: log_probs missing"):
            consumer.claim(0)


@pytest.mark.ci
def test_a_producer_waits_for_room_and_says_so(job_id):
    with Producer(job_id, max_bytes=300_000, max_ahead=9) as producer, Consumer(job_id, timeout_s=5) as consumer:
        consumer.demand(0)
        published: list[int] = []

        def fill() -> None:
            for _ in range(10):
                published.append(producer.next_demand(1))
                producer.publish(published[-1], columns(published[-1]))

        with pytest.raises(HeldBack, match=r"waits for room.*--cross-job-max-bytes 300000") as full:
            fill()
        assert full.value.verdict["kind"] == "full"
        assert producer.status()["held_bytes"] <= 300_000
        assert len(published) > 1
        consumer.claim(0).ack()
        assert producer.next_demand(5) == published[-1] + 1


@pytest.mark.parametrize(
    ("needs", "said"),
    [
        ({"num_gpus": 64}, "needs 64 GPU (0 of 0 free); add nodes that have it, or ask for less"),
        ({"num_cpus": 100}, "needs 100 CPU (8 of 8 free); add nodes that have it, or ask for less"),
    ],
    ids=["GPU", "CPU"],
)
def test_an_actor_that_no_node_can_hold_is_named_to_both_sides_within_30_s(job_id, caplog, needs, said):
    names = {"namespace": job_id, "resources_s": 8.0, "heartbeat_s": 0.2}
    with Producer(job_id, **names) as producer, Consumer(job_id, **names) as consumer:
        generator = Generator.options(**needs).remote()
        began, raised = time.monotonic(), []

        def publish() -> None:
            try:
                producer.publish_from(0, generator, "generate", rollout_id=0, source=0)
            except NoResources as error:
                raised.append(error)

        publishing = threading.Thread(target=publish)
        publishing.start()
        text = f"the actor Generator waits to be started: it {said}"
        with pytest.raises(WaitTimeout) as late:
            consumer.claim(0, timeout_s=7)
        assert text in late.value.verdict["activity"]
        publishing.join(60)
        assert f"nothing was started within 8 s: {text}" in str(raised[0])
        assert time.monotonic() - began < patient(30)
        assert caplog.text.count(text) == 1


@pytest.mark.ci
def test_an_actor_whose_place_others_hold_is_waited_for(job_id):
    with Producer(job_id, namespace=job_id, resources_s=0) as producer:
        holder = Generator.options(num_cpus=8).remote()
        ray.get(holder.__ray_ready__.remote())
        late = Generator.options(num_cpus=8).remote()
        with pytest.raises(NoResources, match=r"it needs 8 CPU \(0 of 8 free\); stop what holds them"):
            producer.publish_from(0, late, "generate", rollout_id=0, source=0, timeout_s=6)
        ray.kill(holder)
        assert producer.publish_from(0, late, "generate", rollout_id=0, source=0, timeout_s=60).version == 1


@pytest.mark.ci
def test_what_a_claim_was_granted_after_its_deadline_is_handed_out_first(pair):
    producer, consumer = pair
    with pytest.raises(WaitTimeout):
        consumer.claim(timeout_s=0.2)
    for rollout_id in range(2):
        producer.publish(rollout_id, columns(rollout_id))
    (token,) = consumer._tokens.open
    granted = consumer.connection.call("claim", consumer.info.client_id, token=token)  # nobody hears the answer
    assert granted.rollout_id == 0
    assert [consumer.claim().rollout_id for _ in range(2)] == [0, 1]


@pytest.mark.ci
def test_a_large_source_of_a_checkpoint_reaches_the_producer_past_the_broker(job_id):
    """100 MB are more than one message to the broker may take in the memory of its vaults at every change."""
    source = Batch.pack({"tokens": [np.full(50_000, row, np.int32) for row in range(500)]}, {"seen": {3: (1, 2)}})
    with Producer(job_id, namespace=job_id) as producer, Consumer(job_id, namespace=job_id) as consumer:
        consumer.resume(4, source)
        position, found = producer.source_before(4)
        assert (position, found.ipc) == (1, source.ipc)
        broker = ray.get_actor(BROKER_NAME, namespace=job_id)
        in_broker = ray.get(broker.__ray_call__.remote(lambda self, job: repr(self._ledger.jobs[job].sources), job_id))
        assert len(in_broker) < 2000
        consumer.resume(2, {"at": 2})
        assert producer.source_before(2) == (1, {"at": 2})
