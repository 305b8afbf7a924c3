"""What is published with a durable store outlives vaults, broker, and the whole Ray cluster."""

import asyncio
import os
import shutil
import signal
import threading
import time
import uuid

import pytest
import ray

from job_api import job_client
from local_cluster import LocalCluster, command_of
from slime.cross_job import Consumer, Producer
from slime.cross_job.errors import BadInput, Refused, StoreRefused, StoreUnreachable, WaitTimeout
from slime.cross_job.storage import open_store
from slime.cross_job.storage.payloads import Archive
from slime.cross_job.storage.wal import owner_of
from slime.cross_job.types import BROKER_NAME, VAULT_NAME
from tests.integration.jobs.speak import columns
from tests.support.ray_jobs import PYTHONPATH, Job, wait_for


@pytest.fixture(params=["file", "redis"])
def store(request, tmp_path):
    if request.param == "file":
        return f"file://{tmp_path}/store"
    return request.getfixturevalue("own_redis")(durable=True).uri


def new_cluster() -> LocalCluster:
    return LocalCluster(env={"PYTHONPATH": PYTHONPATH})


@pytest.mark.parametrize(
    ("store", "mode"),
    [pytest.param("file", "write-through", marks=pytest.mark.core), ("redis", "write-behind")],
    indirect=["store"],
)
def test_a_cluster_that_is_lost_entirely_loses_nothing_that_was_stored(store, mode, tmp_path):
    job_id = f"lost-{uuid.uuid4().hex[:6]}"
    options = ["--mode", mode, "--compression", "zstd" if mode == "write-behind" else "none"]
    with new_cluster() as first:
        client = job_client(first.api)
        producer = Job(client, "durable.py", job_id, store, "producer", *options)
        consumer = Job(client, "durable.py", job_id, store, "consumer", *options)
        *claimed, status = consumer.all_said(5)
        assert [line["claimed"] for line in claimed] == [0, 1, 2, 3]
        assert (status["published"], status["acked"], status["losses"]) == (4, 2, 0)
        archive = Archive(open_store(store), job_id)
        wait_for(lambda: len(archive.names()) >= 7, 30)  # 4 rollouts, 2 large sources, weights
        assert first.kill()
    with new_cluster() as second:
        client = job_client(second.api)
        resumed = Job(client, "durable.py", job_id, store, "resumed", *options, "--until", "6")
        producer = Job(client, "durable.py", job_id, store, "producer", *options, "--until", "6")
        *claimed, status = resumed.all_said(5, 90)
        assert [(line["claimed"], line["version"]) for line in claimed] == [(r, 1) for r in (2, 3, 4, 5)]
        assert (status["published"], status["acked"], status["losses"]) == (6, 6, 0)
        assert resumed.wait() == "SUCCEEDED", resumed.logs
        made = producer.all_said(2)
        assert [(line["published"], line["first"]) for line in made] == [(4, 4), (5, 5)], "a prompt was skipped"


def broker_pid(cluster: LocalCluster) -> int:
    (only,) = [pid for pid in cluster.pids() if command_of(pid)[0].startswith("ray::Broker")]
    return only


def test_of_two_brokers_that_keep_one_job_the_one_that_slept_is_fenced(tmp_path):
    """The broker of one cluster is stopped (SIGSTOP) until the job goes on on another one."""
    job_id, store = f"fenced-{uuid.uuid4().hex[:6]}", f"file://{tmp_path}/store"

    def replicas() -> str:
        return str(owner_of(open_store(store), job_id)["broker"])

    with new_cluster() as first, new_cluster() as second:
        there, here = job_client(first.api), job_client(second.api)
        replaced = [Job(there, "durable.py", job_id, store, role) for role in ("producer", "consumer")]
        *_, status = replaced[1].all_said(5)
        assert (status["published"], status["acked"]) == (4, 2)
        before, slept = replicas(), broker_pid(first)
        os.kill(slept, signal.SIGSTOP)
        resumed = Job(here, "durable.py", job_id, store, "resumed", "--until", "6")
        wait_for(lambda: replicas() != before, 90)
        Job(here, "durable.py", job_id, store, "producer", "--until", "6")
        os.kill(slept, signal.SIGCONT)

        def are_told() -> bool:
            logs = [job.logs for job in replaced]  # the second may hear of it once the job is through there
            return all("must stop: " in log for log in logs) and any("which is alive" in log for log in logs)

        wait_for(are_told, 60, lambda: str([job.logs for job in replaced]))
        *claimed, status = resumed.all_said(5, 90)
        assert [(line["claimed"], line["version"]) for line in claimed] == [(r, 1) for r in (2, 3, 4, 5)]
        assert (status["published"], status["acked"], status["losses"]) == (6, 6, 0)
        assert resumed.wait() == "SUCCEEDED", resumed.logs


@pytest.mark.ci
def test_what_was_acked_is_freed_in_the_store_too(driver, store, job_id):
    settings = {"namespace": job_id, "store": store}
    archive = Archive(open_store(store), job_id)
    with Producer(job_id, **settings) as producer, Consumer(job_id, **settings) as consumer:
        for rollout_id in range(3):
            producer.publish(rollout_id, columns(rollout_id))
        assert len(archive.names()) == 3
        for rollout_id in range(3):
            consumer.claim(rollout_id).ack()
        wait_for(lambda: open_store(store).keys(f"{job_id}/payload") == [], 20)


@pytest.mark.ci
def test_a_full_store_makes_the_producer_wait_and_says_so_to_both(driver, own_redis, job_id):
    settings = {"namespace": job_id, "store": own_redis(durable=True, maxmemory="6mb").uri, "heartbeat_s": 0.2}
    with Producer(job_id, **settings) as producer, Consumer(job_id, **settings) as consumer:
        for rollout_id in range(100):
            consumer.demand(rollout_id)
        published: list[int] = []

        def fill() -> None:
            for rollout_id in range(100):
                producer.publish(rollout_id, columns(rollout_id, 40), timeout_s=4)
                published.append(rollout_id)

        with pytest.raises(StoreUnreachable, match=r"no room for .* in redis://.*raise maxmemory, or keep less"):
            fill()
        assert len(published) >= 2
        late = threading.Thread(target=lambda: producer.publish(len(published), columns(7, 40), timeout_s=60))
        late.start()
        said = ""

        def tells_why() -> bool:
            nonlocal said
            with pytest.raises(WaitTimeout) as error:
                consumer.claim(len(published) + 1, timeout_s=1)
            said = str(error.value)
            return "publishing rollout" in said and ": no room for" in said

        wait_for(tells_why, 20, lambda: said)
        for rollout_id in published:
            with consumer.claim(rollout_id) as rollout:
                assert rollout.batch.to_pydict() == columns(rollout_id, 40)
        late.join(30)
        assert consumer.claim(len(published), timeout_s=20).batch.to_pydict() == columns(7, 40)


@pytest.mark.core
def test_a_store_that_is_away_is_ridden_out_and_nothing_is_lost(driver, own_redis, job_id):
    server = own_redis(durable=True)
    settings = {"namespace": job_id, "store": server.uri}
    with Producer(job_id, **settings) as producer, Consumer(job_id, **settings) as consumer:
        producer.publish(0, columns(0))
        server.kill()
        publishing = threading.Thread(target=lambda: producer.publish(1, columns(1), timeout_s=60))
        claiming = threading.Thread(target=lambda: consumer.claim(0, timeout_s=60).ack())
        for thread in (publishing, claiming):
            thread.start()
        time.sleep(4)
        assert publishing.is_alive()
        assert claiming.is_alive(), "it was answered before it was kept"
        server.start()
        for thread in (publishing, claiming):
            thread.join(30)
        assert consumer.claim(1).batch.to_pydict() == columns(1)
        assert consumer.status()["losses"] == 0


@pytest.mark.ci
def test_a_store_that_is_emptied_in_mid_run_ends_nobody_and_is_filled_again(driver, store, job_id):
    settings = {"namespace": job_id, "store": store, "heartbeat_s": 0.2}
    archive = Archive(open_store(store), job_id)
    with Producer(job_id, **settings) as producer, Consumer(job_id, **settings) as consumer:
        for rollout_id in range(3):
            producer.publish(rollout_id, columns(rollout_id))
        if store.startswith("file:"):
            shutil.rmtree(store.removeprefix("file://"))
        else:
            open_store(store)._redis.flushall()
        assert archive.names() == []
        producer.publish(3, columns(3))
        for rollout_id in range(4):
            assert consumer.claim(rollout_id).batch.to_pydict() == columns(rollout_id)
        wait_for(lambda: len(archive.names()) == 4, 30)
        status = consumer.status()
        assert (status["events"]["store emptied"], status["lost"], status["losses"]) == (1, [], 0)
        for name in (f"{VAULT_NAME}_{producer.info.node_id}", BROKER_NAME):  # nobody but the store remembers
            ray.kill(ray.get_actor(name, namespace=job_id), no_restart=True)
        producer.finish = lambda: None
        consumer.finish = lambda: None
    with Consumer(job_id, **settings) as again:
        assert again.get(3).batch.to_pydict() == columns(3)
        assert again.status()["published"] == 4


@pytest.mark.core
def test_what_is_damaged_in_the_store_is_named_and_generated_again(driver, job_id, tmp_path):
    store = f"file://{tmp_path}/store"
    settings = {"namespace": job_id, "store": store}
    with Producer(job_id, **settings) as producer, Consumer(job_id, timeout_s=30, **settings) as consumer:
        for rollout_id in range(2):
            producer.publish(rollout_id, columns(rollout_id))
        vault = ray.get_actor(f"{VAULT_NAME}_{producer.info.node_id}", namespace=job_id)
        ray.kill(vault, no_restart=False)

        def is_back() -> bool:
            try:
                return bool(ray.get(vault.hello.remote()))
            except ray.exceptions.RayActorError:
                return False

        wait_for(is_back, 30)
        part = min(p for p in (tmp_path / "store" / job_id / "payload").iterdir() if ".0." in p.name)
        part.write_bytes(part.read_bytes()[:-8])
        consumer.demand(0)
        claimed = [consumer.claim(timeout_s=30)]
        assert claimed[0].rollout_id == 1, "what is whole is read from the store"
        assert claimed[0].batch.to_pydict() == columns(1)
        assert producer.next_demand(20) == 0
        producer.publish(0, columns(0))
        assert consumer.claim(0).version == 2
        assert ": part 0 has" in next(iter(Archive(open_store(store), job_id).quarantined().values()))


@pytest.mark.ci
@pytest.mark.parametrize(
    ("settings", "kind", "said"),
    [
        ({"store": "file:///no/such/folder/at/all"}, BadInput, "is no folder here"),
        ({"store_mode": "write-behind"}, BadInput, "has no effect without --cross-job-store"),
        ({"store": "file:///tmp", "compression": "rar"}, BadInput, "must be one of none, lz4, zstd"),
    ],
)
def test_a_store_that_cannot_be_is_an_error_at_once(driver, job_id, settings, kind, said):
    with pytest.raises(kind, match=said):
        Producer(job_id, namespace=job_id, **settings)


@pytest.mark.ci
def test_both_sides_have_the_same_store_and_passwords_are_not_told(driver, own_redis, job_id, tmp_path):
    server = own_redis(durable=True, requirepass="secret")
    with Producer(job_id, namespace=job_id, store=server.uri) as producer:
        with pytest.raises(Refused) as refused:
            Consumer(job_id, namespace=job_id, store=f"file://{tmp_path}/other")
        assert "--cross-job-store" in str(refused.value)
        assert "secret" not in str(refused.value)
        assert producer.status()["store"] == server.uri.replace("secret", "***")
        with Consumer(job_id, namespace=job_id) as consumer:  # takes what the other says
            producer.publish(0, columns(0))
            assert consumer.claim(0)._located.payload.stored
    with pytest.raises(StoreRefused, match="check user and password"):
        Producer(f"{job_id}2", namespace=job_id, store=server.uri.replace("secret", "wrong"))


@pytest.mark.ci
def test_a_broker_that_dies_reads_its_journal_where_no_vault_remembers(driver, job_id, tmp_path):
    settings = {"namespace": job_id, "store": f"file://{tmp_path}/store", "retain": 1}
    producer = Producer(job_id, **settings)
    with Consumer(job_id, **settings) as consumer:
        for rollout_id in range(3):
            producer.publish(rollout_id, columns(rollout_id))
        consumer.claim(0).ack()
        for name in (f"{VAULT_NAME}_{producer.info.node_id}", BROKER_NAME):
            ray.kill(ray.get_actor(name, namespace=job_id), no_restart=True)
        producer.finish = lambda: None
    with Consumer(job_id, **settings) as again:
        assert again.status()["losses"] == 0
        assert [again.claim().rollout_id for _ in range(2)] == [1, 2]
        assert again.get(0).batch.to_pydict() == columns(0)


def test_a_subscriber_sees_each_rollout_once_also_the_next_one_of_its_group(driver, store, job_id):
    settings = {"namespace": job_id, "store": store}
    with Producer(job_id, **settings) as producer, Consumer(job_id, **settings) as train:
        with Consumer(job_id, group="archive", **settings) as archive:
            for rollout_id in range(3):
                producer.publish(rollout_id, columns(rollout_id))
                train.claim(rollout_id).ack()
            seen = []
            for rollout in archive.subscribe(start=1, timeout_s=20):
                seen.append(rollout.rollout_id)
                assert rollout.batch.to_pydict() == columns(rollout.rollout_id)
                if len(seen) == 2:
                    break  # it has not come to the end of what it does with rollout 2
            archive.stop()
        assert seen == [1, 2]
        publishing = threading.Timer(1, lambda: [producer.publish(3, columns(3)), producer.finish()])
        publishing.start()

        async def follow() -> list[int]:
            with Consumer(job_id, group="archive", **settings) as again:
                return [rollout.rollout_id async for rollout in again.asubscribe(timeout_s=20)]

        assert asyncio.run(follow()) == [2, 3]
        publishing.join()
