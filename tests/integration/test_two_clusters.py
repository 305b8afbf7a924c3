"""One experiment, its two jobs on two Ray clusters that share nothing but a durable store; then one cluster dies."""

import contextlib
import os
import signal
import uuid
from pathlib import Path

import pytest
import ray
from job_api import job_client
from local_cluster import LocalCluster
from ray_jobs import PYTHONPATH, Job, SubmittedJob, wait_for

from slime.cross_job.books import keeper_of
from slime.cross_job.stores import open_store

pytestmark = pytest.mark.again


@pytest.fixture(params=["file", "redis"])
def store(request, tmp_path):
    if request.param == "file":
        return f"file://{tmp_path}/store"
    return request.getfixturevalue("own_redis")(durable=True).uri


def claimed(job: SubmittedJob, count: int, timeout_s: float = 90) -> list[int]:
    lines = job.all_said(1 + count, timeout_s)
    found = [line for line in lines if "claimed" in line]
    assert all(line["version"] == 1 and line["prompt"] == line["claimed"] for line in found), found
    return [line["claimed"] for line in found]


def broker_pid(cluster: LocalCluster, least: int = 1) -> int:
    """0: no broker runs there, where `least` allows that."""
    found = []
    for pid in cluster.pids():
        with contextlib.suppress(OSError):  # it has ended since
            if b"ray::Broker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    assert len(found) >= least, "no broker runs there"
    return max(found, default=0)


def test_a_job_whose_sides_are_on_two_clusters_survives_the_death_of_either_broker_and_of_one_cluster(store):
    """The producer's cluster keeps the job; the consumer's broker is killed, then the producer's whole cluster."""
    job_id = f"two-{uuid.uuid4().hex[:6]}"
    with (
        LocalCluster(env={"PYTHONPATH": PYTHONPATH}) as first,
        LocalCluster(env={"PYTHONPATH": PYTHONPATH}) as second,
    ):
        there, here = job_client(first.api), job_client(second.api)
        producer = Job(there, "clusters.py", job_id, store, "producer", "--until", "30")
        producer.all_said(1)
        keeper = keeper_of(open_store(store), job_id)
        consumer = Job(here, "clusters.py", job_id, store, "consumer", "--until", "30")
        assert claimed(consumer, 4) == [0, 1, 2, 3]
        follower = broker_pid(second)
        os.kill(follower, signal.SIGKILL)  # it knows nothing that is not told it again
        wait_for(lambda: broker_pid(second, least=0) not in (0, follower), 30)
        done = claimed(consumer, 8)
        assert done == [*range(len(done))]
        assert keeper_of(open_store(store), job_id)["broker"] == keeper["broker"]
        assert first.kill()  # the keeper, with its whole cluster
        wait_for(lambda: keeper_of(open_store(store), job_id)["broker"] != keeper["broker"], 60)
        again = Job(here, "clusters.py", job_id, store, "producer", "--until", "30")
        assert consumer.wait(120) == "SUCCEEDED", consumer.logs
        *lines, status = consumer.all_said(32)
        assert [line["claimed"] for line in lines[1:]] == [*range(30)]
        assert [line["prompt"] for line in lines[1:]] == [*range(30)], "a prompt was skipped, or taken twice"
        assert (status["acked"], status["losses"], status["republished"]) == (30, 0, 0)
        assert again.said()["epoch"] == 2
        here.stop_job(again.id)


def test_the_slime_way_of_two_clusters_is_refused(driver, job_id, tmp_path):
    """Who exchanges handles of actors with its peer is told that both must be on one cluster."""
    from slime.cross_job import Consumer
    from slime.cross_job.errors import Refused

    store = f"file://{tmp_path}/store"
    with LocalCluster(env={"PYTHONPATH": PYTHONPATH}) as other:
        producer = Job(job_client(other.api), "clusters.py", job_id, store, "producer", "--until", "3")
        producer.all_said(1)
        with pytest.raises(Refused, match="is kept on another Ray cluster"):
            Consumer(job_id, namespace=job_id, store=store, one_cluster=True)
        with Consumer(job_id, namespace=job_id, store=store, timeout_s=60, group="archive") as archive:
            archive.demand(0)
            assert archive.claim(0).meta == {"prompt": 0}
    assert ray.is_initialized()
