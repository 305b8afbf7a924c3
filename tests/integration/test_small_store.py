"""A node whose object store cannot hold one rollout: it is named, and the rollout arrives all the same."""

import os
import subprocess
import sys

from job_api import job_client
from local_cluster import LocalCluster
from tests.support.ray_jobs import PYTHONPATH, Job


def test_a_rollout_that_is_larger_than_the_object_store_is_named_and_arrives(job_id):
    with LocalCluster(object_store_bytes=80_000_000, env={"PYTHONPATH": PYTHONPATH}) as cluster:
        client = job_client(cluster.api)
        consumer = Job(client, "consume.py", job_id, "--samples", 7_000)
        producer = Job(client, "produce.py", job_id, "--rollouts", 1, "--samples", 7_000)
        assert producer.wait(90) == "SUCCEEDED", producer.logs
        assert "is larger than its node's object store (80000000)" in producer.logs
        assert "--object-store-memory" in producer.logs
        assert consumer.wait(60) == "SUCCEEDED", consumer.logs


LOOP = """
import sys
import numpy as np
import ray
from slime.cross_job.errors import RolloutNotFound
from slime.utils.cross_job_utils import CrossJobDataBroker

MB = 1_000_000
ray.init(address=sys.argv[1], log_to_driver=False)
with CrossJobDataBroker(max_bytes=int(sys.argv[3])) as broker:
    for rollout_id in range(60):
        broker.store_rollout_data(sys.argv[2], rollout_id, ray.put(np.full(4 * MB, rollout_id, np.uint8)))
        if rollout_id % 2 == 0:
            assert ray.get(broker.get_rollout_data(sys.argv[2], rollout_id))[0] == rollout_id
        held = broker._connection.call("status", sys.argv[2])[sys.argv[2]]["held_bytes"]
        assert 4 * MB <= held <= int(sys.argv[3]), held
    there = [rollout_id for _, rollout_id in broker.list_available_rollouts(sys.argv[2])]
    assert there[-1] == 59 and len(there) in (3, 4), there
    try:
        broker.get_rollout_data(sys.argv[2], 1)
        raise AssertionError("it was freed")
    except RolloutNotFound as error:
        assert "freed, as its retention says" in str(error), error
    node = ray.get_runtime_context().get_node_id()
    stats = ray.get(broker._connection.vault_on(node).stats.remote())
    assert stats["nbytes"] <= 20 * MB, stats
print("stored 240 MB in", ray.cluster_resources()["object_store_memory"])
"""


def test_what_the_proposals_api_stores_never_fills_the_object_store(job_id):
    """60 rollouts of 4 MB, of opaque refs that nobody acks, in an object store of 80 MB."""
    with LocalCluster(object_store_bytes=80_000_000, env={"PYTHONPATH": PYTHONPATH}) as cluster:
        loop = [sys.executable, "-c", LOOP, cluster.address, job_id, "17000000"]
        env = {**os.environ, "PYTHONPATH": PYTHONPATH, "RAY_AUTH_MODE": "disabled"}
        done = subprocess.run(loop, env=env, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        assert "stored 240 MB" in done.stdout
