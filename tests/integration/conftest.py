"""A private Ray cluster for all integration tests, real Ray jobs on it, and the columns that they hand over."""

import json
import os
import shlex
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from local_cluster import LocalCluster
from ray.job_submission import JobSubmissionClient

ROOT = Path(__file__).resolve().parents[2]
JOBS = Path(__file__).parent / "jobs"
PYTHONPATH = os.pathsep.join([str(ROOT / "slime_overlay"), str(JOBS)])


class Job:
    """A job submitted with Ray's job API."""

    def __init__(self, client: JobSubmissionClient, script: str, *args: Any):
        self.client = client
        entrypoint = shlex.join([sys.executable, str(JOBS / script), *map(str, args)])
        self.id = client.submit_job(
            entrypoint=entrypoint, runtime_env={"env_vars": {"PYTHONPATH": PYTHONPATH}}, submission_id=f"t{uuid.uuid4().hex}"
        )

    @property
    def status(self) -> str:
        return self.client.get_job_status(self.id).value

    @property
    def logs(self) -> str:
        return self.client.get_job_logs(self.id)

    def wait(self, timeout_s: float = 60) -> str:
        """Wait for the end of the job; returns its status."""
        wait_for(lambda: self.status in ("SUCCEEDED", "FAILED", "STOPPED"), timeout_s, lambda: f"{self.id}: {self.logs}")
        return self.status

    def said(self, timeout_s: float = 60) -> dict[str, Any]:
        """The first line that the job printed with `say` (see jobs/speak.py)."""
        return self.all_said(1, timeout_s)[0]

    def all_said(self, count: int, timeout_s: float = 60) -> list[dict[str, Any]]:
        lines: list[dict[str, Any]] = []

        def enough() -> bool:
            lines[:] = [json.loads(line[5:]) for line in self.logs.splitlines() if line.startswith("SAID ")]
            return len(lines) >= count or self.status in ("FAILED", "STOPPED")

        wait_for(enough, timeout_s, lambda: f"{self.id}: {self.logs}")
        assert len(lines) >= count, self.logs
        return lines


def wait_for(condition: Callable[[], Any], timeout_s: float, why: Callable[[], str] = str) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {why()}"
        time.sleep(0.1)
    return found


@pytest.fixture(scope="session")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(env={"PYTHONPATH": PYTHONPATH}) as cluster:
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
    client = JobSubmissionClient(cluster.api)
    jobs: list[Job] = []

    def start(script: str, *args: Any) -> Job:
        jobs.append(Job(client, script, *args))
        return jobs[-1]

    yield start
    for job in jobs:
        if job.status in ("PENDING", "RUNNING"):
            client.stop_job(job.id)


@pytest.fixture
def job_id(request: pytest.FixtureRequest) -> str:
    return f"{request.node.originalname}-{uuid.uuid4().hex[:6]}"[-100:].lstrip("_")
