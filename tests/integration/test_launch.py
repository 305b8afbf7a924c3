"""launch_*.sh on a real cluster that asks for a token, and has a node for training: submit, follow, stop, tell.

The checkout is a stand-in without Ray: what counts here is the job, not what it does.
"""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

import local_cluster
from local_cluster import LocalCluster, command_of
from tests.chaos.nodes import Node
from tests.support.patience import patient
from tests.support.ray_jobs import ROOT, wait_for

TOKEN = "a-token-of-the-tests"
SCRIPT = """
import json, os, signal, sys, time

def stop(number, frame):
    print("finishing the step", flush=True)
    if "--deaf" not in sys.argv:
        sys.exit(0)

signal.signal(signal.SIGTERM, stop)
folder = os.path.dirname(os.path.abspath(__file__))
facts = {"argv": sys.argv[1:], "cwd": os.getcwd(), "files": sorted(os.listdir(folder))}
names = ("PYTHONPATH", "NCCL_NVLS_ENABLE", "CUDA_DEVICE_MAX_CONNECTIONS", "MINE", "CUDA_VISIBLE_DEVICES")
facts |= {name: os.environ.get(name) for name in names}
print("SAID " + json.dumps(facts), flush=True)
if "--end" in sys.argv:
    sys.exit(int(sys.argv[sys.argv.index("--end") + 1]))
while True:
    time.sleep(0.1)
"""


@pytest.fixture(scope="module")
def guarded() -> Iterator[LocalCluster]:
    """A cluster that wants a token, with a second node for training; a job may take 4 s to stop."""
    env = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAY_JOB_STOP_WAIT_TIME_S": "4"}
    with LocalCluster(num_cpus=2, object_store_bytes=100_000_000, env=env) as cluster:
        node = Node(cluster, "train", "127.0.0.3")
        try:
            node.start()
            yield cluster
        finally:
            node.end()


@pytest.fixture
def slime(tmp_path) -> Path:
    folder = tmp_path / "slime"
    folder.mkdir()
    for name in ("train.py", "cross_job_rollout.py"):
        (folder / name).write_text(SCRIPT)
    (folder / ".git").write_text("gitdir: elsewhere")
    return folder


class Launcher:
    """launch_ROLE.sh of an experiment, against a cluster."""

    def __init__(self, api: str, job_id: str, slime: Path, token: str | None = TOKEN):
        self.job_id, self.slime = job_id, slime
        self.env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.env |= {"RAY_API_SERVER_ADDRESS": api, "RAY_ADDRESS": "127.0.0.1:9"}  # the job API's address counts
        self.env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token} if token else {"RAY_AUTH_MODE": "disabled"}

    def begin(self, role: str, *words: str) -> subprocess.Popen[str]:
        command = [str(ROOT / "scripts" / f"launch_{role}.sh"), "--job-id", self.job_id, *words]
        return subprocess.Popen(command, env=self.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def __call__(self, role: str, *words: str) -> tuple[int, str, str]:
        """Exit code, output and errors."""
        process = self.begin(role, *words)
        try:
            out, errors = process.communicate(timeout=patient(90))
        finally:
            process.kill()
        return process.returncode, out, errors

    def submit(self, role: str, *slime_arguments: str) -> tuple[int, str, str]:
        more = ["--env", "NCCL_NVLS_ENABLE=1"] if role == "train" else []
        return self(role, "--slime", str(self.slime), "--no-verify", "--no-wait", *more, "--", *slime_arguments)

    def status(self, role: str) -> dict:
        code, out, errors = self(role, "--status", "--json")
        assert code == 0, errors
        return json.loads(out)

    def running(self, role: str) -> dict:
        """Wait until the job speaks; how it stands then."""
        found: list[dict] = []

        def speaks() -> bool:
            found[:] = [self.status(role)]
            return found[0]["state"] == "RUNNING" and said(found[0]["log"]) is not None

        wait_for(speaks, 60, lambda: str(found))
        return found[0]


def said(log: list[str]) -> dict | None:
    return next((json.loads(line[5:]) for line in log if line.startswith("SAID ")), None)


@pytest.fixture
def launch(guarded, job_id, slime) -> Launcher:
    return Launcher(guarded.api, job_id, slime)


@pytest.mark.ci
def test_a_job_is_followed_to_its_end_and_told_about_afterwards(launch, slime):
    words = ["--slime", str(slime), "--no-verify", "--env", "MINE=a=b", "--cross-job-max-ahead", "1"]
    code, out, errors = launch("train", *words, "--", "--lr", "1 2", "--end", "3")
    assert code == 3, errors
    facts = said(out.splitlines())
    switch = ["--enable-cross-job-communication", "--job-id", launch.job_id, "--cross-job-role", "train"]
    assert facts["argv"] == ["--lr", "1 2", "--end", "3", *switch, "--cross-job-max-ahead", "1"]
    assert facts["PYTHONPATH"] == f"/root/Megatron-LM:{slime}"
    assert (facts["MINE"], facts["CUDA_DEVICE_MAX_CONNECTIONS"], facts["NCCL_NVLS_ENABLE"]) == ("a=b", "1", "0")

    status = launch.status("train")
    assert (status["state"], status["exit_code"], status["node"]) == ("FAILED", 3, "127.0.0.3")  # its kind of node
    assert out.startswith(f"submitted {status['submission_id']}: the train job of {launch.job_id}, on a node with")
    assert said(status["log"]) == facts
    code, again, _ = launch("train", "--follow")
    assert code == 3
    assert again == out.partition("\n")[2]


def test_a_second_one_is_refused_and_the_first_stops_when_asked(launch):
    assert launch.submit("train")[0] == 0
    first = launch.running("train")
    code, out, errors = launch.submit("train")
    assert (code, out) == (2, "")
    assert f"error: the train job of {launch.job_id} is RUNNING already, as {first['submission_id']}" in errors
    assert f"launch_train.sh --job-id {launch.job_id} --stop" in errors
    assert launch.submit("rollout", "--end", "0")[0] == 0  # that is another job, on the head
    assert launch("rollout", "--follow")[0] == 0
    rollout = launch.status("rollout")
    assert rollout["node"] == "127.0.0.2"
    assert said(rollout["log"])["NCCL_NVLS_ENABLE"] == "1"  # which must be the same in both

    follower = launch.begin("train", "--follow")
    assert follower.stdout.readline()  # it is attached
    code, out, errors = launch("train", "--stop")
    assert code == 0, errors
    assert f"{first['submission_id']}: STOPPED" in out
    assert "    finishing the step" in out
    log, _ = follower.communicate(timeout=patient(60))
    assert follower.returncode == 1
    assert "finishing the step\n" in log

    assert launch("train", "--stop")[1].startswith(f"nothing to stop: {first['submission_id']}: STOPPED")
    assert launch.submit("train", "--end", "0")[0] == 0
    assert launch("train", "--follow")[0] == 0
    assert launch.status("train")["submission_id"] != first["submission_id"]


def test_a_job_that_does_not_stop_in_time_is_said(launch):
    assert launch.submit("train", "--deaf")[0] == 0
    launch.running("train")
    code, _, errors = launch("train", "--stop", "--timeout-s", "1")
    assert code == 1
    assert "it is RUNNING after 1 s" in errors
    assert launch("train", "--stop")[0] == 0  # Ray has killed it then, after 4 s
    assert launch.status("train")["state"] == "STOPPED"


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"RAY_AUTH_TOKEN": "another"}, "Authentication failed: Forbidden: Invalid authentication token"),
        ({"RAY_AUTH_MODE": "disabled"}, "Authentication required: Unauthorized: Missing authentication token"),
        ({"RAY_AUTH_TOKEN": "", "RAY_AUTH_TOKEN_PATH": "/nowhere"}, "file cannot be opened or is empty: /nowhere"),
        ({"RAY_AUTH_TOKEN": "", "HOME": "/nowhere"}, "couldn't find an authentication token"),
    ],
)
def test_a_token_that_is_wrong_or_missing_is_one_line(environment, reason, launch):
    launch.env |= environment
    code, out, errors = launch.submit("train")
    assert (code, out) == (2, "")
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert reason in line
    assert "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN to its token or RAY_AUTH_TOKEN_PATH" in line
    assert "Traceback" not in errors


def test_the_token_can_lie_in_a_file(launch, tmp_path):
    (tmp_path / "token").write_text(TOKEN)
    launch.env |= {"RAY_AUTH_TOKEN": "", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    code, _, errors = launch("train", "--status")
    assert code == 2
    assert f"error: no train job of {launch.job_id} was submitted" in errors


def test_a_folder_is_uploaded(launch, slime):
    code, out, errors = launch("train", "--working-dir", str(slime), "--no-verify", "--", "--end", "0")
    assert code == 0, errors
    facts = said(out.splitlines())
    assert facts["files"] == ["cross_job_rollout.py", "train.py"]
    assert str(slime) not in str(facts)
    assert facts["PYTHONPATH"].split(":")[0] == facts["cwd"]  # for its workers, too


def test_a_checkout_of_the_image_is_not_looked_for_here(launch):
    code, out, _ = launch("train", "--image-checkout", "/opt/no-slime", "--entrypoint-resources", "none", "--")
    assert code == 2  # python's
    assert "can't open file '/opt/no-slime/train.py'" in out
    assert launch.status("train")["node"] == "127.0.0.2"  # the head, as ever


def test_a_name_that_ray_knows_is_refused_in_one_line(launch, slime):
    words = ["--slime", str(slime), "--no-verify", "--submission-id", launch.job_id, "--", "--end", "0"]
    assert launch("train", *words)[0] == 0
    code, _, errors = launch("train", *words)
    assert code == 2
    assert f"says: ValueError: Job with submission_id {launch.job_id} already exists" in errors


def test_a_local_cluster_comes_and_goes_with_what_runs_in_it(job_id, slime, tmp_path):
    def local(*words: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
        command = [ROOT / "scripts" / "launch_cluster.sh", "local", *words]
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=patient(120), check=False)

    started = local("--num-cpus", "2", "--object-store-bytes", "100000000")
    assert started.returncode == 0, started.stderr
    record = json.loads((tmp_path / "slime-cross-job" / "launch-local.json").read_text())
    try:
        assert f"export RAY_API_SERVER_ADDRESS={record['api']} " in started.stdout
        launch = Launcher(record["api"], job_id, slime, token=None)
        assert launch.submit("rollout")[0] == 0
        launch.running("rollout")
        second = local()
        assert second.returncode == 2
        assert f"it runs already, at {record['api']}: end it first, with --stop" in second.stderr
        assert processes_of(record)
    finally:
        stopped = local("--stop")
    assert stopped.returncode == 0, stopped.stderr
    assert not processes_of(record)
    assert not Path(record["folder"]).exists()
    assert local("--stop").returncode == 2


def processes_of(record: dict) -> list[int]:
    """Those that have its marker in their environment, or its folder in their command line."""
    there = {pid for pid in psutil.pids() if record["folder"] in " ".join(command_of(pid))}
    return sorted({*local_cluster.processes_of(record["marker"], -1), *there} - {os.getpid()})
