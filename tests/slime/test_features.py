"""What slime's users switch on, whole: a single job and two jobs train on the same, see docs/slime-features.md."""

import re

import pytest
import sums
from slime_jobs import FIGURES, at_pins, end_well, ppo, weights_that_generated

ROLLOUTS = 5
_TP, _PP, _CP = (f"--{kind}-parallel-size" for kind in ("tensor-model", "pipeline-model", "context"))
LAYOUTS = {  # name: (data-parallel ranks, flags of the train job, flags of both jobs)
    "dynamic-batch": (2, (), ("--use-dynamic-batch-size", "--max-tokens-per-gpu", "60")),
    "tp": (1, (_TP, "2"), ()),
    "cp": (1, (_CP, "2"), ()),
}
"""How training ranks share the work; those of `standins/layout.py`."""


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
def test_ppo_with_steps_of_the_critic_alone(pin, new_run, single_ppo):
    run = new_run(pin, "run")
    run.options, run.extra = {"save": run.root / "critic", "save_interval": 2}, ppo(run)
    rollout, train = run.rollout_job(), run.train_job()
    end_well(rollout, train)
    assert {role: run.steps(*FIGURES, role=role) for role in ("actor", "critic")} == single_ppo(pin)
    assert weights_that_generated(train) == {step: step for step in range(ROLLOUTS)}


@at_pins(again=("v0.3.1",))
@pytest.mark.parametrize("name", LAYOUTS)
def test_model_parallel_layouts(pin, name, new_run, single, tmp_path):
    """Two jobs go on from a single job's checkpoint as it does itself; it trains as plain data parallelism does."""
    ranks, of_train, of_both = LAYOUTS[name]
    alone = new_run(pin, "single", options={"num_rollout": 3, "save": tmp_path / "saved"})
    end_well(alone.start("train.py", *of_train, *of_both))
    split = new_run(pin, "split", options={"num_rollout": 3, "load": tmp_path / "saved"}, extra=of_both)
    end_well(split.rollout_job(), split.train_job(*of_train, "--ckpt-step", "0"))
    expected = alone.steps(*FIGURES)
    assert split.steps(*FIGURES) == expected[1:]
    for step, plain in zip(expected[:2], single(pin), strict=False):  # hashes differ: other ranks, and other bits
        figures = [(a, b) for a, b in zip(step, plain, strict=True) if not isinstance(a, str)]
        assert [a for a, _ in figures] == pytest.approx([b for _, b in figures], rel=1e-4, abs=1e-6)
    sizes = [step[-1] for step in alone.steps("micro_batches")]
    if of_both:
        assert all(len(step) > 64 // ranks // 8 for step in sizes), sizes
    else:
        assert sizes == [[8] * (64 // ranks // 8)] * 3


def partial_samples(job):
    return [int(number) for number in re.findall(r"Collected (\d+) partial samples", job.logs)]


def dropped_groups(job):
    return re.findall(r"dynamic_filter/drop_every_third'?: (\d+)", job.logs)


def evaluations(job):
    """(rollout id, data set, reward) of each evaluation that the job's log tells of."""
    told = re.findall(r"eval (\d+): ([^\n]*)", job.logs)
    return [(r, *found) for r, text in told for found in re.findall(r"'eval/(sums|others)': ([-\d.e]+)", text)]
