"""The command line on a real cluster: what it shows is so, reading disturbs nothing, steering does what it says."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
from typer.testing import CliRunner

from slime.cross_job import Batch, Consumer, Producer
from slime.cross_job.errors import CrossJobError, Drained, EndOfStream, HeldBack, NotOwner, PayloadDamaged
from slime.cross_job.ops import cli, export, steer  # noqa: F401  they add their commands
from slime.cross_job.ops.app import app
from tests.support.patience import patient
from tests.support.ray_jobs import PYTHONPATH

ROOT = Path(__file__).parents[2]
HOSTILE = "\x1b[2J\x1b]0;owned\x07 <script>alert(1)</script> \u202e [bold]"


def columns(rollout_id: int) -> dict[str, list[Any]]:
    return {"text": [HOSTILE, "plain"], "tokens": [[1, 2, rollout_id], [4]], "reward": [0.5, 1.0]}


@dataclass
class Run:
    job_id: str
    producer: Producer
    consumer: Consumer


@pytest.fixture
def a_run(driver: Any, job_id: str) -> Iterator[Run]:
    """Two rollouts: 0 is acked, 1 is leased, 2 is demanded."""
    with (
        Producer(job_id, max_ahead=0, retain=5, traces="on", heartbeat_s=0.2, dead_after_s=5) as producer,
        Consumer(job_id) as consumer,
    ):
        for rollout_id in range(2):
            consumer.demand(rollout_id)
            assert producer.next_demand(timeout_s=10) == rollout_id
            producer.publish(rollout_id, columns(rollout_id), meta={"reward": 0.75}, weight_version=0)
            rollout = consumer.claim(rollout_id)
            with consumer.span("train", rollout_id):
                assert len(rollout.batch["text"]) == 2
        consumer.ack(0)
        consumer.demand(2)
        time.sleep(0.5)  # for a sign of life, which tells the spans
        yield Run(job_id, producer, consumer)


def ask(*words: Any, code: int = 0) -> str:
    """What a command prints on stdout."""
    result = CliRunner().invoke(app, [*map(str, words)], env=environment())  # this machine may have other clusters
    if isinstance(result.exception, CrossJobError):
        assert result.exception.exit_code == code, result.exception
        return str(result.exception)
    assert result.exit_code == code, (result.output, result.exception)
    assert not isinstance(result.exception, Exception), result.exception
    return result.stdout


def asked(*words: Any) -> Any:
    return json.loads(ask(*words, "--json"))


@pytest.mark.ci
def test_reading(a_run, tmp_path):
    run, here = a_run, ("--job-id", a_run.job_id)
    before = (ray.util.list_named_actors(True), steady(run.consumer.status()))

    assert asked("jobs")[run.job_id]["published"] == 2
    assert run.job_id in ask("jobs", "--all-namespaces")
    status = asked("status", *here)
    assert (status["published"], status["claimed"], status["acked"], status["demanded"]) == (2, 2, 1, 1)
    assert status["standing"][0]["level"] == "ok"
    assert [event["kind"] for event in status["last_events"]] == ["attached", "attached"]
    assert "2 published, 2 claimed, 1 acked" in ask("status", *here)
    assert "rollout job" in ask("top", "--once", *here)

    listed = asked("ls", *here)
    assert [(row["rollout_id"], row["state"]) for row in listed["rollouts"]] == [
        *((2, "demanded"), (1, "claimed"), (0, "acked"))
    ]
    assert asked("ls", "--limit", 1, *here)["more"] == 2
    assert [row["rollout_id"] for row in asked("ls", "--before", 1, *here)["rollouts"]] == [0]
    assert [row["rollout_id"] for row in asked("ls", "--state", "acked", *here)["rollouts"]] == [0]
    assert "there are demanded" in ask("ls", "--state", "bogus", *here, code=2)

    shown = asked("show", 1, *here)
    assert shown["groups"]["train"]["state"] == "leased"
    assert shown["samples"]["samples"][0]["values"]["text"] == HOSTILE
    assert shown["samples"]["columns"] == {"text": "str", "tokens": "list", "reward": "float"} or shown["samples"]
    words = ask("show", 1, "--samples", 2, *here)
    assert "\x1b" not in words
    assert "<script>" in words
    assert "was not published" in ask("show", 99, *here, code=2) or "is not published" in ask(
        "show", 99, *here, code=2
    )

    lines = [json.loads(line) for line in ask("peek", 1, "--count", 5, *here).splitlines()]
    assert [line["tokens"] for line in lines] == [[1, 2, 1], [4]]

    tailed = [json.loads(line) for line in tail_for(5, *here)]
    assert {line["rollout"]["rollout_id"] for line in tailed if "rollout" in line} == {0, 1, 2}

    ask("wait", "--acked", 1, "--timeout", 5, *here)
    assert "did not come so far" in ask("wait", "--acked", 9, "--timeout", 0.3, *here, code=5)
    assert "say what to wait for" in ask("wait", *here, code=2)

    made = json.loads(ask("trace", *here))
    spans = [(e["args"].get("rollout_id"), e["name"]) for e in made["traceEvents"] if e["ph"] == "X"]
    named = {name for _, name in spans}
    assert {"demand", "generate", "publish", "queue", "claim", "transfer", "train", "ack", "rollout 0"} <= named

    ask("export", 0, 1, "--out", tmp_path / "arrow", *here)
    again = Batch.from_ipc((tmp_path / "arrow" / "rollout-1.part-0.arrow").read_bytes())
    assert again.to_pydict() == Batch.pack(columns(1)).to_pydict()
    ask("export", 1, "--out", tmp_path / "lines", "--format", "jsonl", *here)
    rows = [json.loads(line) for line in (tmp_path / "lines" / "rollout-1.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == [HOSTILE, "plain"]
    assert "cannot be made" in ask("export", 1, "--out", tmp_path / "arrow", *here, code=2)
    assert "no training data of slime" in ask("export", 1, "--out", tmp_path / "d", "--format", "debug", *here, code=2)
    assert "there are arrow" in ask("export", 1, "--out", tmp_path / "x", "--format", "csv", *here, code=2)

    assert (ray.util.list_named_actors(True), steady(run.consumer.status())) == before


def steady(status: dict[str, Any]) -> dict[str, Any]:
    """What does not change with time alone."""
    moving = ("idle_s", "oldest_queued_s", "producer", "consumers", "standing", "waited")
    return {name: value for name, value in status.items() if name not in moving}


def tail_for(count: int, *here: str) -> list[str]:
    """The first lines of `tail --json`, which goes on."""
    command = [sys.executable, "-m", "slime.cross_job", "tail", "--json", *here]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(count)]
        process.terminate()
    return lines


def environment() -> dict[str, str]:
    address = ray.get_runtime_context().gcs_address
    return {**os.environ, "RAY_ADDRESS": address, "PYTHONPATH": PYTHONPATH, "COLUMNS": "160"}


@pytest.mark.ci
def test_steering(a_run):
    run, here = a_run, ("--job-id", a_run.job_id)
    assert "add --yes" in ask("pause", *here, code=2)
    assert run.consumer.status()["control"] == "running"
    ask("pause", "--yes", *here)
    with pytest.raises(HeldBack):
        run.producer.next_demand(timeout_s=0.2)
    ask("resume", "--yes", *here)
    assert run.producer.next_demand(timeout_s=10) == 2
    run.producer.publish(2, columns(2))

    ask("requeue", 1, "--yes", *here)
    with pytest.raises(NotOwner):
        run.consumer.ack(1)
    assert "nobody" in ask("requeue", 1, "--yes", *here, code=3)

    ask("drop", 2, "--yes", *here)
    assert run.producer.next_demand(timeout_s=10) == 2
    run.producer.publish(2, columns(3))
    assert "taken effect" in ask("drop", 0, "--yes", *here, code=3)
    assert [run.consumer.claim(timeout_s=10).rollout_id for _ in range(2)] == [1, 2]
    assert run.consumer.status()["dropped"] == 1

    assert "is alive" in ask("gc", "--forget", run.job_id, "--yes", code=3)
    assert asked("quarantine", *here) == {}
    assert "has no durable store" in ask("quarantine", "--delete", "x", *here, code=2)
    ask("drain", "--yes", *here)
    with pytest.raises(EndOfStream):
        run.producer.next_demand(timeout_s=10)
    run.producer.stop()
    with pytest.raises(Drained):
        run.consumer.claim(timeout_s=10)
    kinds = [event["kind"] for event in asked("status", *here)["last_events"]]
    assert kinds[2:] == ["paused", "running", "requeued", "discarded", "draining", "stopped"]


def test_a_terminal_is_asked(a_run):
    for answer, after in ((b"n\n", "running"), (b"y\n", "paused")):
        said = on_a_terminal(["pause", "--job-id", a_run.job_id], answer)
        where = ray.get_runtime_context().gcs_address
        assert f"on the Ray cluster at {where}: job {a_run.job_id}: nothing new is generated until" in said
        assert a_run.consumer.status()["control"] == after


def on_a_terminal(words: list[str], answer: bytes) -> str:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "slime.cross_job", *words]
    process = subprocess.Popen(command, env=environment(), stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    said, end = b"", time.monotonic() + patient(60)
    try:
        while time.monotonic() < end:
            if select.select([ours], [], [], 0.5)[0]:
                try:
                    said += os.read(ours, 4096)
                except OSError:  # it has ended
                    break
                if b"[y/N]" in said and answer:
                    os.write(ours, answer)
                    answer = b""
    finally:
        process.kill() if process.poll() is None and time.monotonic() > end else process.wait(patient(30))
        os.close(ours)
    return said.decode()


@pytest.mark.ci
def test_what_is_wrong_is_one_line_and_an_exit_code(driver, job_id):
    def end(*words: str, **env: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "slime.cross_job", *words]
        done = subprocess.run(
            command, env={**environment(), **env}, capture_output=True, text=True, timeout=patient(120)
        )
        assert "Traceback" not in done.stderr
        return done.returncode, done.stderr.strip()

    code, said = end("status", "--namespace", "nobody_here")
    assert (code, said.count("\n")) == (4, 0)
    assert "namespace 'nobody_here' has no broker" in said
    code, said = end("status", RAY_ADDRESS="127.0.0.1:1")
    assert (code, "no Ray cluster at 127.0.0.1:1" in said) == (4, True)
    code, said = end("bogus")
    assert (code, "No such command" in said) == (2, True)
    with Producer(job_id):
        code, said = end("show", "5", "--job-id", job_id)
        assert (code, "is not published" in said) == (2, True)


def test_what_is_damaged_can_be_looked_at_and_removed(driver, job_id, tmp_path):
    store = f"file://{tmp_path}"
    with Producer(job_id, store=store, retain=3) as producer, Consumer(job_id) as consumer:
        producer.publish(0, columns(0))
        producer.publish(1, columns(1))
        consumer.claim(0)
        consumer.ack(0)  # from now on it lies in the store alone
        lines = ask("peek", 0, "--job-id", job_id).splitlines()
        assert json.loads(lines[1])["text"] == "plain"
        (part,) = [p for p in tmp_path.rglob("*") if p.is_file() and damaged(p, job_id, consumer)]
        part.write_bytes(b"x" + part.read_bytes()[1:])
        assert "checksum" in ask("peek", 0, "--job-id", job_id, code=4)
        assert asked("quarantine", "--job-id", job_id) == {}  # to look at it changes nothing
        with pytest.raises(PayloadDamaged, match="checksum"):
            assert consumer.get(0).batch is None
        found = asked("quarantine", "--job-id", job_id)
        assert len(found) == 1
        assert "is not in quarantine" in ask("quarantine", "--delete", "x", "--yes", "--job-id", job_id, code=2)
        ask("quarantine", "--delete", "all", "--yes", "--job-id", job_id)
        assert asked("quarantine", "--job-id", job_id) == {}
        ask("gc", "--yes")


def damaged(path: Path, job_id: str, consumer: Consumer) -> bool:
    """Whether this is the part of rollout 0."""
    stored = consumer.get(0)._located.payload.stored
    return path.name.startswith(stored) and not path.name.endswith(".json")


def test_a_view_outlives_its_broker(a_run):
    from slime.cross_job.ops.viewer import Viewer

    viewer = Viewer()
    before = viewer.look(a_run.job_id)
    ray.kill(ray.get_actor("slime_cross_job_broker", namespace="slime_shared"), no_restart=False)
    end = time.monotonic() + patient(30)
    while "restarted" not in (after := viewer.look(a_run.job_id))["status"]["events"]:
        assert time.monotonic() < end
        time.sleep(0.1)
    assert [row for row in after["progress"] if row["state"] != "generating"] == before["progress"]
    assert after["seq"] == before["seq"]


def test_the_live_view_is_served_until_it_is_stopped(a_run):
    command = [sys.executable, "-m", "slime.cross_job", "web", "--port", "0", "--job-id", a_run.job_id]
    with subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            said = next(line for line in process.stderr if line.startswith("live view at "))
            url = said.split()[3]
            with urllib.request.urlopen(f"{url}api/look?job={a_run.job_id}", timeout=30) as answer:
                assert json.loads(answer.read())["status"]["acked"] == 1
            process.send_signal(signal.SIGINT)
            assert process.wait(patient(30)) == 130
        finally:
            process.kill()
