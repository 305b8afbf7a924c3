"""The demo as a user runs it: end to end, twice at once, with a job that is killed, and with bad input."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys

import psutil
import pytest

from local_cluster import command_of
from tests.support.patience import patient, within
from tests.support.ray_jobs import ROOT, wait_for

EXAMPLE = ROOT / "slime_overlay" / "examples" / "cross_job_cpu"
SUMMARY = {
    *("job_id", "ray_job_ids", "rollouts", "published", "claimed", "acked", "lost", "duplicated", "reward_first5"),
    *(
        "reward_last5",
        "publish_ms_p50",
        "claim_ms_p50",
        "object_store_bytes_before",
        "object_store_bytes_after",
        "wall_s",
    ),
}


def demo(*args, **kwargs):
    command = [sys.executable, str(ROOT / "scripts" / "demo.py"), *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **kwargs)


def processes_with(text):
    """Processes that have `text` in their command line."""
    return [pid for pid in psutil.pids() if any(text in word for word in command_of(pid))]


def cluster_address(output):
    return re.search(r"Ray cluster at (\S+),", output).group(1)


def test_two_demos_at_once_are_equal_step_by_step_and_leave_nothing(tmp_path):
    runs = {}
    for name in ("one", "two"):
        options = [
            "--rollouts",
            4,
            "--seed",
            7,
            "--max-ahead",
            0,
            "--out",
            tmp_path / name,
            "--json",
            tmp_path / f"{name}.json",
        ]
        runs[name] = demo(*options)
    rewards, addresses = [], []
    for name, run in runs.items():
        output = run.communicate(timeout=patient(240))[0]
        assert run.returncode == 0, output
        assert "published 4  claimed 4  acked 4" in output
        summary = json.loads((tmp_path / f"{name}.json").read_text())
        assert summary.keys() >= SUMMARY
        assert (summary["published"], summary["claimed"], summary["acked"]) == (4, 4, 4)
        assert (summary["lost"], summary["duplicated"], summary["staleness_max"]) == (0, 0, 0)
        assert summary["object_store_bytes_after"] <= 1.05 * summary["object_store_bytes_before"]
        assert (tmp_path / name / "demo.png").read_bytes()[1:4] == b"PNG"
        assert "<title>" in (tmp_path / name / "report.html").read_text()
        addresses.append(cluster_address(output))
        lines = [json.loads(line) for line in (tmp_path / name / "train.jsonl").read_text().splitlines()]
        rewards.append([(line["rollout_id"], line["reward"], line["entropy"], line["grad_norm"]) for line in lines])
    assert addresses[0] != addresses[1]
    assert len(rewards[0]) == 4
    assert rewards[0] == rewards[1]
    assert processes_with(str(tmp_path)) == []


@pytest.mark.parametrize(("victim", "other"), [("train_job.py", "rollout"), ("rollout_job.py", "train")])
def test_a_killed_job_fails_the_demo_and_the_other_job_says_why(tmp_path, victim, other):
    run = demo("--rollouts", 1000, "--out", tmp_path)
    wait_for(lambda: (tmp_path / "train.jsonl").exists() and (tmp_path / "train.jsonl").read_text(), 120)
    ours = processes_with(str(tmp_path))
    drivers = [pid for pid in processes_with(str(EXAMPLE / victim)) if pid in ours]
    for pid in drivers:
        with contextlib.suppress(ProcessLookupError):  # the driver's shell went down with it
            os.kill(pid, 9)
    with within(60):
        output = run.communicate(timeout=patient(90))[0]
    assert drivers
    assert run.returncode == 1, output
    assert f"the {other} job is FAILED" in output
    log = (tmp_path / f"{other}.log").read_text()
    assert "PeerFailed: the" in log
    assert "its Ray job is FAILED" in log
    assert processes_with(str(tmp_path)) == []


def test_a_demo_that_is_terminated_leaves_nothing(tmp_path):
    run = demo("--rollouts", 1000, "--out", tmp_path)
    wait_for(lambda: (tmp_path / "train.jsonl").exists() and (tmp_path / "train.jsonl").read_text(), 120)
    address = cluster_address(run.stdout.readline())
    assert processes_with(address)  # the witness: workers name the cluster's address
    run.terminate()
    run.communicate(timeout=patient(60))
    assert run.returncode == 128 + signal.SIGTERM
    assert processes_with(str(tmp_path)) == []
    assert processes_with(address) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--job-id", "no spaces"], "BadInput: job id 'no spaces' is not usable"),
        (["--job-id", ""], "BadInput: no job id: pass --job-id NAME"),
        (["--rollouts", "0"], "BadInput: --rollouts 0: at least 1"),
        (["--max-ahead", "-1"], "BadInput: --max-ahead -1: at least 0"),
        (["--out", "/proc/nowhere"], "BadInput: cannot write to /proc/nowhere"),
        (["--out", "OUT", "--json", "/proc/nowhere/summary.json"], "BadInput: cannot write to /proc/nowhere"),
    ],
)
def test_bad_options_are_one_clear_line(tmp_path, options, message):
    run = demo(*[str(tmp_path) if option == "OUT" else option for option in options], cwd=tmp_path)
    output = run.communicate(timeout=patient(60))[0]
    assert run.returncode == 2
    assert output.strip().splitlines()[-1].startswith(message)
    assert "Traceback" not in output


@pytest.mark.parametrize("script", ["rollout_job.py", "train_job.py"])
@pytest.mark.parametrize(
    ("options", "environment", "code", "message"),
    [
        (["--job-id", "x"], {"RAY_ADDRESS": "DEAD"}, 4, "ClusterUnreachable: no Ray cluster at 127.0.0.1:"),
        (["--job-id", "x"], {}, 4, "ClusterUnreachable: this process belongs to no Ray cluster"),
        ([], {}, 2, "BadInput: no job id: pass --job-id NAME"),
        (["--job-id", "x", "--cross-job-max-ahead", "-2"], {}, 2, "BadInput: --cross-job-max-ahead -2 is too small"),
    ],
)
def test_a_job_without_a_cluster_or_a_name_is_one_clear_line(tmp_path, script, options, environment, code, message):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # nobody listens
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        keep = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        keep |= {k: v.replace("DEAD", address) for k, v in environment.items()}
        keep |= {"PYTHONPATH": f"{ROOT}/slime_overlay:{EXAMPLE}"}
        command = [sys.executable, str(EXAMPLE / script), "--out", str(tmp_path), *options]
        run = subprocess.run(command, env=keep, capture_output=True, text=True, timeout=patient(60))
    assert run.returncode == code, run.stderr
    assert run.stderr.strip().splitlines()[-1].startswith(message)
    assert "Traceback" not in run.stderr
