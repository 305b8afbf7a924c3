"""A run of slime is recorded, and trained on again: without a rollout job, and from slime's own debug files.

Training at the newest pins; conversions, which depend on the pin most, at each.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cross_job_replay import main
from slime.cross_job.storage import open_store
from slime.cross_job.storage.recording import Recording
from slime.cross_job.types import WEIGHTS_SAID
from tests.slime.conversions import CASES
from tests.slime.single_job import IN_PARTS
from tests.slime.slime_jobs import FIGURES, Run, at_pins, end_well
from tests.support.patience import patient
from tests.support.ray_jobs import wait_for

AT = ("v0.3.1", "main")
ROLLOUTS, RANKS = 3, 2
SAVED = "saved/{rollout_id}.pt"


@pytest.fixture(scope="module", params=AT)
def recorded(
    request: pytest.FixtureRequest, cluster, checkout: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Run]:
    """A run of two jobs, recorded in `root`/store while slime wrote its debug files, too."""
    run = Run(cluster.api, request.param, checkout(request.param), tmp_path_factory.mktemp("replay") / "recorded")
    run.options["num_rollout"] = ROLLOUTS
    recorder = run.replay_job("record", "--job-id", run.name, *where(run))
    wait_for(lambda: "keeping what job" in recorder.logs, 60, lambda: recorder.logs)  # or rollouts are freed before
    rollout = run.rollout_job("--save-debug-rollout-data", str(run.root / SAVED))
    end_well(recorder, rollout, run.train_job())
    assert len(run.steps("checksum")) == ROLLOUTS
    yield run
    run.stop()


def where(run: Run) -> tuple[str, ...]:
    return ("--store", f"file://{run.root}/store", "--recording", "kept")


def test_a_recorded_run_trains_again_to_the_last_bit(recorded: Run, new_run: Callable[..., Run]):
    """Without a rollout job: the figures, and the weights after every step."""
    again = new_run(recorded.pin, "again", options=recorded.options)
    server = again.replay_job("serve", "--job-id", again.name, *where(recorded))
    train = again.train_job("--debug-train-only")

    single = new_run(recorded.pin, "files", options=recorded.options)  # meanwhile, in slime's single job
    main(["export", *where(recorded), str(single.root / "exported")])
    alone = single.start("train.py", "--load-debug-rollout-data", str(single.root / "exported" / "{rollout_id}.pt"))

    end_well(server, train, alone)
    assert again.steps(*FIGURES) == recorded.steps(*FIGURES)
    assert f"recording kept: {ROLLOUTS} rollouts served to job {again.name}" in server.logs
    assert single.steps(*FIGURES) == recorded.steps(*FIGURES)


def test_where_the_recording_ends_so_does_the_training(recorded: Run, new_run: Callable[..., Run]):
    """A train job that wants more than there is: it ends well, and says why."""
    longer = new_run(recorded.pin, "longer", options={"num_rollout": ROLLOUTS + 1})
    more = ("--num-rollout", str(ROLLOUTS + 1))
    server = longer.replay_job("serve", "--job-id", longer.name, *where(recorded), *more)
    train = longer.train_job("--debug-train-only")
    end_well(server, train)
    assert longer.steps(*FIGURES) == recorded.steps(*FIGURES)
    assert f"recording 'kept' ends with rollout {ROLLOUTS - 1}" in train.logs


def test_slimes_debug_files_become_the_same_recording(recorded: Run):
    """The files that slime wrote, through slime's own code: the bytes that it published."""
    words = ("import", *where(recorded)[:-1], "imported", "--ranks", str(RANKS), str(recorded.root / SAVED))
    done = subprocess.run(
        [sys.executable, recorded.slime / "cross_job_replay.py", *words, "--", *recorded.arguments()],
        cwd=recorded.slime,
        env={**os.environ, **recorded.environment()},
        capture_output=True,
        text=True,
        timeout=patient(120),
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    store = open_store(where(recorded)[1])
    ours, theirs = Recording(store, "imported"), Recording(store, "kept")
    assert [*ours.ids] == [*theirs.ids] == list(range(ROLLOUTS))
    for mine, published in zip(ours.rollouts(), theirs.rollouts(), strict=True):
        assert [part.ipc for part in ours.load(mine)] == [part.ipc for part in theirs.load(published)]
        said = published.meta.pop(WEIGHTS_SAID)  # by engines, of which slime's files know nothing
        assert said
        assert mine.meta == published.meta
    assert ours.terms == theirs.terms


@at_pins(also=("079dbcf", "v0.1.0", "v0.3.1", "main"))
def test_samples_of_training_data_are_the_same_training_data_to_slime(pin, new_run: Callable[..., Run]):
    """Every combination of normalised rewards, log-probs and metadata, through slime's own code twice."""
    run = new_run(pin, "conversions")
    job = run.start_script("conversions.py", *run.arguments())
    end_well(job)
    said = job.all_said(len(CASES))
    assert [tuple(line["case"]) for line in said] == CASES
    assert [line["case"] for line in said if not line["same"]] == []
    assert {line["samples"] for line in said} == {64}
    columns = {name for line in said for name in line["columns"]}
    assert {"tokens", "rewards", "loss_masks", "round_number"} <= columns
    assert ("rollout_log_probs" in columns) == (pin != "079dbcf")
    assert ("rollout_ids" in columns) == (pin in IN_PARTS)
