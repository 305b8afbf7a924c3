"""slime's own train.py and train_async.py give the same training in one job and in two: same data, same losses."""

from tests.slime.slime_jobs import FIGURES, ROLLOUTS, at_pins, end_as_upstream, end_well, weights_that_generated


@at_pins("v0.3.1", also=("main", "079dbcf", "v0.1.0"))
def test_two_jobs_train_as_one(pin, new_run, single):
    """Every figure of every step is equal to the last bit; the training ranks hash the very tokens they train on."""
    expected = single(pin, "train.py")
    for figure in ("tokens", "checksum"):
        values = {step[FIGURES.index(figure)] for step in expected}
        assert len(values) == ROLLOUTS, f"{figure} does not change: there is nothing to compare"
    split = new_run(pin, "split")
    rollout, train = split.rollout_job(), split.train_job()
    end_well(rollout, train)
    assert split.steps(*FIGURES) == expected
    for job, gpus in ((train, 2), (rollout, 1)):
        assert f"Creating placement group with {gpus} GPUs" in job.logs
    assert weights_that_generated(train) == {step: step for step in range(ROLLOUTS)}


@at_pins(also=("079dbcf", "v0.1.0", "v0.3.1", "main"))
def test_one_ahead_is_train_async(pin, new_run, single):
    """With --cross-job-max-ahead 1 slime's synchronous train.py trains as its train_async.py does in one job."""
    expected = single(pin, "train_async.py")
    assert expected != single(pin, "train.py")
    run = new_run(pin, "ahead")
    flags = ("--cross-job-max-ahead", "1")
    rollout, train = run.rollout_job(*flags), run.train_job(*flags)
    end_well(rollout, train)
    assert run.steps(*FIGURES) == expected
    assert weights_that_generated(train) == {step: max(0, step - 1) for step in range(ROLLOUTS)}


@at_pins(also=("079dbcf", "v0.1.0", "v0.3.1", "main"))
def test_train_async_in_two_jobs(pin, new_run, single):
    """slime's own train_async.py as the train job."""
    run = new_run(pin, "async")
    rollout, train = run.rollout_job(), run.train_job(script="train_async.py")
    end_as_upstream("train_async.py", pin, train, rollout)
    assert run.steps(*FIGURES) == single(pin, "train_async.py")
