"""Keeps both jobs of a chaos run going, as a job controller would: who ended or is given up is started again."""

import shlex
import sys
import threading
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.job_submission import JobDetails, JobStatus

from slime.cross_job.client.connection import Connection
from slime.cross_job.errors import CrossJobError
from slime.cross_job_settings import flag
from tests.support.patience import patient

JOBS = Path(__file__).parent / "jobs"
JOB_ID = "chaos"
NAMESPACE = "chaos"
LEASE_S = patient(4.0)
WORK_S = patient(8.0)  # a job that gets no answer from its actors for so long fails
PENDING_S = 60.0  # a job whose head is killed while it starts stays "pending" for 15 min, with no actor behind it
_OVER = (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.STOPPED)
SETTINGS = {
    "namespace": NAMESPACE,
    "max_ahead": 0,
    "retain": 8,
    "heartbeat_s": 0.5,
    "dead_after_s": LEASE_S,
    "peer_grace_s": 120,
    "timeout_s": 60,
}


@dataclass
class Incarnation:
    """One submitted job."""

    role: str
    submission_id: str
    started: float = field(default_factory=time.monotonic)
    given_up: bool = False  # it lives, but the broker counts it as dead; or it never began
    lost: bool = False  # its cluster is gone
    details: JobDetails | None = None  # once it is over

    @property
    def exit_code(self) -> int | None:
        return None if self.details is None else self.details.driver_exit_code


class Supervisor:
    """Runs in a thread of its own. `jobs` holds every incarnation, oldest first."""

    def __init__(self, api: str, folder: Path, seed: int, pythonpath: str, store: str = ""):
        self._folder, self._seed, self._pythonpath = folder, seed, pythonpath
        self._settings = {**SETTINGS, "store": store} if store else SETTINGS
        self.connected = threading.Lock()  # held while the cluster is another one
        self.connect(api)
        self.jobs: list[Incarnation] = []
        self.trouble: list[str] = []
        self.python = sys.executable
        self.own_node_always = False  # else every other driver runs on the head
        self.finishing = threading.Event()
        self.complete: dict[str, Any] = {}  # status of the job when the broker first said that both are through
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def connect(self, api: str) -> None:
        """To the cluster of which this process is a driver now; jobs of another one are over."""
        from job_api import job_client  # an observer on a machine has no scripts/, and asks for names only

        self._client = job_client(api)
        self.connection = Connection(NAMESPACE)

    def all_are_lost(self) -> None:
        for job in self.jobs:
            job.lost = job.lost or job.details is None

    def start(self) -> None:
        for role in ("rollout", "train"):
            self._submit(role)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(30)

    def status(self) -> dict[str, Any]:
        """What the broker says of the job; {} while nobody has attached or the broker does not answer."""
        try:
            return self.connection.call("status", timeout_s=20).get(JOB_ID, {})
        except (CrossJobError, ray.exceptions.RayError):
            return {}

    def client(self, role: str) -> dict[str, Any]:
        """What the broker says of the rollout job's or the train job's newest client."""
        return client_of(role, self.status())

    def current(self, role: str) -> Incarnation:
        return [job for job in self.jobs if job.role == role][-1]

    def log(self, job: Incarnation, characters: int = 2000) -> str:
        """The end of what it printed, without what Ray tells every job of every death."""
        try:
            lines = self._client.get_job_logs(job.submission_id).splitlines()
        except (RuntimeError, OSError) as error:  # requests raises OSError where nobody listens
            return f"(no log: {error})"
        return "\n".join(line for line in lines if "(raylet)" not in line)[-characters:]

    def through(self) -> bool:
        """Whether both newest jobs have ended well."""
        newest = [self.current(role) for role in ("rollout", "train")]
        return all(j.details is not None and j.details.status == JobStatus.SUCCEEDED for j in newest)

    def _submit(self, role: str) -> None:
        options = [f"{flag(name)}={value}" for name, value in self._settings.items()]
        command = [self.python, str(JOBS / f"chaos_{role}.py"), "--job-id", JOB_ID, *options]
        command += ["--seed", str(self._seed), "--folder", str(self._folder), "--work-s", str(WORK_S)]
        number = sum(job.role == role for job in self.jobs)
        submission_id = f"{role}-{number}-{uuid.uuid4().hex[:6]}"
        self._client.submit_job(
            entrypoint=shlex.join(command),
            submission_id=submission_id,
            # a driver on the node of its actors dies with it
            entrypoint_resources={role: 0.01} if self.own_node_always or number % 2 == 0 else None,
            runtime_env={"env_vars": {"PYTHONPATH": self._pythonpath}} if self._pythonpath else None,
        )
        self.jobs.append(Incarnation(role, submission_id))

    def _run(self) -> None:
        while not self._stop.wait(0.2):
            try:
                with self.connected:
                    self._look()
            except Exception as error:  # Ray's job server may be slow for a moment; the next look counts
                self.trouble.append(f"supervisor: {error!r}")

    def _look(self) -> None:
        for job in [j for j in self.jobs if j.details is None and not j.lost]:
            details = self._client.get_job_info(job.submission_id)
            pending = details.status == JobStatus.PENDING and not job.given_up
            if details.status in _OVER:
                job.details = details
            elif pending and time.monotonic() > job.started + PENDING_S:
                job.given_up = True
                self._client.stop_job(job.submission_id)
        status = self.status()
        if self.finishing.is_set() and status.get("complete"):
            self.complete = self.complete or status
        for role in ("rollout", "train"):
            job = self.current(role)
            if job.details is None and not job.lost:
                client = client_of(role, status)
                stalled = client.get("state") in ("dead", "silent") and client["submission_id"] == job.submission_id
                job.given_up = job.given_up or stalled
            done = self.finishing.is_set() and job.details is not None and job.details.status == JobStatus.SUCCEEDED
            if (job.details is not None or job.given_up or job.lost) and not done:
                self._submit(role)


def client_of(role: str, status: dict[str, Any]) -> dict[str, Any]:
    """The newest client of the rollout job or the train job, of what the broker says."""
    found = status.get("producer") if role == "rollout" else status.get("consumers", {}).get("train")
    return found or {}
