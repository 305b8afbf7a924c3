"""What the train job asks of the rollout job is carried out there; what a single job lets others read."""

import re

import pytest

from tests.slime.slime_jobs import CROSS_JOB, FIGURES, ROLLOUTS, at_pins, end_well
from tests.support.ray_jobs import SubmittedJob


def evaluations(job: SubmittedJob) -> list[tuple[str, str]]:
    """(rollout id, reward) of each evaluation that the job's log tells of."""
    return re.findall(r"eval (\d+): .*'eval/sums': ([-\d.e]+)", job.logs)


@at_pins(also=("079dbcf", "v0.1.0", "v0.3.1", "main"))
def test_evaluation_and_the_data_source_are_the_rollout_jobs(pin, new_run):
    """The same evaluations by the same weights, in the rollout job; the data source is saved beside the checkpoint."""
    jobs = {}
    for name in ("single", "split"):
        run = new_run(pin, name)
        options = {"num_rollout": 2, "save": run.root / "saved", "save_interval": 1}
        extra = ("--eval-interval", "1", "--eval-prompt-data", "sums", str(run.folders.prompts))
        extra += ("--n-samples-per-eval-prompt", "1", "--eval-max-response-len", "4")
        if name == "single":
            jobs[name] = run, [run.start("train.py", *extra, **options)]
        else:
            jobs[name] = run, [run.rollout_job(*extra, **options), run.train_job(*extra, **options)]
        end_well(*jobs[name][1])
    (single, (alone,)), (split, (rollout, train)) = jobs["single"], jobs["split"]
    assert split.steps(*FIGURES) == single.steps(*FIGURES)
    assert [rollout_id for rollout_id, _ in evaluations(alone)] == ["0", "0", "1"]
    assert evaluations(rollout) == evaluations(alone)
    assert evaluations(train) == []
    assert rollout.logs.count(" published: ") == 2, "an evaluation was published"
    for run in (single, split):
        saved = sorted(path.name for path in (run.root / "saved" / "rollout").iterdir())
        assert saved == ["global_dataset_state_dict_0.pt", "global_dataset_state_dict_1.pt"]


@at_pins(also=("079dbcf", "v0.3.1", "main"))
def test_a_single_job_with_the_switch_trains_as_before_and_lets_others_read(pin, new_run, single):
    tapped = new_run(pin, "tapped")
    reader = tapped.start_script("reader.py", tapped.name, str(ROLLOUTS))
    reader.said(120)  # it is attached: nothing is freed before it has read it
    job = tapped.start("train.py", *CROSS_JOB, tapped.name)
    end_well(job, reader)
    assert tapped.steps(*FIGURES) == single(pin)
    *read, end = reader.all_said(2 + ROLLOUTS)[1:]
    assert end == {"end": "planned"}
    assert [(line["rollout_id"], line["samples"]) for line in read] == [(r, 64) for r in range(ROLLOUTS)]
    rewards = [line["reward"] for line in read]
    assert rewards == pytest.approx([reward for (reward,) in tapped.steps("raw_reward")])
