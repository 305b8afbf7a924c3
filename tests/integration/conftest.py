"""A private Ray cluster for all integration tests, real Ray jobs on it, and the columns that they hand over."""

import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from job_api import job_client
from local_cluster import LocalCluster
from tests.support.ray_jobs import PYTHONPATH, Job


@pytest.fixture(scope="session")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(env={"PYTHONPATH": PYTHONPATH, "RAY_JOB_STOP_WAIT_TIME_S": "30"}) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def driver(cluster: LocalCluster) -> Iterator[LocalCluster]:
    """This process as a driver on the cluster, in a Ray namespace that has nothing to do with cross-job's."""
    os.environ["RAY_AUTH_MODE"] = "disabled"
    ray.init(address=cluster.address, log_to_driver=False, namespace="elsewhere")
    yield cluster
    ray.shutdown()


@pytest.fixture
def submit(cluster: LocalCluster) -> Iterator[Callable[..., Job]]:
    client = job_client(cluster.api)
    jobs: list[Job] = []

    def start(script: str | Path, *args: Any) -> Job:
        jobs.append(Job(client, script, *args))
        return jobs[-1]

    yield start
    for job in jobs:
        if job.status in ("PENDING", "RUNNING"):
            client.stop_job(job.id)


@pytest.fixture
def job_id(request: pytest.FixtureRequest) -> str:
    return f"{request.node.originalname}-{uuid.uuid4().hex[:6]}"[-100:].lstrip("_")
