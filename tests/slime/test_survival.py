"""A job that is killed and started again: the other goes on, and training ends as if nothing had happened."""

import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from local_cluster import command_of
from tests.slime.single_job import IN_PARTS, read_log
from tests.slime.slime_jobs import (
    FIGURES,
    NCCL,
    ROLLOUTS,
    Run,
    at_pins,
    end_well,
    ppo,
    weights_that_generated,
    while_they_move,
)
from tests.support.ray_jobs import SubmittedJob

KILLED_AT = 3  # while this rollout is being generated


@pytest.fixture
def run(pin, new_run, tmp_path) -> Run:
    """Saves after every second rollout, and tells what it does to each."""
    made: Run = new_run(pin, "run", options={"save": tmp_path / "saved", "save_interval": 2})
    made.extra = ("--cross-job-traces", "on")
    return made


def stop_at(run: Run, what: str, number: int) -> Path:
    """Its processes will wait at that rollout or weight update until the file that is returned is removed."""
    hold = run.root / f"hold-{what}"
    hold.write_text(str(number))
    run.env[f"SLIME_CPU_HOLD_{what.upper()}"] = str(hold)
    return hold


def kill_there(hold: Path, job: SubmittedJob, *jobs: SubmittedJob) -> None:
    """SIGKILL the driver of `job` when somebody waits at `hold`; returns when Ray calls it failed."""
    witness = Path(f"{hold}.held")
    while_they_move(witness.exists, *jobs)
    time.sleep(1)
    os.kill(job.pid, signal.SIGKILL)
    assert job.wait(60) == "FAILED", "the fault did not happen"
    hold.unlink()


def trained_again_behind_rollout_1(steps: list[tuple[Any, ...]], expected: list[tuple[Any, ...]]) -> None:
    """The figures are those of one job. The train job was killed after it had trained on rollout 2, and its next life
    went on from the checkpoint of rollout 1."""
    assert [step[0] for step in steps] == [0, 1, 2, 2, 3, 4], "it resumed elsewhere than behind its last checkpoint"
    assert steps[:3] == expected[:3]
    assert steps[3:] == expected[2:]


def times_published(job: SubmittedJob, rollout_id: int) -> int:
    """By its own log, which may also quote the other job's."""
    return len(re.findall(rf"rollout {rollout_id} version \d+ published", job.logs))


def shown_as_it_was(run: Run, address: str, dead: str) -> None:
    """What the command line tells of the whole run, after the fact, is what its jobs did."""
    status = json.loads(run.asked(address, "status", "--json"))
    assert status["complete"]
    assert status["acked"] + status["covered"] == ROLLOUTS
    assert status["events"]["dead"] == 1
    told = [event["text"] for event in status["last_events"] if event["kind"] == "dead"]
    assert f"the {dead} of job {run.name}" in told[0]
    rows = json.loads(run.asked(address, "ls", "--json"))["rollouts"]
    assert [(row["rollout_id"], row["state"]) for row in rows[::-1]] == [(r, "freed") for r in range(ROLLOUTS)]
    assert [row["weight_version"] for row in rows[::-1]] == [*range(ROLLOUTS)]
    rewards = {row["rollout_id"]: row["reward"] for row in rows}
    for rollout_id, reward in run.steps("rollout_id", "raw_reward"):
        assert rewards[rollout_id] == pytest.approx(reward)
    spans = {(event["name"], event["args"]["rollout_id"]) for event in traced(run, address)}
    for rollout_id in range(ROLLOUTS):
        named = {name for name, row in spans if row == rollout_id}
        assert {"generate", "publish", "claim", "train", "weights"} <= named, rollout_id
    assert "save" in {name for name, _ in spans}


def traced(run: Run, address: str) -> list[dict[str, Any]]:
    made = json.loads(run.asked(address, "trace"))
    return [event for event in made["traceEvents"] if event["ph"] == "X"]


@at_pins("v0.3.1", also=("main", "079dbcf"))
def test_a_rollout_job_that_was_killed(pin, run, single, cluster):
    """The trainer waits, gives its weights to the new engines, and gets the rollout that was lost in the making."""
    hold = stop_at(run, "rollout", KILLED_AT)
    first, train = run.rollout_job(), run.train_job()
    kill_there(hold, first, first, train)
    second = run.rollout_job()
    end_well(second, train)
    assert run.steps(*FIGURES) == single(pin), "it differs from an undisturbed single job"
    assert weights_that_generated(train) == {step: step for step in range(ROLLOUTS)}
    published = [times_published(second, r) > 0 for r in range(ROLLOUTS)]
    assert published == [r >= KILLED_AT for r in range(ROLLOUTS)], "what had been published was generated again"
    shown_as_it_was(run, cluster.address, dead="producer")


@at_pins("v0.3.1", also=("main", "079dbcf"))
def test_a_train_job_that_was_killed(pin, run, single, tmp_path, cluster):
    """It goes on from its checkpoint with the rollouts behind it, the same bytes, none of them generated again."""
    hold = stop_at(run, "rollout", KILLED_AT)
    rollout, first = run.rollout_job(), run.train_job()
    kill_there(hold, first, rollout, first)
    second = run.train_job(load=tmp_path / "saved")
    end_well(rollout, second)
    steps, expected = run.steps(*FIGURES), single(pin)
    trained_again_behind_rollout_1(steps, expected)
    for rollout_id in range(ROLLOUTS):
        assert times_published(rollout, rollout_id) == 1, "it was generated again"
    shown_as_it_was(run, cluster.address, dead="consumer")


@at_pins(also=("v0.3.1", "main"))
def test_a_train_job_of_ppo_that_was_killed_while_only_the_critic_trained(pin, new_run, single_ppo, cluster):
    """The critic's checkpoint is acked, and training goes on from it."""
    run = new_run(pin, "run")
    run.options, run.extra = {"save": run.root / "critic", "save_interval": 1}, ppo(run)
    hold = stop_at(run, "rollout", 1)
    rollout, first = run.rollout_job(), run.train_job()
    kill_there(hold, first, rollout, first)
    status = json.loads(run.asked(cluster.address, "status", "--json"))
    assert status["acked"] + status["covered"] == 1
    run.extra = ppo(run, actor_load=run.folders.model)  # it has no checkpoint of its own yet
    end_well(rollout, run.train_job(load=run.root / "critic"))
    assert {role: run.steps(*FIGURES, role=role) for role in ("actor", "critic")} == single_ppo(pin)
    for rollout_id in range(ROLLOUTS):
        assert times_published(rollout, rollout_id) == 1, "it was generated again"


@at_pins(also=("079dbcf",))
def test_a_train_job_that_was_killed_while_the_rollout_behind_its_checkpoint_was_generated(
    pin, new_run, single, tmp_path
):
    """Its load() goes to the data source of the living rollout job, behind the rollout that is held there, and leaves
    it where it stands: no prompt is used twice."""
    saved = tmp_path / "saved"
    run = new_run(pin, "run", options={"save": saved, "save_interval": 1})
    hold = stop_at(run, "rollout", 1)
    before, first = run.rollout_job(), run.train_job()
    kill_there(hold, before, before, first)
    Path(f"{hold}.held").unlink()
    hold = stop_at(run, "rollout", KILLED_AT)
    rollout = run.rollout_job(load=saved)  # slime heeds --load only where a checkpoint is when the job begins
    while_they_move(Path(f"{hold}.held").exists, rollout, first)
    os.kill(first.pid, signal.SIGKILL)
    assert first.wait(60) == "FAILED", "the fault did not happen"
    second = run.train_job(load=saved)
    while_they_move(lambda: f"is to go on after rollout {KILLED_AT - 1}" in second.logs, second)
    hold.unlink()
    end_well(rollout, second)
    assert run.steps(*FIGURES) == single(pin)


@at_pins(also=("v0.3.1", "main"))
def test_a_train_job_whose_last_step_failed_is_not_through(pin, run, single, tmp_path, cluster):
    """What no checkpoint covers is kept, the rollout job waits, and the next train job ends as if nothing had been."""
    hold = stop_at(run, "rollout", ROLLOUTS - 1)
    rollout, first = run.rollout_job(), run.train_job()
    while_they_move(Path(f"{hold}.held").exists, rollout, first)
    ranks = [p for p in cluster.pids() if "ray::MegatronTrainRayActor" in command_of(p)[0]]
    os.kill(ranks[0], signal.SIGKILL)
    hold.unlink()
    assert first.wait(120) == "FAILED", "the fault did not happen"
    assert rollout.status == "RUNNING", rollout.logs
    second = run.train_job(load=tmp_path / "saved")
    end_well(rollout, second)
    assert run.steps(*FIGURES) == single(pin)


@at_pins(also=("v0.3.1", "main", "079dbcf"))
def test_jobs_that_are_asked_to_stop(pin, run, single, tmp_path):
    """SIGTERM: the rollout that is being generated is finished, what was trained is saved; both end well."""
    hold = stop_at(run, "rollout", KILLED_AT)
    rollout, train = run.rollout_job(), run.train_job()
    while_they_move(Path(f"{hold}.held").exists, rollout, train)
    for job in (rollout, train):
        os.kill(job.pid, signal.SIGTERM)
    assert train.wait(60) == "SUCCEEDED", train.logs
    assert f"saving after rollout {KILLED_AT - 1}" in train.logs
    assert rollout.status == "RUNNING", "it did not finish what it was generating"
    hold.unlink()
    assert rollout.wait(60) == "SUCCEEDED", rollout.logs
    assert f"rollout {KILLED_AT} version 1 published" in rollout.logs
    second_rollout, second_train = run.rollout_job(), run.train_job(load=tmp_path / "saved")
    end_well(second_rollout, second_train)
    assert run.steps(*FIGURES) == single(pin), "a step was lost or done twice"
    assert not times_published(second_rollout, KILLED_AT), "it was generated again"


@at_pins(also=("v0.3.1", "main"))
def test_a_train_job_that_goes_back_to_an_older_checkpoint(pin, new_run, single, tmp_path):
    """Its newest checkpoints are lost: what it had acked is handed out again, the same bytes, and nothing is generated
    again."""
    saved = tmp_path / "saved"
    run = new_run(pin, "run", options={"save": saved, "save_interval": 1})
    keep = ("--cross-job-retain", "9", "--cross-job-store", f"file://{tmp_path}/store")
    hold = stop_at(run, "rollout", KILLED_AT)
    rollout, first = run.rollout_job(*keep), run.train_job(*keep)
    kill_there(hold, first, rollout, first)
    newest = int((saved / "latest_checkpointed_iteration.txt").read_text())
    (saved / "latest_checkpointed_iteration.txt").write_text(str(newest - 2))
    second = run.train_job(*keep, load=saved)
    end_well(rollout, second)
    steps, expected = run.steps(*FIGURES), single(pin)
    assert [step[0] for step in steps] == [0, 1, 2, 1, 2, 3, 4]
    assert steps[:3] == expected[:3]
    assert steps[3:] == expected[1:]
    assert "acked before and wanted again: rollouts 1 to 2" in second.logs
    assert [*(tmp_path / "store" / run.name / "journal").iterdir()], "nothing was kept durably"
    for rollout_id in range(ROLLOUTS):
        assert times_published(rollout, rollout_id) == 1, "it was generated again"


@at_pins(also=("v0.3.1", "main"))
def test_an_experiment_that_is_drained_goes_on_where_it_was(pin, run, single, tmp_path):
    """What is out is finished, trained on and saved; both jobs end with 0, and go on when they are started again."""
    hold = stop_at(run, "rollout", KILLED_AT)
    rollout, train = run.rollout_job(), run.train_job()
    while_they_move(Path(f"{hold}.held").exists, rollout, train)
    assert run.start_script("steer.py", run.name, "control", "draining").said()["control"] == "draining"
    hold.unlink()
    end_well(rollout, train)
    assert f"rollout {KILLED_AT} version 1 published" in rollout.logs
    again = run.rollout_job(), run.train_job(load=tmp_path / "saved")
    end_well(*again)
    assert run.steps(*FIGURES) == single(pin), "a step was lost or done twice"
    assert not times_published(again[0], KILLED_AT), "it was generated again"


@at_pins(also=("079dbcf",))
def test_a_train_job_that_was_killed_while_it_updated_the_weights(pin, run, single, tmp_path):
    """It held slime's lock, and left the engines paused: they generate nothing before they have whole weights."""
    hold = stop_at(run, "update", 4)  # the one after rollout 2: the first is that of the start
    rollout, first = run.rollout_job(), run.train_job()
    kill_there(hold, first, rollout, first)
    second = run.train_job(load=tmp_path / "saved")
    end_well(rollout, second)
    steps, expected = run.steps(*FIGURES), single(pin)
    trained_again_behind_rollout_1(steps, expected)
    assert "freed the lock on the engines" in second.logs, "the lock was not held: the fault did not happen"


@at_pins(also=("v0.3.1", "main", "079dbcf"))
def test_a_train_job_that_is_started_again_with_other_resources(pin, run, tmp_path):
    """What was published for two data-parallel ranks is trained on by one, the same samples."""
    hold = stop_at(run, "rollout", KILLED_AT)
    rollout, first = run.rollout_job(), run.train_job()
    kill_there(hold, first, rollout, first)
    second = run.train_job("--actor-num-gpus-per-node", "1", load=tmp_path / "saved")
    end_well(rollout, second)
    figures = ("rollout_id", "raw_reward", "loss", "grad_norm")
    steps = run.steps(*figures)
    assert [step[0] for step in steps] == [0, 1, 2, 2, 3, 4]
    both = steps[2], steps[3]  # by two ranks, and by one
    assert both[1] == pytest.approx(both[0], rel=1e-3, abs=1e-6)  # the loss is one of normalised rewards: nearly 0
    assert both[1][1] == both[0][1]
    assert times_published(rollout, 2) == 1, "it was generated again"
    assert ("rollout 2 was split for an earlier layout" in second.logs) == (pin in IN_PARTS)


@at_pins(also=("v0.3.1", "main"))
def test_a_train_job_that_was_killed_while_it_sent_weights_over_nccl(pin, new_run, single, tmp_path):
    """The next one gives the engines, which have half of an update, a group of its own and all weights."""
    saved = {"save": tmp_path / "saved", "save_interval": 2}
    run = new_run(pin, "run", probe=True, options={"engines": 2, **saved}, extra=NCCL)
    hold = stop_at(run, "update", 4)  # the one after rollout 2: the first is that of the start
    rollout, first = run.rollout_job(), run.train_job()
    kill_there(hold, first, rollout, first)
    second = run.train_job(load=tmp_path / "saved")
    end_well(rollout, second)
    steps, expected = run.steps(*FIGURES), single(pin)
    trained_again_behind_rollout_1(steps, expected)
    assert second.logs.count("ended the group slime-pp_0") == 2, "the engines were in no group: nothing to take over"
    assert weights_that_generated(second) == {step: step for step in range(2, ROLLOUTS)}
    for probe in read_log(run.folders.log, "probe"):
        assert {server["checksum"] for server in probe["servers"]} == {probe["trainer_checksum"]}


@at_pins(also=("v0.3.1", "main"))
def test_a_rollout_job_that_was_killed_when_its_engines_had_weights_over_nccl(pin, new_run, single):
    """The training ranks leave the group of its engines, and make one with the next job's."""
    run = new_run(pin, "run", options={"engines": 2}, extra=NCCL)
    hold = stop_at(run, "rollout", KILLED_AT)
    first, train = run.rollout_job(), run.train_job()
    kill_there(hold, first, first, train)
    end_well(run.rollout_job(), train)
    assert run.steps(*FIGURES) == single(pin)
    assert weights_that_generated(train) == {step: step for step in range(ROLLOUTS)}


@at_pins(also=("v0.3.1", "main"))
def test_a_rollout_job_that_was_killed_while_it_got_weights_over_nccl(pin, new_run, single, tmp_path):
    """Training ranks that failed in the middle of it cannot go on: the train job ends with the verdict."""
    saved = {"save": tmp_path / "saved", "save_interval": 2}
    run = new_run(pin, "run", options={"engines": 2, **saved}, extra=NCCL)
    hold = stop_at(run, "update", 4)
    first, train = run.rollout_job(), run.train_job()
    kill_there(hold, first, first, train)
    while_they_move(lambda: train.status == "FAILED", train)
    assert "the rollout job ended in the middle of a weight update" in train.logs, train.logs[-5000:]
    end_well(run.rollout_job(), run.train_job(load=tmp_path / "saved"))
    steps, expected = run.steps(*FIGURES), single(pin)
    trained_again_behind_rollout_1(steps, expected)
