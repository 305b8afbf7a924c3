"""launch_rollout.sh and launch_train.sh: what is wrong is said before anything is submitted."""

import subprocess
from pathlib import Path

import launch
import pytest

SCRIPTS = Path(launch.__file__).parent


def checkout(folder: Path, *files: str) -> Path:
    for name in files:
        (folder / name).write_text("")
    return folder


def test_options_are_taken_apart():
    words = [
        "--job-id",
        "exp",
        "--env",
        "A=1",
        "--env",
        "B=x=y",
        "--cross-job-max-ahead",
        "1",
        "--",
        "--lr",
        "1",
        "--",
    ]
    options, cross_job, slime_arguments = launch.parse("train", words)
    assert (options.job_id, options.env, options.script) == ("exp", ["A=1", "B=x=y"], None)
    assert cross_job == ["--cross-job-max-ahead", "1"]
    assert slime_arguments == ["--lr", "1", "--"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--", "--lr", "1"], "required: --job-id"),
        (["--job-id", "exp", "--lr", "1"], "no -- before slime's arguments"),
        (["--job-id", "exp", "--lr", "1", "--"], "--lr is no option here: slime's own arguments go behind --"),
        (["--job-id", "exp", "--cross-job-role", "train", "--"], "--cross-job-role is no option here"),
        (["--job-id", "exp", "--cross-job-max-ahead", "--"], "--cross-job-max-ahead needs a value"),
        (["--job-id", "exp", "--env", "A", "--"], "--env A: give NAME=VALUE"),
    ],
)
def test_wrong_options_are_refused(words, said, capsys):
    with pytest.raises(SystemExit) as end:
        launch.parse("rollout", words)
    assert end.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ((), "is no checkout of slime: it has no train.py"),
        (("train.py",), "is not patched: run scripts/apply.sh"),
        (("train.py", "cross_job_rollout.py"), "run scripts/apply.sh"),
    ],
)
def test_a_folder_that_is_no_patched_checkout_is_refused(files, said, tmp_path):
    slime = checkout(tmp_path, *files)
    command = [SCRIPTS / "launch_train.sh", "--job-id", "exp", "--slime", slime, "--"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert said in done.stderr


def test_a_cluster_that_is_not_there_is_named(tmp_path):
    slime = checkout(tmp_path, "train.py", "cross_job_rollout.py")
    command = [SCRIPTS / "launch_rollout.sh", "--job-id", "exp", "--slime", slime, "--no-verify"]
    command += ["--address", "http://127.0.0.1:9", "--"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2
    assert "error: no Ray job API at http://127.0.0.1:9" in done.stderr


def test_the_checkout_comes_behind_what_was_given_on_the_path():
    assert launch.environment(["PYTHONPATH=/megatron", "X="], Path("/slime")) == {
        "PYTHONPATH": "/megatron:/slime",
        "X": "",
    }
