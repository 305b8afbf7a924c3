"""What lies between the two jobs on a GPU machine, as far as a CPU shows it: GPU ids, and groups for weights."""

import socket
import time

import pytest

from slime.cross_job.errors import NoResources, Refused
from tests.slime.slime_jobs import at_pins, end_well, while_they_move
from tests.support.patience import patient


@at_pins(also=("079dbcf", "v0.1.0"))
def test_engines_use_the_gpus_that_ray_gave_them(pin, new_run):
    run = new_run(pin, "gpus", env={"SLIME_CPU_REAL_MODULES": "slime.backends.sglang_utils.sglang_engine"})
    job = run.start_script("engine_gpus.py")
    end_well(job)
    single, split = job.all_said(2)
    assert [used for used, _ in single["pairs"]] == [2, 3], "slime's own sum is another: is the patch still needed?"
    assert all(used == given for used, given in split["pairs"])
    assert not all(used == given for used, given in single["pairs"])


@pytest.mark.parametrize(
    ("pin", "role", "more"),
    [
        ("079dbcf", "train", "--actor-num-gpus-per-node"),
        pytest.param("v0.3.1", "rollout", "--rollout-num-gpus", marks=pytest.mark.ci),
    ],
)
def test_gpus_that_are_missing_are_named_and_the_job_ends(pin, new_run, role, more):
    """In slime's own wait, which has no end."""
    run = new_run(pin, f"greedy-{role}")
    began = time.monotonic()
    job = getattr(run, f"{role}_job")(more, "8", "--cross-job-resources-s", "6")
    while_they_move(lambda: f"this {role} job waits for 8 GPUs; 5 of the cluster's 5 are free" in job.logs, job)
    assert job.wait(60) == "FAILED", job.logs
    assert "a placement group of 8 bundles waits to be started: it needs" in job.logs
    assert "8 GPU (5 of 5 free)" in job.logs
    assert job.client.get_job_info(job.id).driver_exit_code == NoResources.exit_code
    assert time.monotonic() - began < patient(90)


@at_pins(also=("v0.3.1", "main"))
def test_jobs_that_disagree_are_refused_before_an_engine_is_started(pin, new_run):
    run = new_run(pin, "disagree")
    train = run.train_job()
    run.start_script("steer.py", run.name, "attached", "consumers").said(120)
    rollout = run.rollout_job("--rollout-temperature", "0.5")
    assert rollout.wait(120) == "FAILED", rollout.logs
    assert "--rollout-temperature is 0.5 here and 1.0 there. Give both the same" in rollout.logs
    assert "slime's rollout half is ready" not in rollout.logs
    assert rollout.client.get_job_info(rollout.id).driver_exit_code == Refused.exit_code
    assert train.status == "RUNNING"


def test_engines_that_a_killed_train_job_left_take_weights_from_the_next(new_run):
    """A real SGLang server refuses a second group of the same name until the first is ended."""
    run = new_run("v0.3.1", "groups", engine="sglang")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job = run.start_script("groups.py", str(run.folders.model), str(port))
    end_well(job)
    first, second, third = job.all_said(3)
    assert first["success"]
    assert "has already been created" in second["message"], "SGLang takes it now: is ending groups still needed?"
    assert third["success"]
