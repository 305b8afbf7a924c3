"""Jobs submitted with Ray's job API, as tests see them."""

import contextlib
import json
import os
import shlex
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray.job_submission import JobSubmissionClient

ROOT = Path(__file__).resolve().parents[2]
JOBS = Path(__file__).parent / "jobs"
PYTHONPATH = os.pathsep.join([str(ROOT / "slime_overlay"), str(JOBS)])


class SubmittedJob:
    """A job submitted with Ray's job API: a command line, and more environment variables for all its processes."""

    def __init__(self, client: JobSubmissionClient, command: list[str], env: dict[str, str]):
        self.client = client
        self._words = [word.encode() for word in command]
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
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and (entry / "cmdline").read_bytes().split(b"\0")[:-1] == self._words:
                    found.append(int(entry.name))
        assert found, f"{self.id} has no driver: {self.logs}"
        return min(found)

    def wait(self, timeout_s: float = 60) -> str:
        """Wait for the end of the job; returns its status."""
        wait_for(
            lambda: self.status in ("SUCCEEDED", "FAILED", "STOPPED"), timeout_s, lambda: f"{self.id}: {self.logs}"
        )
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


class Job(SubmittedJob):
    """One of the scripts in jobs/."""

    def __init__(self, client: JobSubmissionClient, script: str, *args: Any):
        command = [sys.executable, str(JOBS / script), *map(str, args)]
        super().__init__(client, command, {"PYTHONPATH": PYTHONPATH})


def wait_for(condition: Callable[[], Any], timeout_s: float, why: Callable[[], str] = str) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {why()}"
        time.sleep(0.1)
    return found
