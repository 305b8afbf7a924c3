"""slime's own train.py and train_async.py give the same training in one job and in two: same data, same losses."""

from slime_jobs import end_as_upstream, end_well, weights_that_generated

FIGURES = ("rollout_id", "step", "tokens", "loss", "grad_norm", "raw_reward", "checksum")
STEPS = 4


def test_two_jobs_train_as_one(pin, new_run):
    """Every figure of every step is equal to the last bit; the slime actors hash the very tokens they trained on."""
    options = {"num_rollout": STEPS}
    single = new_run(pin, "single", options=options)
    end_well(single.start("train.py"))
    expected = single.steps(*FIGURES)
    assert [step[0] for step in expected] == list(range(STEPS))
    assert len({step[2] for step in expected}) == STEPS, "the rollouts differ, or nothing was learnt"

    split = new_run(pin, "split", options=options)
    rollout, train = split.rollout_job(), split.train_job()
    end_well(rollout, train)
    assert split.steps(*FIGURES) == expected
    assert weights_that_generated(train) == {step: step for step in range(STEPS)}


def test_one_ahead_is_train_async(pin, new_run):
    """With --cross-job-max-ahead 1 slime's synchronous train.py trains as its train_async.py does."""
    options = {"num_rollout": STEPS}
    single = new_run(pin, "single", options=options)
    end_as_upstream("train_async.py", pin, single.start("train_async.py"))
    expected = single.steps(*FIGURES)
    assert [step[0] for step in expected] == list(range(STEPS))

    ahead = new_run(pin, "ahead", options=options)
    flags = ("--cross-job-max-ahead", "1")
    rollout, train = ahead.rollout_job(*flags), ahead.train_job(*flags)
    end_well(rollout, train)
    assert ahead.steps(*FIGURES) == expected
    assert weights_that_generated(train) == {step: max(0, step - 1) for step in range(STEPS)}

    asynchronous = new_run(pin, "async", options=options)
    rollout, train = asynchronous.rollout_job(), asynchronous.train_job(script="train_async.py")
    end_as_upstream("train_async.py", pin, train, rollout)
    assert asynchronous.steps(*FIGURES) == expected
