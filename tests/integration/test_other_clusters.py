"""On a machine where another cluster runs, which the user's environment names: nothing of ours ever goes there."""

import contextlib
import os
import shlex
import signal
import subprocess
import sys

import pytest

from job_api import job_client
from local_cluster import LocalCluster
from tests.support.patience import patient, wait_for
from tests.support.ray_jobs import PYTHONPATH, ROOT

TOKEN = "t" * 32
LINES = "import os, sys; print(os.environ.get('RAY_ADDRESS'))"


class Theirs:
    """The other cluster, which asks for a token, and an environment that leads there."""

    def __init__(self, cluster: LocalCluster):
        self.cluster = cluster
        self._client = job_client(cluster.api, headers={"Authorization": f"Bearer {TOKEN}"})

    def environment(self, **more: str) -> dict[str, str]:
        names = {
            "RAY_ADDRESS": self.cluster.address,
            "RAY_API_SERVER_ADDRESS": self.cluster.api,
            "RAY_NAMESPACE": "its",
        }
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
        return {**os.environ, "PYTHONPATH": PYTHONPATH, **names, **token, **more}

    def jobs(self) -> list[str | None]:
        """What was submitted there, and every driver that has connected."""
        return [job.submission_id or job.job_id for job in self._client.list_jobs()]


@pytest.fixture(scope="module")
def theirs():
    env = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    with LocalCluster(num_cpus=1, object_store_bytes=80_000_000, env=env) as cluster:
        yield Theirs(cluster)


def script(name, *words, env, timeout_s=240):
    command = [sys.executable, str(ROOT / name), *map(str, words)] if name.endswith(".py") else [ROOT / name, *words]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=patient(timeout_s))


@pytest.mark.ci
def test_the_environment_leads_to_the_other_cluster_and_the_demo_does_not_go_there(theirs, tmp_path):
    run = script("scripts/demo.py", "--rollouts", 2, "--out", tmp_path, env=theirs.environment())
    assert run.returncode == 0, run.stdout + run.stderr
    assert "acked 2" in run.stdout
    assert theirs.jobs() == []
    # the witness: with the same environment, Ray's own client goes there whatever it is told
    what = "from ray.job_submission import JobSubmissionClient as C; C('http://127.0.0.1:1').submit_job(entrypoint='true')"
    subprocess.run([sys.executable, "-c", what], env=theirs.environment(), check=True, timeout=patient(120))
    assert len(theirs.jobs()) == 1


def stays_empty(theirs):
    """Afterwards nothing has been added to the other cluster's jobs."""

    @contextlib.contextmanager
    def check():
        before = theirs.jobs()
        yield
        assert theirs.jobs() == before

    return check()


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(["tests/chaos/chaos.py", "--minutes", "0.1", "--most", "1", "--least", "0", "--out"], id="chaos"),
        pytest.param(["scripts/bench_metrics.py", "--quick", "--json"], id="bench"),
    ],
)
@pytest.mark.parametrize("address", ["theirs", "auto"])
def test_what_has_a_cluster_of_its_own_does_not_go_there(theirs, tmp_path, words, address):
    more = {"PYTHONPATH": f"{ROOT}/slime_overlay"} | ({"RAY_ADDRESS": "auto"} if address == "auto" else {})
    words = [*words, str(tmp_path / "it")] if words[-1] in ("--out", "--json") else words
    with stays_empty(theirs):
        run = script(*words, env=theirs.environment(**more), timeout_s=400)
        assert run.returncode == 0, run.stdout + run.stderr


def test_a_launch_goes_where_its_command_line_says(theirs, cluster, tmp_path):
    for name in ("train.py", "cross_job_rollout.py"):
        (tmp_path / name).write_text(LINES)
    words = ["--job-id", "x", "--address", cluster.api, "--slime", str(tmp_path), "--no-verify", "--"]
    with stays_empty(theirs):
        run = script("scripts/launch_train.sh", *words, env=theirs.environment())
        assert run.returncode == 0, run.stdout + run.stderr
    assert f", to {cluster.api}" in run.stdout
    assert cluster.address in run.stdout  # where the job itself was


def test_a_command_names_the_clusters_of_this_machine_where_it_is_to_choose(theirs, cluster):
    env = {k: v for k, v in theirs.environment().items() if not k.startswith("RAY_")}
    for words in (["pause", "-y"], ["status", "--address", "auto"], ["gc", "-y"]):
        run = script("scripts/slime-cross-job", *words, env=env | {"PYTHON": sys.executable})
        assert run.returncode == 2, run.stderr
        assert run.stderr.startswith("BadInput: several Ray clusters have a node on this machine, name one of them: ")
        assert theirs.cluster.address in run.stderr
        assert cluster.address in run.stderr


def test_a_demo_that_is_interrupted_stops_its_jobs_on_a_cluster_that_goes_on(cluster, theirs, tmp_path):
    words = ["--address", cluster.address, "--rollouts", "1000", "--job-id", "interrupted", "--out", str(tmp_path)]
    env = {k: v for k, v in theirs.environment().items() if not k.startswith("RAY_AUTH")} | {
        "RAY_AUTH_MODE": "disabled"
    }
    command = [sys.executable, str(ROOT / "scripts" / "demo.py"), *words]
    with (
        stays_empty(theirs),
        subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as run,
    ):
        wait_for(lambda: (tmp_path / "train.jsonl").exists(), 120)
        run.send_signal(signal.SIGINT)
        said = run.communicate(timeout=patient(60))[0].decode()
    assert run.returncode == 128 + signal.SIGINT, said
    client = job_client(cluster.api)
    jobs = [job for job in client.list_jobs() if job.submission_id and str(tmp_path) in shlex.split(job.entrypoint)]
    assert len(jobs) == 2
    wait_for(lambda: all(client.get_job_status(job.submission_id).is_terminal() for job in jobs), 60)
    assert "Traceback" not in said


def test_an_address_that_does_not_answer_is_one_line(tmp_path):
    for address, why in (
        ("127.0.0.1:1", "ClusterUnreachable: no Ray cluster at 127.0.0.1:1: nobody listens there"),
        ("ray://127.0.0.1:1", "BadInput: ray://127.0.0.1:1 is an address of Ray's Client"),
    ):
        run = script("scripts/demo.py", "--address", address, "--out", tmp_path, env={**os.environ}, timeout_s=120)
        assert run.returncode == (2 if "ray:" in address else 4), run.stderr
        assert run.stderr.strip().splitlines()[-1].startswith(why)
        assert "Traceback" not in run.stderr
