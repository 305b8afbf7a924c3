"""Jobs submitted with Ray's job API, as tests see them."""

import json
import os
import shlex
import sys
import uuid
from pathlib import Path
from typing import Any

import psutil
from ray.job_submission import JobSubmissionClient

from local_cluster import command_of
from tests.support.patience import wait_for

ROOT = Path(__file__).resolve().parents[2]
JOBS = ROOT / "tests" / "integration" / "jobs"
PYTHONPATH = os.pathsep.join([str(ROOT / "slime_overlay"), str(JOBS)])


class SubmittedJob:
    """A job submitted with Ray's job API: a command line, and more environment variables for all its processes."""

    def __init__(self, client: JobSubmissionClient, command: list[str], env: dict[str, str]):
        self.client = client
        self._words = command
        self.id = client.submit_job(
            entrypoint=shlex.join(command),
            runtime_env={"env_vars": env},
            submission_id=f"t{uuid.uuid4().hex}",
        )

    @property
    def status(self) -> str:
        return self.client.get_job_status(self.id).value

    @property
    def logs(self) -> str:
        return self.client.get_job_logs(self.id)

    @property
    def pid(self) -> int:
        """Process id of the job's driver (its children may have its command line too). Fails when it has none."""
        found = [pid for pid in psutil.pids() if command_of(pid) == self._words]
        assert found, f"{self.id} has no driver: {self.logs}"
        return min(found)

    def moves(self) -> tuple[str, int]:
        """What changes while the job makes progress: its status, and how much it has logged."""
        return self.status, len(self.logs)

    def wait(self, timeout_s: float = 60) -> str:
        """Wait for the end of the job, while it logs something within `timeout_s`; returns its status."""
        over = ("SUCCEEDED", "FAILED", "STOPPED")
        wait_for(lambda: self.status in over, timeout_s, lambda: f"{self.id}: {self.logs}", self.moves)
        return self.status

    def said(self, timeout_s: float = 60) -> dict[str, Any]:
        """The first line that the job printed with `say` (see jobs/speak.py)."""
        return self.all_said(1, timeout_s)[0]

    def all_said(self, count: int, timeout_s: float = 60) -> list[dict[str, Any]]:
        lines: list[dict[str, Any]] = []

        def enough() -> bool:
            lines[:] = [json.loads(line[5:]) for line in self.logs.splitlines() if line.startswith("SAID ")]
            return len(lines) >= count or self.status in ("FAILED", "STOPPED")

        wait_for(enough, timeout_s, lambda: f"{self.id}: {self.logs}", self.moves)
        assert len(lines) >= count, self.logs
        return lines


class Job(SubmittedJob):
    """One of the scripts in jobs/, or another one by its whole path."""

    def __init__(self, client: JobSubmissionClient, script: str | Path, *args: Any):
        command = [sys.executable, str(JOBS / script), *map(str, args)]
        super().__init__(client, command, {"PYTHONPATH": PYTHONPATH})
