"""A job that is killed and started again: the other goes on, and training ends as if nothing had happened."""

import os
import signal
import time
from pathlib import Path

import pytest
from ray_jobs import SubmittedJob, wait_for
from slime_jobs import FIGURES, ROLLOUTS, Run, end_well, weights_that_generated

KILLED_AT = 3  # while this rollout is being generated

pytestmark = pytest.mark.parametrize("pin", ["079dbcf", "v0.3.1"])


@pytest.fixture
def run(pin, new_run, tmp_path) -> Run:
    """Its generation stops in the middle of rollout KILLED_AT for as long as the file `hold` is there."""
    hold = tmp_path / "hold"
    hold.write_text(str(KILLED_AT))
    saving = {"save": tmp_path / "saved", "save_interval": 2}
    run = new_run(pin, "run", options=saving, env={"SLIME_CPU_HOLD": str(hold)})
    run.hold = hold
    return run


def kill_in_the_middle(run: Run, job: SubmittedJob, *jobs: SubmittedJob) -> None:
    """SIGKILL the driver of `job` while rollout KILLED_AT is being generated; returns when Ray calls it failed."""
    witness = Path(f"{run.hold}.held")
    wait_for(witness.exists, 240, lambda: "\n".join(j.logs[-3000:] for j in jobs))
    time.sleep(1)
    os.kill(job.pid, signal.SIGKILL)
    assert job.wait(60) == "FAILED", "the fault did not happen"
    run.hold.unlink()


def test_a_rollout_job_that_was_killed(pin, run, single):
    """The trainer waits, gives its weights to the new engines, and gets the rollout that was lost in the making."""
    first, train = run.rollout_job(), run.train_job()
    kill_in_the_middle(run, first, first, train)
    second = run.rollout_job()
    end_well(second, train, timeout_s=300)
    assert run.steps(*FIGURES) == single(pin), "it differs from an undisturbed single job"
    assert weights_that_generated(train) == {step: step for step in range(ROLLOUTS)}
    published = [f"rollout {r} version" in second.logs for r in range(ROLLOUTS)]
    assert published == [r >= KILLED_AT for r in range(ROLLOUTS)], "what had been published was generated again"


def test_a_train_job_that_was_killed(pin, run, single, tmp_path):
    """It goes on from its checkpoint with the rollouts behind it, the same bytes, none of them generated again."""
    rollout, first = run.rollout_job(), run.train_job()
    kill_in_the_middle(run, first, rollout, first)
    second = run.train_job(load=tmp_path / "saved")
    end_well(rollout, second, timeout_s=300)
    steps, expected = run.steps(*FIGURES), single(pin)
    assert [step[0] for step in steps] == [0, 1, 2, 2, 3, 4], "it resumed elsewhere than behind its last checkpoint"
    assert steps[:3] == expected[:3]
    assert steps[3:] == expected[2:]
    for rollout_id in range(ROLLOUTS):
        assert rollout.logs.count(f"rollout {rollout_id} version") == 1, "it was generated again"
