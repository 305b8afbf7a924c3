"""A store's password is nowhere to be seen: not in arguments of processes, in what Ray tells of jobs, in logs, nor in
what tools show. The witness is the job id, which the same search finds in all of these places."""

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import redis
import yaml

from job_api import job_client
from local_cluster import LocalCluster, command_of, end_with_parent, free_ports
from tests.support.patience import patient
from tests.support.ray_jobs import JOBS, PYTHONPATH, ROOT, SubmittedJob, wait_for
from tests.support.redis_server import program

RUN_STORE = "RUN_STORE"  # the variable that holds the URI, on the nodes
WRONG = f"wrong{uuid.uuid4().hex}"


class Arguments:
    """Remembers the command line of every process that it sees on this machine, while the block lasts."""

    def __init__(self) -> None:
        self.seen: set[bytes] = set()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def _look(self) -> None:
        while not self._over.wait(0.1):
            self.seen |= {"\0".join(command_of(pid)).encode() for pid in psutil.pids()}

    def __enter__(self) -> "Arguments":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


class Run:
    """Two jobs with a store in a Redis that asks for a password: one takes the URI from a variable of the nodes, one
    from a file. And what is left of a third, whose password is wrong."""

    def __init__(self, cluster: LocalCluster, server: redis.Redis, file: Path, wrong: Path, job_id: str):
        self._cluster, self._server, self.job_id = cluster, server, job_id
        self._client = job_client(cluster.api)
        self._env = {**os.environ, **cluster.env, "PYTHONPATH": PYTHONPATH, "RAY_ADDRESS": cluster.address}
        self.jobs = [
            self._job("producer", job_id, "--cross-job-store-env", RUN_STORE),
            self._job("consumer", job_id, "--cross-job-store-file", str(file)),
            self._job("consumer", f"{job_id}-wrong", "--cross-job-store-file", str(wrong)),
        ]
        self.jobs[0].said()
        self.jobs[1].said()
        self.jobs[2].wait()

    def _job(self, role: str, job_id: str, *where: str) -> SubmittedJob:
        script = [sys.executable, str(JOBS / "secret_store.py"), role, "--job-id", job_id, *where]
        return SubmittedJob(self._client, script, {"PYTHONPATH": PYTHONPATH})

    def command(self, *words: str) -> str:
        return self._python("-m", "slime.cross_job", *words)

    def recordings(self) -> str:
        script = str(ROOT / "slime_overlay" / "cross_job_replay.py")
        return self._python(script, "list", "--recording", self.job_id, "--store-env", RUN_STORE)

    def _python(self, *words: str) -> str:
        """What it says on both of its streams; the variable is in its environment."""
        done = subprocess.run(
            [sys.executable, *words], env=self._env, capture_output=True, text=True, timeout=patient(180), check=False
        )
        return done.stdout + done.stderr

    def places(self, folder: Path, arguments: Arguments) -> Iterator[tuple[str, bytes]]:
        """(where, all that is seen there) of a run; each holds the job id at least."""
        here, report = ("--job-id", self.job_id), folder / "report.html"
        yield "status", self.command("status", *here, "--json").encode()
        yield "report's figures", self.command("report", *here, "--json", "--out", str(report)).encode()
        yield "report.html", report.read_bytes()
        yield "doctor", self.command("doctor", *here, "--store-env", RUN_STORE, "--json").encode()
        yield "a recording's list", self.recordings().encode()
        yield "metrics", wait_for(self._metrics, 60)
        with urllib.request.urlopen(f"{self._cluster.api}/api/jobs/", timeout=60) as answer:
            yield "the job API", answer.read()
        yield "ray job list", str(self._client.list_jobs()).encode()
        for number, job in enumerate(self.jobs):
            yield f"log of job {number}", job.logs.encode()
        files = [path for path in (self._cluster.folder / "ray").rglob("*") if path.is_file()]
        yield "Ray's files", b"\n".join(path.read_bytes() for path in files)
        yield "the store", b"\n".join(self._stored())
        yield "arguments of processes", b"\n".join(arguments.seen)

    def _metrics(self) -> bytes:
        targets = self._cluster.folder / "ray" / "prom_metrics_service_discovery.json"
        found = b""
        for target in json.loads(targets.read_text()) if targets.exists() else []:
            for address in target["targets"]:
                with (
                    contextlib.suppress(OSError),  # Ray names some that do not listen
                    urllib.request.urlopen(f"http://{address}/metrics", timeout=60) as answer,
                ):
                    found += answer.read()
        return found if self.job_id.encode() in found else b""

    def _stored(self) -> Iterator[bytes]:
        read = {b"string": self._server.get, b"hash": lambda key: b"\n".join(self._server.hgetall(key).values())}
        for key in self._server.scan_iter():
            yield key
            yield read.get(self._server.type(key), lambda key: b"")(key)


@pytest.mark.ci
def test_the_password_of_a_store_is_nowhere_to_be_seen(own_redis, tmp_path, job_id):
    password = f"hunter{uuid.uuid4().hex}"
    redis_server = own_redis(requirepass=password)
    file, wrong = tmp_path / "uri", tmp_path / "wrong"
    file.write_text(redis_server.uri)
    wrong.write_text(redis_server.uri.replace(password, WRONG))
    server = redis.Redis(port=redis_server.port, password=password)
    env = {"PYTHONPATH": PYTHONPATH, RUN_STORE: redis_server.uri}
    with Arguments() as arguments, LocalCluster(env=env) as cluster:
        run = Run(cluster, server, file, wrong, job_id)
        found = dict(run.places(tmp_path, arguments))
    assert b"***" in found["status"], found["status"]  # the store is shown, without its password
    assert b"does not let us in" in found["log of job 2"], found["log of job 2"][-3000:]
    unseen = [where for where, text in found.items() if job_id.encode() not in text]
    assert unseen == [], "the search finds nothing there"
    for secret in (password, WRONG):
        seen = [where for where, text in found.items() if secret.encode() in text]
        assert seen == [], {where: context(found[where], secret) for where in seen}


def context(text: bytes, secret: str) -> list[bytes]:
    return [text[max(0, m.start() - 200) : m.end() + 50] for m in re.finditer(secret.encode(), text)][:3]


# ---------------------------------------------------------------- the head's own Redis


def scripts() -> dict[str, str]:
    """The shell commands by which docker-compose.yml and redis.yaml start a Redis."""
    compose = yaml.safe_load((ROOT / "docker" / "docker-compose.yml").read_text())["services"]["redis"]
    _, stateful = yaml.safe_load_all((ROOT / "docker" / "k8s" / "redis.yaml").read_text())
    (container,) = stateful["spec"]["template"]["spec"]["containers"]
    (first,), (second,) = compose["command"], container["args"]
    return {"compose": first.replace("$$", "$"), "k8s": second}


@pytest.mark.parametrize("where", ["compose", "k8s"])
def test_the_redis_of_the_head_asks_for_a_password_that_no_argument_shows(where, tmp_path):
    password = uuid.uuid4().hex
    (port,) = free_ports(1)
    (tmp_path / "password").write_text(password)
    script = scripts()[where].replace("redis-server -", f"{program()} - --bind 127.0.0.1 --port {port}")
    script = re.sub(r"--dir \S+", f"--dir {tmp_path}", script).replace("/run/slime-cross-job-redis", str(tmp_path))
    env = {"PATH": os.environ["PATH"], "REDISCLI_AUTH": password}
    command = ["sh", "-c", script]
    with subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, preexec_fn=end_with_parent) as process:
        try:
            client = redis.Redis(port=port, password=password)
            wait_for(lambda: answers(client) or process.poll() is not None, 20)
            client.set("table", "kept")
            with pytest.raises(redis.AuthenticationError):
                redis.Redis(port=port).ping()
            with pytest.raises(redis.exceptions.NoPermissionError):
                client.config_get("dir")
            words = " ".join(command_of(process.pid))
            assert str(port) in words  # the witness
            assert password not in words
        finally:
            process.kill()


def answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.ConnectionError:
        return False
