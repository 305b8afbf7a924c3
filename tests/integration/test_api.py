"""Producer, Consumer and facade on a real cluster: versions, parts, weights, verdicts, refusals."""

import os
import threading
import time

import numpy as np
import pytest
import ray

from slime.cross_job import Consumer, Producer
from slime.cross_job.broker.actor import Broker
from slime.cross_job.client.connection import Connection
from slime.cross_job.client.producer import returned
from slime.cross_job.errors import (
    ActorLost,
    BadInput,
    BatchError,
    EndOfStream,
    Fenced,
    PeerFailed,
    ProtocolMismatch,
    RolloutNotFound,
    WaitTimeout,
)
from slime.cross_job.types import BROKER_NAME
from slime.utils.cross_job_utils import DataProducer, setup_cross_job_communication
from tests.integration.jobs.speak import columns
from tests.support.patience import patient
from tests.support.ray_jobs import wait_for

pytestmark = pytest.mark.usefixtures("driver")


@ray.remote(num_cpus=0)
class Generator:
    def generate(self, rollout_id):
        return returned(columns(rollout_id))

    def two_parts(self, rollout_id):
        return returned({"rank": [0, 0]}, {"rank": [1]}, meta={"n": rollout_id})

    def nonsense(self):
        return 1, 2

    def broken(self):
        raise ZeroDivisionError("in the reward")

    def die(self):
        os._exit(1)

    def slow(self, seconds):
        time.sleep(seconds)
        return returned({"a": [1]})

    def put(self, value):
        return [ray.put(value)]

    def read(self, refs, rows):
        return ray.get(refs[0]).select(rows).to_pydict()


@pytest.fixture
def pair(job_id):
    with Producer(job_id) as producer, Consumer(job_id, timeout_s=10) as consumer:
        yield producer, consumer


@pytest.mark.core
def test_the_same_content_is_the_same_version_and_other_content_the_next(pair):
    producer, consumer = pair
    generator = Generator.remote()
    assert producer.publish(0, columns(0)).version == 1
    assert producer.publish(0, columns(0)).version == 1
    assert producer.publish_from(0, generator, "generate", 0).version == 1
    assert producer.publish(0, columns(1)).version == 2
    assert producer.publish(0, columns(1), weight_version=9).version == 3
    assert consumer.claim(0).version == 3
    assert consumer.get(0, version=1).batch.to_pydict() == columns(0)
    assert [located.version for located in consumer.versions(0)] == [1, 2, 3]
    with pytest.raises(RolloutNotFound, match="versions 1, 2, 3, not 4"):
        consumer.get(0, version=4)
    node = ray.get_runtime_context().get_node_id()
    stats = ray.get(producer.connection.vault_on(node).stats.remote())
    consumer.ack(0)
    wait_for(
        lambda: ray.get(producer.connection.vault_on(node).stats.remote())["payloads"] == stats["payloads"] - 3, 10
    )


def test_parts_and_rows_are_read_by_other_processes(pair):
    producer, consumer = pair
    generator = Generator.remote()
    producer.publish_from(0, generator, "two_parts", 0, parts=2)
    rollout = consumer.claim(0)
    assert [part.to_pydict() for part in rollout.parts] == [{"rank": [0, 0]}, {"rank": [1]}]
    assert (rollout.num_samples, rollout.meta) == (3, {"n": 0})
    with pytest.raises(BadInput, match="2 parts"):
        _ = rollout.batch
    producer.publish(1, columns(1))
    rows = ray.get(generator.read.remote(consumer.claim(1).refs, range(1, 8, 2)))
    assert rows == {name: values[1::2] for name, values in columns(1).items()}


@pytest.mark.ci
def test_a_method_that_fails_or_dies_publishes_nothing_and_the_job_goes_on(pair):
    producer, consumer = pair
    generator = Generator.remote()
    with pytest.raises(BadInput, match="must return"):
        producer.publish_from(0, generator, "nonsense")
    with pytest.raises(ZeroDivisionError, match="in the reward"):
        producer.publish_from(0, generator, "broken")
    with pytest.raises(ActorLost, match=r"died in die\(\)"):
        producer.publish_from(0, generator, "die")
    with pytest.raises(BadInput, match="has no method genrate"):
        producer.publish_from(0, Generator.remote(), "genrate")
    assert consumer.catalog() == []
    assert producer.publish_from(0, Generator.remote(), "generate", 0).version == 1


def test_a_slow_method_ends_with_a_verdict_and_is_published_when_it_returns(pair):
    producer, consumer = pair
    with pytest.raises(WaitTimeout, match=r"rollout 0 .* within 0.5 s: its producer's method still runs"):
        producer.publish_from(0, Generator.remote(), "slow", 2, timeout_s=0.5)
    assert consumer.claim(0).batch.to_pydict() == {"a": [1]}


@pytest.mark.ci
def test_work_longer_than_the_limit_on_silence_is_waited_for_by_both_sides(job_id):
    limit_s, work_s = 1.0, 5.0
    given: dict[str, float] = {"timeout_s": limit_s, "heartbeat_s": 0.2}  # heard from well within the limit
    with Producer(job_id, **given) as producer, Consumer(job_id, **given) as consumer:
        began = time.monotonic()
        work = threading.Thread(target=lambda: producer.publish_from(0, Generator.remote(), "slow", work_s))
        work.start()
        assert consumer.claim(0).batch.to_pydict() == {"a": [1]}
        assert time.monotonic() - began > work_s
        work.join()
        with pytest.raises(WaitTimeout, match="within 1 s"):
            producer.publish_from(1, Generator.remote(), "slow", work_s, timeout_s=limit_s)


@pytest.mark.ci
def test_bad_columns_and_ids_are_refused_and_nothing_is_lost(pair):
    producer, consumer = pair
    producer.publish(0, columns(0))
    with pytest.raises(BatchError, match=r"rewards.*tokens|tokens.*rewards"):
        producer.publish(1, {"tokens": [[1], [2]], "rewards": [1.0]})
    for bad in (-1, 1.0, "1", None, True):
        with pytest.raises(BadInput, match="rollout id"):
            producer.publish(bad, columns(0))
        if bad is not None:
            with pytest.raises(BadInput, match="rollout id"):
                consumer.claim(bad)
    with pytest.raises(BadInput, match="cannot publish a list"):
        producer.publish(1, [1, 2, 3])
    assert [located.rollout_id for located in consumer.catalog()] == [0]
    assert consumer.claim(0).batch == columns(0)


@pytest.mark.ci
def test_a_wait_ends_with_a_verdict(pair):
    producer, consumer = pair
    with pytest.raises(WaitTimeout, match=r"no rollout 5 of job .* within 0.5 s: the producer .*doing: ") as raised:
        consumer.claim(5, timeout_s=0.5)
    assert raised.value.verdict["kind"] == "alive"
    with pytest.raises(WaitTimeout, match=r"no demand of job .* the consumer"):
        producer.next_demand(timeout_s=0.5)


@pytest.mark.core
@pytest.mark.parametrize("max_ahead", [0, 1])
def test_going_ahead(job_id, max_ahead):
    with Producer(job_id, max_ahead=max_ahead) as producer, Consumer(job_id) as consumer:
        assert consumer.max_ahead == max_ahead
        consumer.demand(3)
        for rollout_id in range(3, 4 + max_ahead):
            assert producer.next_demand(5) == rollout_id
            producer.publish(rollout_id, columns(rollout_id))
        with pytest.raises(WaitTimeout):
            producer.next_demand(0.3)


@pytest.mark.core
def test_every_group_gets_every_rollout(job_id):
    with Producer(job_id) as producer, Consumer(job_id) as train, Consumer(job_id, group="archive") as archive:
        producer.publish(0, columns(0))
        train.claim().ack()
        with archive.claim() as rollout:
            assert rollout.batch == columns(0)
        wait_for(lambda: train.status()["held_bytes"] == 0, 5)


def test_an_exception_gives_the_rollout_back_and_fails_the_job(job_id):
    with Producer(job_id) as producer, Consumer(job_id) as other:
        producer.publish(0, columns(0))
        with pytest.raises(ValueError, match="nan"), Consumer(job_id) as consumer, consumer.claim(0):
            raise ValueError("nan")
        assert other.claim(0, timeout_s=5).batch == columns(0)
        other.ack(0)
    assert producer.connection.call("status", job_id)[job_id]["requeued"] == 1


@pytest.mark.ci
def test_the_end_of_the_stream_and_its_failure_are_told_apart(job_id):
    with Consumer(job_id, timeout_s=10) as consumer:
        with Producer(job_id) as producer:
            producer.publish(0, columns(0))
        assert [rollout.rollout_id for rollout in consumer] == [0]
        with pytest.raises(EndOfStream):
            consumer.claim(1)
        with pytest.raises(EndOfStream), Consumer(job_id, group="other", timeout_s=10) as other:
            other.claim(1)
        assert consumer.status()["consumers"]["other"]["state"] == "finished"
        with pytest.raises(KeyError), Producer(job_id):
            raise KeyError("reward")
        with pytest.raises(PeerFailed, match="KeyError: 'reward'"):
            consumer.claim(1)
        with pytest.raises(BadInput, match="has ended"):
            producer.publish(1, columns(1))


def test_a_newer_producer_of_the_same_ray_job_fences_the_older(job_id):
    older = Producer(job_id, heartbeat_s=0.2)
    with Producer(job_id) as newer:
        wait_for(lambda: older._fault, 5)
        with pytest.raises(Fenced, match="replaced"):
            older.publish(0, columns(0))
        newer.publish(0, columns(0))


@pytest.mark.ci
def test_the_newest_weights_win_and_older_ones_are_freed(pair):
    producer, consumer = pair
    assert producer.weights() is None
    node = ray.get_runtime_context().get_node_id()
    before = ray.get(producer.connection.vault_on(node).stats.remote())["payloads"]
    for version in range(3):
        consumer.publish_weights(version, {"w": np.full(1000, version, np.float32), "b": np.array(version)})
    weights = producer.weights()
    assert (weights.version, list(weights)) == (2, ["w", "b"])
    assert weights["w"].tolist() == [2.0] * 1000
    assert not weights["w"].flags.writeable  # a view of shared memory
    assert producer.weights(newer_than=2, timeout_s=0.2) is None
    wait_for(lambda: ray.get(producer.connection.vault_on(node).stats.remote())["payloads"] == before + 1, 10)
    assert weights["w"].tolist() == [2.0] * 1000


def owner_died(ref):
    try:
        ray.get(ref, timeout=5)
    except (ray.exceptions.OwnerDiedError, ray.exceptions.GetTimeoutError):  # Ray 2.47 waits for ever
        return True
    return False


@pytest.mark.core
def test_the_names_of_the_proposal(job_id):
    maker = Generator.remote()
    ref = ray.get(maker.put.remote(columns(0)))[0]
    with setup_cross_job_communication(namespace="slime_shared") as broker:
        assert broker.list_available_rollouts(job_id) == []
        assert broker.store_rollout_data(job_id, 0, ref) == 1
        ray.kill(maker)  # the owner of the ref that was handed in
        wait_for(lambda: owner_died(ref), 20)  # the witness: the ref alone is lost
        assert broker.list_available_rollouts(job_id) == [(job_id, 0)]
        assert (job_id, 0) in broker.list_available_rollouts()
        assert ray.get(setup_cross_job_communication().get_rollout_data(job_id, 0)) == columns(0)
        with pytest.raises(RolloutNotFound, match="rollout 1"):
            broker.get_rollout_data(job_id, 1)
    data = DataProducer(job_id)
    assert ray.get(data.produce_data("stats", {"mean": 1})) == {"mean": 1}
    data.produce_data("stats", {"mean": 2})
    assert ray.get(DataProducer(job_id).get_data_ref("stats")) == {"mean": 2}
    with pytest.raises(RolloutNotFound, match="no data under 'other'"):
        data.get_data_ref("other")


@pytest.mark.ci
def test_a_broker_of_another_protocol_is_refused(job_id):
    options = {"name": BROKER_NAME, "namespace": job_id, "num_cpus": 0}
    broker = ray.remote(Broker).options(**options).remote(job_id, protocol=999)
    with pytest.raises(ProtocolMismatch, match=r"speaks protocol 999, this client \d+: give both jobs the same"):
        Connection(job_id, patience_s=patient(60))
    ray.kill(broker)
