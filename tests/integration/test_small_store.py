"""A node whose object store cannot hold one rollout: it is named, and the rollout arrives all the same."""

from local_cluster import LocalCluster
from ray.job_submission import JobSubmissionClient
from ray_jobs import PYTHONPATH, Job


def test_a_rollout_that_is_larger_than_the_object_store_is_named_and_arrives(job_id):
    with LocalCluster(object_store_bytes=80_000_000, env={"PYTHONPATH": PYTHONPATH}) as cluster:
        client = JobSubmissionClient(cluster.api)
        consumer = Job(client, "consume.py", job_id, "--samples", 7_000)
        producer = Job(client, "produce.py", job_id, "--rollouts", 1, "--samples", 7_000)
        assert producer.wait(90) == "SUCCEEDED", producer.logs
        assert "is larger than its node's object store (80000000)" in producer.logs
        assert "--object-store-memory" in producer.logs
        assert consumer.wait(60) == "SUCCEEDED", consumer.logs
