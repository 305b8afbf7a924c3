"""What lies between the two jobs on a GPU machine, as far as a CPU shows it: GPU ids, and groups for weights."""

import socket

import pytest
from ray_jobs import wait_for
from slime_jobs import end_well


@pytest.mark.parametrize("pin", ["079dbcf", "v0.1.0"])
def test_engines_use_the_gpus_that_ray_gave_them(pin, new_run):
    run = new_run(pin, "gpus", env={"SLIME_CPU_REAL_MODULES": "slime.backends.sglang_utils.sglang_engine"})
    job = run.start_script("engine_gpus.py")
    end_well(job)
    single, split = job.all_said(2)
    assert [used for used, _ in single["pairs"]] == [2, 3], "slime's own sum is another: is the patch still needed?"
    assert all(used == given for used, given in split["pairs"])
    assert not all(used == given for used, given in single["pairs"])


@pytest.mark.parametrize("pin", ["079dbcf", "v0.3.1"])
def test_gpus_that_are_missing_are_named(pin, new_run):
    run = new_run(pin, "greedy")
    job = run.train_job("--actor-num-gpus-per-node", "8")
    said = "this train job waits for 8 GPUs; 4 of the cluster's 4 are free"
    wait_for(lambda: said in job.logs or job.status == "FAILED", 120, lambda: job.logs)
    assert said in job.logs


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
