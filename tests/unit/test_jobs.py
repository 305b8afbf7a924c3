"""How a job's script ends: what its shell and its operator see."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from slime.cross_job import errors
from tests.support.patience import patient

OVERLAY = Path(__file__).parents[2] / "slime_overlay"
SCRIPT = """
from slime.cross_job import errors
from slime.cross_job.client.jobs import run

def main():
    print("at work")
    {body}

run(main)
print("after")
"""


def run_job(body: str, **env: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(OVERLAY), **env}
    command = [sys.executable, "-c", SCRIPT.format(body=body)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=patient(60))


@pytest.mark.parametrize(
    "kind",
    ["CrossJobError", "BadInput", "JobIdTaken", "BrokerLost", "WaitTimeout", "RolloutNotFound", "PeerFailed"],
)
def test_an_error_of_ours_is_one_line_and_its_code(kind):
    done = run_job(f"raise errors.{kind}('rollout 3 of job exp: \"quoted\", é')")
    assert done.returncode == getattr(errors, kind).exit_code != 0
    assert done.stderr == f'{kind}: rollout 3 of job exp: "quoted", é\n'
    assert done.stdout == "at work\n"


def test_a_message_of_several_lines_is_one_line_too():
    reason = "ValueError: shapes differ\\n  left: 3\\n  right: 4"  # as an error of another job may say
    done = run_job(f"raise errors.PeerFailed('the producer failed: {reason}')")
    assert done.returncode == 6
    assert len(done.stderr.splitlines()) == 1
    assert "shapes differ" in done.stderr
    assert "right: 4" in done.stderr


def test_the_exit_codes_tell_the_verdicts_apart():
    kinds = ["CrossJobError", "BadInput", "Refused", "Unreachable", "WaitTimeout", "PeerFailed", "EndOfStream"]
    kinds += ["StoreFull", "NoResources", "HeldBack"]
    codes = [getattr(errors, kind).exit_code for kind in kinds]
    assert len(set(codes)) == len(kinds)
    assert [kind for kind, code in zip(kinds, codes) if code == 0] == ["EndOfStream"]


@pytest.mark.parametrize("body", ["raise errors.EndOfStream('the consumers finished')", "pass"])
def test_the_end_of_the_stream_is_no_failure(body):
    done = run_job(body)
    assert (done.returncode, done.stdout, done.stderr) == (0, "at work\nafter\n", "")


def test_any_other_error_stays_a_traceback():
    done = run_job("raise KeyError('no such column')")
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")
    assert done.stderr.rstrip().endswith("KeyError: 'no such column'")


def test_an_exit_that_the_job_chose_stays():
    assert run_job("raise SystemExit(9)").returncode == 9


@pytest.mark.parametrize(("level", "shown"), [("INFO", True), ("WARNING", False)])
def test_the_log_goes_to_stderr_from_the_level_that_is_set(level, shown):
    done = run_job("import logging; logging.getLogger('x').info('a state')", SLIME_CROSS_JOB_LOG_LEVEL=level)
    assert done.returncode == 0
    assert ("x INFO a state" in done.stderr) == shown
