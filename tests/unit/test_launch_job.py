"""The jobs behind launch_*.sh, with a stand-in for Ray's client: found, refused, followed through lost connections."""

import os
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import requests
from ray.exceptions import RayError
from ray.job_submission import JobStatus

import job_api
import launch
import launch_job


class Client:
    """Ray's JobSubmissionClient; `logs` are what each following of a log yields, an exception breaks it off."""

    def __init__(self):
        self.jobs = []
        self.logs = []
        self.submitted = []

    def list_jobs(self):
        return self.jobs

    def get_job_info(self, name):
        return next(job for job in self.jobs if job.submission_id == name)

    def get_job_logs(self, name):
        return "one\ntwo\n"

    def submit_job(self, **how):
        self.submitted.append(how)
        return "new"

    async def tail_job_logs(self, name):
        for piece in self.logs.pop(0):
            if isinstance(piece, Exception):
                raise piece
            yield piece


def job(name, status, role="train", start=1, job_id="exp", **more):
    facts = {"message": None, "runtime_env": None, "driver_exit_code": None, "driver_info": None, "end_time": None}
    facts |= {"driver_node_id": "n1", "driver_agent_http_address": "http://10.0.0.7:52365"}
    metadata = {launch_job.JOB_ID: job_id, launch_job.ROLE: role}
    facts |= {"submission_id": name, "status": JobStatus(status), "start_time": start, "metadata": metadata}
    return SimpleNamespace(**facts | more)


@pytest.fixture
def client(monkeypatch):
    client = Client()
    monkeypatch.setattr(launch_job, "job_client", lambda address: client)
    monkeypatch.setattr(launch_job, "AGAIN_S", 0.0)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")
    return client


@pytest.fixture
def jobs(client):
    return launch_job.Jobs("http://head:8265", "exp", "train")


def nodes(monkeypatch, *resources):
    def list_nodes(address, **_):
        assert address == "http://head:8265"
        return [SimpleNamespace(resources_total=each) for each in resources]

    monkeypatch.setattr(launch_job.state, "list_nodes", list_nodes)


def test_the_newest_of_role_and_experiment_is_found(client, jobs):
    client.jobs = [
        job("older", "FAILED", start=1),
        job("newest", "SUCCEEDED", start=3),
        job("old", "STOPPED", start=2),
        job("rollout", "RUNNING", role="rollout", start=9),
        job("other", "RUNNING", job_id="exp2", start=9),
        job("foreign", "RUNNING", start=9, metadata=None),
        job(None, "RUNNING", start=9),  # a driver that nobody submitted
    ]
    assert jobs.latest() == "newest"
    jobs.refuse_a_second()


def test_that_there_is_none_is_said(client, jobs):
    with pytest.raises(launch_job.Unanswered, match="no train job of exp was submitted to the cluster at http://head"):
        jobs.latest()


@pytest.mark.parametrize("status", ["PENDING", "RUNNING"])
def test_a_second_one_is_refused_and_told_what_to_do(status, client, jobs):
    client.jobs = [job("first", status), job("ended", "FAILED", start=2)]
    with pytest.raises(
        launch_job.Unanswered, match=rf"{status} already, as first .* launch_train.sh --job-id exp --stop"
    ):
        jobs.refuse_a_second()


def test_a_job_that_is_submitted_can_be_found_again_and_has_what_the_other_has(client, monkeypatch):
    client.jobs = [job("r", "RUNNING", role="rollout", runtime_env={"env_vars": {"NCCL_NVLS_ENABLE": "7"}})]
    nodes(monkeypatch, {"CPU": 8.0}, {"train": 1.0})
    words = "--job-id exp --address head:8265 --image-checkout /opt/slime --no-wait -- --lr 1"
    assert launch.main("train", words.split()) == 0
    (how,) = client.submitted
    assert how["metadata"] == {launch_job.JOB_ID: "exp", launch_job.ROLE: "train"}
    assert how["entrypoint_resources"] == {"train": 0.01}
    assert how["entrypoint"] == (
        "env -u CUDA_VISIBLE_DEVICES python3 -u /opt/slime/train.py --lr 1 "
        "--enable-cross-job-communication --job-id exp --cross-job-role train"
    )
    assert how["runtime_env"]["env_vars"]["NCCL_NVLS_ENABLE"] == "7"
    assert "working_dir" not in how["runtime_env"]


def test_drivers_go_where_their_resource_is(client, jobs, monkeypatch, capsys):
    nodes(monkeypatch, {"CPU": 8.0}, None, {"rollout": 1.0})
    assert jobs.entry_resources(None) == {}
    assert jobs.entry_resources({}) == {}
    assert jobs.entry_resources({"rollout": 0.5}) == {"rollout": 0.5}
    assert capsys.readouterr().err == ""
    assert jobs.entry_resources({"train": 0.5}) == {"train": 0.5}
    assert 'no node has {"train": 0.5} now: the job waits for one' in capsys.readouterr().err


def test_a_log_is_followed_through_lost_connections(client, jobs, capsys):
    client.jobs = [job("j", "FAILED", driver_exit_code=5, message="failed, last available logs (...):\nhello\n")]
    client.logs = [["hel", RuntimeError("closed")], [ConnectionError("away")], ["hello\nwor", "ld\n"]]
    assert jobs.follow("j") == 5
    assert capsys.readouterr().out == "hello\nworld\nj: FAILED failed\n"


@pytest.mark.parametrize(
    ("end", "advised"),
    [
        ("ModuleNotFoundError: No module named 'sglang'\n", "the driver's Python has no sglang: "),
        ("ModuleNotFoundError: No module named 'sglang'\nNoResources: none", ""),
    ],
)
def test_a_driver_without_slimes_packages_is_told_where_they_belong(client, jobs, capsys, end, advised):
    client.jobs = [job("j", "FAILED", driver_exit_code=1, message=f"exit code 1, last available logs (...):\n{end}")]
    client.logs = [[]] * 9
    assert jobs.follow("j") == 1
    said = capsys.readouterr().out.removeprefix("j: FAILED exit code 1")
    assert advised in said
    assert bool(said.strip()) == bool(advised)


def test_a_log_that_is_gone_does_not_hold_up_the_end(client, jobs, capsys):
    client.jobs = [job("j", "STOPPED")]
    client.logs = [[RuntimeError("closed")]] * 9
    assert jobs.follow("j") == 1
    assert capsys.readouterr().out == "j: STOPPED\n"


def test_a_cluster_that_does_not_come_back_ends_the_following(client, jobs, capsys, monkeypatch):
    client.logs = [[RuntimeError("closed")]]
    monkeypatch.setattr(client, "get_job_info", Mock(side_effect=ConnectionError("refused")))
    monkeypatch.setattr(launch_job, "LOST_S", 0.0)
    assert jobs.follow("j") == 1
    assert "lost j, which may go on (--follow attaches to it again): no Ray job API at" in capsys.readouterr().err


def test_ray_that_does_not_answer_is_not_waited_for(client, jobs, monkeypatch):
    monkeypatch.setattr(launch_job, "ANSWER_S", 0.1)
    monkeypatch.setattr(client, "list_jobs", lambda: time.sleep(30))
    with pytest.raises(launch_job.Unanswered, match=r"at http://head:8265 gave no answer within 0.1 s"):
        jobs.latest()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            RayError("Authentication failed: Forbidden: Invalid token\n\nmore. And more."),
            r"did not let us in \(Authentication failed: Forbidden: Invalid token\): set RAY_AUTH_MODE=token, and RAY",
        ),
        (
            RuntimeError(
                "Request failed with status code 400: Traceback (most recent ...\n  x\nValueError: it is.\n."
            ),
            "Ray at http://head:8265 says: ValueError: it is.",
        ),
    ],
)
def test_what_ray_says_is_one_line_and_exit_code_2(error, said, client, capsys, monkeypatch):
    monkeypatch.setattr(client, "list_jobs", Mock(side_effect=error))
    with pytest.raises(SystemExit, match=said) as end:
        launch.main("train", ["--job-id", "exp", "--address", "head:8265", "--status"])
    assert len(str(end.value.code).splitlines()) == 1


def test_where_nobody_answers_is_one_line_and_exit_code_4(client, capsys, monkeypatch):
    monkeypatch.setattr(client, "list_jobs", Mock(side_effect=ConnectionError("Failed to connect.")))
    assert launch.main("train", ["--job-id", "exp", "--address", "head:8265", "--status"]) == 4
    assert capsys.readouterr().err == "error: no Ray job API at http://head:8265: Failed to connect.\n"


PROXIES = ("http_proxy", "https_proxy", "no_proxy", "all_proxy")


@pytest.fixture
def proxy(monkeypatch):
    """A proxy for everything, that nobody is."""
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("http_proxy", "http://me:secret@127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "example.org")
    monkeypatch.setenv("NO_PROXY", "example.org")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_no_proxy_stands_before_a_dashboard_of_this_machine(host, proxy):
    class Dashboard(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"it is me")

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Dashboard) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://{host}:{server.server_port}"
        with pytest.raises(requests.exceptions.ProxyError):
            requests.get(address, timeout=30)
        job_api.avoid_proxy(address)
        assert requests.get(address, timeout=30).text == "it is me"
        server.shutdown()
    assert os.environ["no_proxy"] == f"example.org,{host}", "what was there stays"


def test_the_proxy_that_was_asked_is_named(proxy, client, capsys, monkeypatch):
    monkeypatch.setattr(client, "list_jobs", Mock(side_effect=ConnectionError("Failed to connect.")))
    job_api.avoid_proxy("http://8.8.8.8:8265")  # not ours: the proxy may be the way to it
    assert launch.main("train", ["--job-id", "exp", "--address", "8.8.8.8:8265", "--status"]) == 4
    said = capsys.readouterr().err
    assert "through the proxy http://127.0.0.1:9; to go there without it, add 8.8.8.8 to no_proxy" in said
    assert "secret" not in said


def test_status_in_words_and_as_json(client, jobs, capsys):
    client.jobs = [job("j", "FAILED", start=1_000, driver_exit_code=8, message="no, last available logs ...")]
    assert jobs.tell(as_json=False) == 0
    told = capsys.readouterr().out
    for line in (
        "submission id  j",
        "state          FAILED",
        "message        no\n",
        "node           10.0.0.7",
        "    two",
    ):
        assert line in told
    assert jobs.tell(as_json=True) == 0
    told = launch_job.json.loads(capsys.readouterr().out)
    assert (told["exit_code"], told["ended"], told["started"]) == (8, None, "1970-01-01 00:00:01+00:00")
    assert told["log"] == ["one", "two"]


def test_a_job_that_has_ended_is_not_stopped(client, jobs, capsys):
    client.jobs = [job("j", "SUCCEEDED", message="Job finished successfully.")]
    assert jobs.stop(1) == 0
    assert capsys.readouterr().out == "nothing to stop: j: SUCCEEDED Job finished successfully.\n"


def test_a_job_is_stopped_and_its_end_waited_for(client, jobs, capsys, monkeypatch):
    client.jobs = [job("j", "RUNNING")]
    monkeypatch.setattr(client, "stop_job", lambda name: True, raising=False)
    assert jobs.stop(0) == 1
    assert "it is RUNNING after 0 s: see --status, or --stop again" in capsys.readouterr().err
    monkeypatch.setattr(client, "stop_job", lambda name: client.jobs.insert(0, job("j", "STOPPED", message="done")))
    assert jobs.stop(60) == 0
    told = capsys.readouterr().out
    assert re.search(
        r"j: STOPPED done \(\d+\.\d s after it was asked\)\. The end of its log:\n    one\n    two\n", told
    )
