"""slime's jobs on a local cluster: single, or split in a rollout and a train job, as the tests start and read them."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from job_api import job_client
from tests.slime import single_job
from tests.slime.single_job import IN_PARTS
from tests.support.patience import patient, wait_for
from tests.support.ray_jobs import SubmittedJob

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
ROUTER_019 = Path(sys.prefix) / "router-0.1.9"  # made by scripts/env.sh
ROLLOUTS = 5
CRITIC_ONLY = 2
FIGURES = ("rollout_id", "step", "tokens", "loss", "grad_norm", "raw_reward", "checksum")
"""What is equal in equal trainings; `tokens` hashes every rank's samples, `checksum` the weights after the step."""
SILENCE_S = 240.0
"""A job that logs nothing for so long hangs (see patience.py)."""
NCCL = ("--update-weight-transport", "nccl", "--update-weight-buffer-size", "100000")
"""An update of the tests' model is several chunks."""
CROSS_JOB = ("--enable-cross-job-communication", "--job-id")


def at_pins(*first: str, also: tuple[str, ...] = ()) -> Any:
    """Run a test at these pins in .ci/run, and at those of `also` where all tests run."""
    return pytest.mark.parametrize("pin", [*(pytest.param(pin, marks=pytest.mark.ci) for pin in first), *also])


@dataclass
class Run:
    """One experiment: a patched checkout, a folder for what it reads and writes, and the jobs that were started."""

    api: str
    pin: str
    slime: Path
    root: Path
    engine: str = "toy"
    probe: bool = False
    options: dict[str, Any] = field(default_factory=dict)  # of single_job.slime_arguments
    env: dict[str, str] = field(default_factory=dict)
    extra: tuple[str, ...] = ()  # more flags of both jobs
    jobs: list[SubmittedJob] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.folders = single_job.Folders(self.root)
        self.folders.prepare()
        self.name = re.sub(r"[^A-Za-z0-9.-]", "-", f"{self.root.parent.name}-{self.root.name}")[-100:].lstrip("-.")

    def start(self, script: str, *extra: str, **options: Any) -> SubmittedJob:
        """Submit slime's `script` with the run's arguments, `options` replacing some, and `extra` behind them."""
        arguments = self.arguments(*extra, **options)
        command = [sys.executable, "-u", str(self.slime / script), *arguments]  # an absolute path stays as it is
        return self._submit(command)

    def arguments(self, *extra: str, **options: Any) -> list[str]:
        """What goes behind slime's train.py."""
        return single_job.slime_arguments(
            self.pin,
            self.folders.model,
            self.folders.prompts,
            weight_dir=self.folders.weights,
            **{"num_rollout": ROLLOUTS, **self.options, **options},
            extra=extra,
        )

    def environment(self) -> dict[str, str]:
        """Variables of all processes of its jobs."""
        env = single_job.environment(
            self.pin,
            self.slime,
            engine=self.engine,
            weight_dir=self.folders.weights,
            log=self.folders.log,
            probe=self.probe,
            log_dir=self.root,
            router_019=ROUTER_019,
        )
        return {**env, "RAY_DEDUP_LOGS": "0", **self.env}

    def start_script(self, name: str, *words: str) -> SubmittedJob:
        """Submit a script of this folder, with the patched slime on its path."""
        return self._submit([sys.executable, "-u", str(Path(__file__).with_name(name)), *words])

    def _submit(self, command: list[str]) -> SubmittedJob:
        job = SubmittedJob(job_client(self.api), command, self.environment())
        self.jobs.append(job)
        return job

    def rollout_job(self, *extra: str, script: str = "cross_job_rollout.py", **options: Any) -> SubmittedJob:
        """The rollout half."""
        flags = (*CROSS_JOB, self.name, "--cross-job-role", "rollout", *self.extra, *extra)
        return self.start(script, *flags, **options)

    def train_job(self, *extra: str, script: str = "train.py", **options: Any) -> SubmittedJob:
        """The train half: slime's own train.py or train_async.py."""
        flags = (*CROSS_JOB, self.name, "--cross-job-role", "train", *self.extra, *extra)
        return self.start(script, *flags, **options)

    def replay_job(self, *words: str) -> SubmittedJob:
        """cross_job_replay.py of the patched slime."""
        return self._submit([sys.executable, "-u", str(self.slime / "cross_job_replay.py"), *words])

    def launch(self, role: str) -> subprocess.Popen[str]:
        """scripts/launch_ROLE.sh with the run's arguments behind --; follows the job's log to its end (`told`)."""
        command = [SCRIPTS / f"launch_{role}.sh", "--job-id", self.name, "--slime", self.slime, "--address", self.api]
        command += [text for name, value in self.environment().items() for text in ("--env", f"{name}={value}")]
        with (self.root / f"{role}.log").open("w") as log:
            return subprocess.Popen(
                [*command, "--", *self.arguments()], stdout=log, stderr=subprocess.STDOUT, text=True
            )

    def told(self, role: str) -> str:
        """What a job that was launched has logged so far."""
        return (self.root / f"{role}.log").read_text()

    def codes(self, jobs: dict[str, subprocess.Popen[str]]) -> dict[str, int | None]:
        """Exit codes of jobs that were launched, by their role; waits while one of them logs something."""
        wait_for(
            lambda: all(job.poll() is not None for job in jobs.values()),
            SILENCE_S,
            lambda: "\n".join(self.told(role)[-5000:] for role in jobs),
            lambda: [len(self.told(role)) for role in jobs],
        )
        return {role: job.returncode for role, job in jobs.items()}

    def steps(self, *what: str, role: str = "actor") -> list[tuple[Any, ...]]:
        """One tuple of the named figures for each optimizer step that was logged, in order; `role`: or critic."""
        lines = single_job.read_log(self.folders.log, "train" if role == "actor" else "train_critic")
        return [tuple(line[name] for name in what) for line in lines]

    def asked(self, address: str, *words: str) -> str:
        """What `python -m slime.cross_job` of the patched slime says of this run, on the cluster at `address`."""
        command = [sys.executable, "-m", "slime.cross_job", *words, "--job-id", self.name, "--address", address]
        done = subprocess.run(command, env=self._of_a_shell(), capture_output=True, text=True, timeout=patient(120))
        assert done.returncode == 0, done.stderr
        return done.stdout

    def _of_a_shell(self) -> dict[str, str]:
        return {**os.environ, **self.environment()}

    def stop(self) -> None:
        """Stop what still runs."""
        for job in self.jobs:
            if job.status in ("PENDING", "RUNNING"):
                job.client.stop_job(job.id)
        for job in self.jobs:
            job.wait(60)


def ppo(run: Run, actor_load: Path | None = None) -> tuple[str, ...]:
    """Flags of PPO. --save and --load of the run are the critic's: only it has a checkpoint while it trains alone, in
    the first CRITIC_ONLY rollouts. The actor saves in the folder "actor" of the run, and loads `actor_load`."""
    actor = f"save: {run.root}/actor" + (f", load: {actor_load}" if actor_load else "")
    roles = run.root / "roles.yaml"
    roles.write_text(
        f"megatron:\n- {{role: actor, overrides: {{{actor}}}}}\n- {{role: critic, overrides: {{lr: 0.01}}}}\n"
    )
    return (
        *("--advantage-estimator", "ppo", "--num-critic-only-steps", str(CRITIC_ONLY)),
        *("--megatron-config-path", str(roles)),
    )


def while_they_move(condition: Callable[[], Any], *jobs: SubmittedJob) -> None:
    """Wait until `condition()`, as long as one of the jobs does something; fail with their logs."""
    told = lambda: "\n".join(f"==== {j.status}\n{j.logs[-5000:]}" for j in jobs)  # noqa: E731
    wait_for(condition, SILENCE_S, told, lambda: [job.moves() for job in jobs])


def end_well(*jobs: SubmittedJob) -> None:
    """Wait until all jobs have succeeded; fail at once, with their logs, when one has not."""

    def over() -> bool:
        states = [job.status for job in jobs]
        assert not {"FAILED", "STOPPED"} & {*states}, "\n".join(f"==== {j.status}\n{j.logs[-5000:]}" for j in jobs)
        return all(state == "SUCCEEDED" for state in states)

    while_they_move(over, *jobs)


def end_as_upstream(script: str, pin: str, job: SubmittedJob, *others: SubmittedJob) -> None:
    """Like `end_well`, but train_async.py up to v0.1 fails after its last step: it awaits a rollout too many."""
    if script == "train.py" or pin in IN_PARTS:
        end_well(job, *others)
        return
    assert job.wait(SILENCE_S) == "FAILED"
    assert "ValueError: Invalid type of object refs, <class 'NoneType'>" in job.logs, job.logs[-5000:]
    end_well(*others)


def weights_that_generated(train_job: SubmittedJob) -> dict[int, int]:
    """Rollout id -> version of the weights that generated it, as the train job's log tells."""
    told = re.findall(r"rollout (\d+) version \d+, generated by weights (\d+)", train_job.logs)
    return {int(rollout_id): int(version) for rollout_id, version in told}
