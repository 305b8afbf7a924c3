"""What slime's users switch on, whole: a single job and two jobs train on the same, see docs/slime-features.md."""

import re

import sums
from slime_jobs import FIGURES, at_pins, end_well, ppo, weights_that_generated

ROLLOUTS = 5


@at_pins(again=("v0.3.1",))
def test_generation_that_goes_on_from_rollout_to_rollout(pin, new_run):
    """Two engines, over-sampling, a filter, partial rollouts, two sets to evaluate, --num-epoch, an update of the
    weights after every second rollout."""
    logs = {}
    for name in ("single", "split"):
        run = new_run(pin, name, options={"num_rollout": None, "engines": 2})
        sums.write_prompts(run.folders.prompts, 8 * ROLLOUTS)  # one epoch
        sums.write_prompts(others := run.root / "others.jsonl", 8, seed=1)
        run.extra = (
            *("--num-epoch", "1", "--update-weights-interval", "2"),
            *("--over-sampling-batch-size", "16", "--dynamic-sampling-filter-path", "turns.keep"),
            *("--partial-rollout", "--mask-offpolicy-in-partial-rollout"),
            *("--custom-generate-function-path", "turns.generate"),
            *("--eval-interval", "2", "--n-samples-per-eval-prompt", "1", "--eval-max-response-len", "4"),
            *("--eval-prompt-data", "sums", str(run.folders.prompts), "others", str(others)),
        )
        if name == "single":
            jobs = [run.start("train_async.py", *run.extra)]
        else:
            jobs = [run.rollout_job(), run.train_job(script="train_async.py")]
        end_well(*jobs)
        logs[name] = run.steps(*FIGURES), jobs
    (expected, (alone,)), (steps, (rollout, train)) = logs["single"], logs["split"]
    assert [step[0] for step in expected] == list(range(ROLLOUTS))
    assert steps == expected
    assert weights_that_generated(train) == {0: 0, 1: 0, 2: 0, 3: 2, 4: 2}
    for found in (partial_samples, dropped_groups, evaluations):
        assert found(rollout) == found(alone)
        assert found(rollout), found
    assert max(partial_samples(rollout)) > 0, "nothing was aborted: there is nothing to go on with"


@at_pins(again=("v0.3.1",))
def test_what_images_and_experts_leave_in_a_rollout_comes_to_the_training_ranks(pin, new_run):
    steps = {}
    for name in ("single", "split"):
        run = new_run(pin, name, options={"num_rollout": 2})
        run.extra = ("--custom-generate-function-path", "more_columns.generate", "--use-rollout-routing-replay")
        end_well(*([run.start("train.py", *run.extra)] if name == "single" else [run.rollout_job(), run.train_job()]))
        steps[name] = run.steps(*FIGURES, "columns")
    assert steps["split"] == steps["single"]
    assert all({"multimodal_train_inputs", "rollout_routed_experts"} <= {*step[-1]} for step in steps["single"])


@at_pins(again=("v0.3.1",))
def test_ppo_with_steps_of_the_critic_alone(pin, new_run):
    steps = {}
    for name in ("single", "split"):
        run = new_run(pin, name)
        run.options = {"save": run.root / "critic", "save_interval": 2}
        run.extra = ppo(run, critic_only=2)
        jobs = [run.start("train.py", *run.extra)] if name == "single" else [run.rollout_job(), run.train_job()]
        end_well(*jobs)
        steps[name] = {role: run.steps(*FIGURES, role=role) for role in ("actor", "critic")}
    assert steps["split"] == steps["single"]
    assert [step[0] for step in steps["split"]["critic"]] == [0, 1, 2, 3, 4]
    assert [step[0] for step in steps["split"]["actor"]] == [2, 3, 4]
    weights = {step[-1] for told in steps["split"].values() for step in told}
    assert len(weights) == 5 + 3, "a step changed nothing"
    assert weights_that_generated(jobs[1]) == {step: step for step in range(ROLLOUTS)}


def partial_samples(job):
    return [int(number) for number in re.findall(r"Collected (\d+) partial samples", job.logs)]


def dropped_groups(job):
    return re.findall(r"dynamic_filter/drop_every_third'?: (\d+)", job.logs)


def evaluations(job):
    """(rollout id, data set, reward) of each evaluation that the job's log tells of."""
    told = re.findall(r"eval (\d+): ([^\n]*)", job.logs)
    return [(r, *found) for r, text in told for found in re.findall(r"'eval/(sums|others)': ([-\d.e]+)", text)]
