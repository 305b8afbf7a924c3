"""The Ray jobs of one role of an experiment: submitted, found again by their metadata, followed, stopped, told about.

Everything is asked of Ray's job API over HTTP. Ray's client waits without end for an answer; here each has a deadline.
Uses SIGALRM, hence the main thread.
"""

import asyncio
import contextlib
import json
import re
import signal
import sys
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from types import FrameType
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from ray.exceptions import RayError
from ray.job_submission import JobDetails
from ray.util import state
from ray.util.state.exception import RayStateApiException

from job_api import exactly, job_client, proxy_of

JOB_ID, ROLE = "cross_job_id", "cross_job_role"  # in the metadata of the jobs
ANSWER_S = 60.0
UPLOAD_S = 600.0
LOST_S = 120.0  # how long `follow` and `stop` bear a cluster that does not answer
SILENT_S = 30.0  # a log that is silent for so long: is the job over?
AGAIN_S = 1.0  # between two questions
LINES = 20
_NO_MODULE = re.compile(r"ModuleNotFoundError: No module named '([^']+)'")


class Unanswered(Exception):
    """Ray did not answer, or not as it was hoped for; the message is for users, in one line."""


class NoAnswer(Unanswered):
    """Nobody answers at the address."""


class Jobs:
    """The jobs of `role` ("rollout" or "train") of the experiment `job_id`, on the cluster at `address`."""

    def __init__(self, address: str, job_id: str, role: str):
        self.address, self.job_id, self.role = address, job_id, role
        with self._asking():
            self._client = job_client(address)

    def submit(self, **how: Any) -> str:
        """Submit a job (arguments of Ray's submit_job) that is found again; Ray's name for it."""
        with self._asking(UPLOAD_S):
            return self._client.submit_job(metadata={JOB_ID: self.job_id, ROLE: self.role}, **how)

    def refuse_a_second(self) -> None:
        """Raises Unanswered where a job of this role and experiment has not ended."""
        for job in self._all(self.role):
            if not job.status.is_terminal():
                raise Unanswered(
                    f"the {self.role} job of {self.job_id} is {job.status.value} already, as {job.submission_id} "
                    f"since {_when(job.start_time)}: end it first, launch_{self.role}.sh --job-id {self.job_id} "
                    f"--stop --address {self.address}"
                )

    def env_of_the_other(self) -> dict[str, str]:
        """Environment of the other role's job, if one has not ended."""
        other = {"rollout": "train", "train": "rollout"}[self.role]
        live = [job for job in self._all(other) if not job.status.is_terminal()]
        return (live[0].runtime_env or {}).get("env_vars") or {} if live else {}

    def entry_resources(self, wanted: dict[str, float] | None) -> dict[str, float]:
        """What the driver's node must have: `wanted`, or a little of what is named after the role, if it is there."""
        if wanted == {}:
            return {}
        with self._asking(), exactly(self.address):
            nodes = state.list_nodes(self.address, filters=[("state", "=", "ALIVE")], limit=10_000, timeout=30)
        entry = {self.role: 0.01} if wanted is None else wanted
        for node in nodes:
            if all((node.resources_total or {}).get(name, 0.0) >= amount for name, amount in entry.items()):
                return entry
        if wanted is not None:
            print(f"no node has {json.dumps(wanted)} now: the job waits for one", file=sys.stderr)
        return wanted or {}

    def latest(self) -> str:
        """Ray's name for the job that was submitted last; raises Unanswered where there is none."""
        if not (found := self._all(self.role)):
            raise Unanswered(f"no {self.role} job of {self.job_id} was submitted to the cluster at {self.address}")
        return str(found[0].submission_id)

    def follow(self, job: str) -> int:
        """Print the job's log until it ends; the job's exit code. Ending this leaves the job running."""
        try:
            return asyncio.run(self._follow(job))
        except Unanswered as error:
            print(f"lost {job}, which may go on (--follow attaches to it again): {error}", file=sys.stderr)
            return 1

    def stop(self, timeout_s: float) -> int:
        """Ask the newest job to stop, and wait until it has ended. 0 when it has, 1 when not within `timeout_s`."""
        name = self.latest()
        job, began = self._info(name), time.monotonic()
        if job.status.is_terminal():
            print(f"nothing to stop: {_words(job)}")
            return 0
        with self._asking():
            self._client.stop_job(name)
        print(f"asked {name} to stop (SIGTERM); waiting for its end, up to {timeout_s:g} s", flush=True)
        while not (job := self._info(name)).status.is_terminal():
            if time.monotonic() - began > timeout_s:
                print(
                    f"it is {job.status.value} after {timeout_s:g} s: see --status, or --stop again", file=sys.stderr
                )
                return 1
            time.sleep(AGAIN_S)
        print(f"{_words(job)} ({time.monotonic() - began:.1f} s after it was asked). The end of its log:")
        print(*(f"    {line}" for line in self._log(name)), sep="\n")
        return 0

    def tell(self, as_json: bool) -> int:
        """Print how the newest job stands."""
        job = self._info(self.latest())
        agent = urlsplit(job.driver_agent_http_address or "").hostname
        facts = {
            "submission_id": job.submission_id,
            "state": job.status.value,
            "message": _message(job),
            "started": _when(job.start_time),
            "ended": _when(job.end_time),
            "node": job.driver_info.node_ip_address if job.driver_info else agent,
            "node_id": job.driver_node_id,
            "exit_code": job.driver_exit_code,
        }
        log = self._log(str(job.submission_id))
        if as_json:
            print(json.dumps({"job_id": self.job_id, "role": self.role, **facts, "log": log}, indent=2))
            return 0
        print(f"the {self.role} job of {self.job_id}")
        for name, value in facts.items():
            print(f"  {name.replace('_', ' '):14} {'-' if value is None else value}")
        print("the end of its log:", *(f"    {line}" for line in log), sep="\n")
        return 0

    def _all(self, role: str) -> list[JobDetails]:
        """Those of `role` of the experiment, the newest first."""
        with self._asking():
            found = self._client.list_jobs()
        mine = {JOB_ID: self.job_id, ROLE: role}
        jobs = [job for job in found if job.submission_id and mine.items() <= (job.metadata or {}).items()]
        return sorted(jobs, key=lambda job: job.start_time or 0, reverse=True)

    def _info(self, job: str) -> JobDetails:
        """How it stands; bears a cluster that is away for a while (a head that is started again)."""
        deadline = time.monotonic() + LOST_S
        while True:
            try:
                with self._asking():
                    return self._client.get_job_info(job)
            except Unanswered:
                if time.monotonic() > deadline:
                    raise
                time.sleep(AGAIN_S)

    def _log(self, job: str) -> list[str]:
        try:
            with self._asking():
                return self._client.get_job_logs(job).splitlines()[-LINES:]
        except Unanswered as error:
            return [f"(no log: {error})"]

    async def _follow(self, job: str) -> int:
        printed = broken = 0
        while True:
            printed, whole = await self._print_log(job, printed)
            info = self._info(job)
            broken = 0 if whole else broken + 1
            if info.status.is_terminal() and (whole or broken > 3):
                break
            await asyncio.sleep(AGAIN_S)  # the connection was lost, not the job
        print(_words(info), flush=True)
        code = info.driver_exit_code
        return 0 if info.status.value == "SUCCEEDED" or code == 0 else max(code or 1, 1)

    async def _print_log(self, job: str, printed: int) -> tuple[int, bool]:
        """Print what the log has behind `printed` characters; how many are printed then, and whether that was all."""
        seen = 0
        log = self._client.tail_job_logs(job)  # from its beginning, each time
        while True:
            piece = asyncio.ensure_future(anext(log))
            while not (await asyncio.wait({piece}, timeout=SILENT_S))[0]:
                if self._info(job).status.is_terminal():  # and nobody told: the connection is dead
                    piece.cancel()
                    return printed, False
            try:
                text = piece.result()
            except StopAsyncIteration:
                return printed, True
            except (aiohttp.ClientError, OSError, RuntimeError):
                return printed, False
            print(text[max(0, printed - seen) :], end="", flush=True)
            seen += len(text)
            printed = max(printed, seen)

    @contextlib.contextmanager
    def _asking(self, timeout_s: float | None = None) -> Iterator[None]:
        """In this block Ray answers within `timeout_s` (ANSWER_S), or Unanswered is raised."""
        timeout_s = timeout_s or ANSWER_S

        def late(number: int, frame: FrameType | None) -> None:
            raise _Late

        before = signal.signal(signal.SIGALRM, late)
        signal.setitimer(signal.ITIMER_REAL, timeout_s)
        try:
            yield
        except _Late:
            why = f"gave no answer within {timeout_s:g} s{_proxy_words(self.address)}"
            raise NoAnswer(f"Ray's job API at {self.address} {why}") from None
        except RayError as error:  # its AuthenticationError, which Rays without tokens do not have
            raise Unanswered(_token_advice(self.address, str(error.args[0] if error.args else error))) from None
        except OSError as error:
            raise NoAnswer(
                f"no Ray job API at {self.address}: {_line(str(error))}{_proxy_words(self.address)}"
            ) from None
        except (RuntimeError, ValueError, RayStateApiException) as error:
            raise Unanswered(f"Ray at {self.address} says: {_line(str(error))}{_proxy_words(self.address)}") from None
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


class _Late(Exception):
    """No OSError, which the layers below would take for one of their own."""


def _token_advice(address: str, said: str) -> str:
    reason = _line(said).partition(". ")[0].rstrip(".")
    return (
        f"the cluster at {address} did not let us in ({reason}): set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN to its "
        "token or RAY_AUTH_TOKEN_PATH to a file with it (`ray get-auth-token` on its head prints it)"
    )


def _proxy_words(address: str) -> str:
    """Which proxy was asked in its place, and how it is not; empty where none was."""
    proxy = proxy_of(address)
    host = urlsplit(address).hostname
    return f" (through the proxy {proxy}; to go there without it, add {host} to no_proxy)" if proxy else ""


def _line(said: str) -> str:
    """The line of a message that says what went wrong: the first, or, of a traceback, the last."""
    lines = [line.strip() for line in said.splitlines() if line.strip(" .")]
    return (lines[-1] if "Traceback" in said else lines[0]) if lines else "no reason given"


def _message(job: JobDetails) -> str:
    """What Ray says of its end, without the log."""
    return (job.message or "").partition(", last available logs")[0]


def _words(job: JobDetails) -> str:
    return f"{job.submission_id}: {job.status.value} {_message(job)}".rstrip() + _import_advice(job.message or "")


def _import_advice(message: str) -> str:
    """What to do where the driver's Python lacks a module; empty where its last line says something else."""
    found = _NO_MODULE.fullmatch(message.rstrip().rpartition("\n")[2].strip())
    if found is None:
        return ""
    return (
        f"; the driver's Python has no {found[1]}: start the nodes in the environment that slime runs in, or name its "
        "folder with --env PYTHONPATH=FOLDER"
    )


def _when(milliseconds: int | None) -> str | None:
    if milliseconds is None:
        return None
    return datetime.fromtimestamp(milliseconds / 1000, timezone.utc).isoformat(" ", "seconds")
