"""A private cluster that stays apart from every other one; a stand-in for `ray start` is in Ray's place."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import job_api
import local_cluster
from local_cluster import CREDENTIALS, LocalCluster, NotStarted, begin_without, forget_ray, says_why
from tests.support.patience import patient

ROOT = Path(__file__).parents[2]
ELSEWHERE = {
    "RAY_ADDRESS": "127.0.0.1:1",
    "RAY_API_SERVER_ADDRESS": "http://127.0.0.1:1",
    "RAY_NAMESPACE": "theirs",
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": "theirs",
    "RAY_RUNTIME_ENV_HOOK": "their.hook",
    "RAY_JOB_CONFIG_JSON_ENV_VAR": "{}",
}

WORKS = "import time; end = time.monotonic() + 4 * SILENT_S\nwhile time.monotonic() < end: pass"
SLEEPS = "import time; time.sleep(60)"
WORKS_ON = "while True: pass"
FAILS = "print('Exception: no room'); sys.exit(3)"
READY = """
print("RAY_API_SERVER_ADDRESS='http://127.0.0.1:8' ray job submit\\n--block: will now block forever", flush=True)
import time; time.sleep(60)
"""
TOO_LATE = """
tried = folder / "tried"
if not tried.exists():
    tried.touch()
    sys.exit("The current node timed out during startup.")
"""


@pytest.fixture
def elsewhere(monkeypatch):
    """The user's shell names another cluster."""
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    for name, value in ELSEWHERE.items():
        monkeypatch.setenv(name, value)


def test_a_cluster_of_our_own_gets_nothing_of_rays_from_the_users_environment(elsewhere):
    cluster = LocalCluster(env={"RAY_JOB_STOP_WAIT_TIME_S": "4"})
    cluster.stop()
    assert {name: cluster.env[name] for name in ELSEWHERE if name in cluster.env} == {"RAY_AUTH_MODE": "disabled"}
    assert cluster.env["RAY_JOB_STOP_WAIT_TIME_S"] == "4"
    assert cluster.env["PATH"] == os.environ["PATH"]


@pytest.mark.parametrize(
    ("keep", "left"),
    [
        ((), {"RAY_AUTH_MODE": "disabled"}),
        (CREDENTIALS, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "theirs"}),  # for a cluster that was named
    ],
)
def test_the_users_variables_are_forgotten(elsewhere, keep, left):
    forget_ray(keep)
    assert {name: value for name, value in os.environ.items() if name.startswith("RAY_")} == left


def test_a_script_begins_anew_without_them_and_only_then(elsewhere, monkeypatch):
    begun = []
    monkeypatch.setattr(os, "execv", lambda program, words: begun.append(words))
    begin_without()
    monkeypatch.setenv("RAY_CLIENT_MODE", "0")  # as `import ray` does
    begin_without()
    begin_without()
    assert begun == [sys.orig_argv]


def test_rays_client_goes_to_the_address_that_is_given(elsewhere, monkeypatch):
    seen = []
    monkeypatch.setattr(
        job_api, "JobSubmissionClient", lambda given, **_: seen.append((given, os.environ["RAY_API_SERVER_ADDRESS"]))
    )
    job_api.job_client("http://ours:2")
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS")
    job_api.job_client("http://ours:3")
    assert seen == [("http://ours:2", "http://ours:2"), ("http://ours:3", "http://ours:3")]
    assert "RAY_API_SERVER_ADDRESS" not in os.environ


def sources():
    found = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in found.split():
        yield name, (ROOT / name).read_text()


def test_nobody_else_makes_rays_client():
    calls = [name for name, text in sources() if re.search(r"(?<![`\w])JobSubmissionClient\(", text)]
    assert calls == ["scripts/job_api.py"]


def test_every_script_with_a_cluster_of_its_own_forgets_the_users():
    made = [name for name, text in sources() if name.startswith("scripts/") and re.search(r"\bLocalCluster\(", text)]
    forgets = [name for name, text in sources() if re.search(r"^ +begin_without\(", text, re.MULTILINE)]
    no_driver = {"scripts/local_cluster.py", "scripts/launch_cluster.py"}
    assert len(made) > 5
    assert set(made) - no_driver - set(forgets) == set()


def start(monkeypatch, tmp_path, what: str) -> LocalCluster:
    """A cluster whose `ray start` does `what`."""
    ray = tmp_path / "ray"
    ray.write_text(
        f"#!{sys.executable}\nimport sys, pathlib\nSILENT_S = {local_cluster.SILENT_S}\n"
        "folder = pathlib.Path(next(w for w in sys.argv if w.startswith('--temp-dir')).partition('=')[2])\n"
        f"folder.mkdir(exist_ok=True)\n(folder / 'ray_current_cluster').write_text('127.0.0.2:7')\n{what}\n"
    )
    ray.chmod(0o755)
    cluster = LocalCluster()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", str(tmp_path / "python"))
        cluster.start()
    return cluster


def test_a_start_may_take_long_while_its_processes_work(monkeypatch, tmp_path):
    monkeypatch.setattr(local_cluster, "SILENT_S", patient(1.0))
    cluster = start(monkeypatch, tmp_path, WORKS + READY)
    assert (cluster.address, cluster.api) == ("127.0.0.2:7", "http://127.0.0.1:8")
    cluster.stop()


@pytest.mark.parametrize(
    ("what", "why"),
    [
        (SLEEPS, "it did nothing for 1 s"),
        (FAILS, "it ended with code 3. Ray said:\nException: no room"),
    ],
)
def test_a_start_that_fails_is_said_in_words(monkeypatch, tmp_path, capsys, what, why):
    monkeypatch.setattr(local_cluster, "SILENT_S", 1.0)
    made = []
    monkeypatch.setattr(local_cluster.tempfile, "mkdtemp", lambda **_: made.append(tmp_path / "it") or made[0])
    (tmp_path / "it").mkdir()
    with pytest.raises(SystemExit) as end:
        says_why(lambda: start(monkeypatch, tmp_path, what))()
    assert end.value.code == 4
    assert f"error: the local Ray cluster did not start: {why}" in capsys.readouterr().err
    assert not made[0].exists()


def test_a_start_that_always_does_something_ends_too(monkeypatch, tmp_path):
    monkeypatch.setattr(local_cluster, "START_S", 2.0)
    with pytest.raises(NotStarted, match="the local Ray cluster did not start: it was not ready after 2 s"):
        start(monkeypatch, tmp_path, WORKS_ON)


def test_a_start_that_ray_gave_too_little_time_is_tried_again(monkeypatch, tmp_path):
    cluster = start(monkeypatch, tmp_path, TOO_LATE + READY)
    assert cluster.api
    cluster.stop()
    with pytest.raises(NotStarted, match="timed out during startup"):
        start(monkeypatch, tmp_path, TOO_LATE.replace("not tried.exists()", "True") + READY)
