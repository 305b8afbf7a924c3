"""Silence is not death, on a real cluster: stopped processes are waited for, and go on unless they were replaced."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest

from local_cluster import LocalCluster, command_of
from slime.cross_job.client.connection import Connection
from slime.cross_job.types import BROKER_NAME, VAULT_NAME
from tests.support.actors import pid_of, stopped
from tests.support.patience import patient
from tests.support.ray_jobs import JOBS, PYTHONPATH, wait_for

pytestmark = pytest.mark.usefixtures("driver")

STOPPED_S = 45.0  # longer than any fixed limit that there was
LEASE_S = 3.0


class AtWork:
    """A producer and a consumer in a namespace of their own, both at work."""

    def __init__(self, submit, name, enough, lease_s=30.0):
        self.name, self._enough, self._lease_s, self._submit = name, enough, lease_s, submit
        self.producer, self.consumer = self.start("producer"), self.start("consumer")
        self.pids = [job.said()["pid"] for job in (self.producer, self.consumer)]
        self.goes_on()

    def start(self, role):
        return self._submit("at_work.py", role, self.name, self.name, self._lease_s, self._enough)

    def status(self):
        return Connection(self.name).call("status", self.name, timeout_s=60)[self.name]

    def goes_on(self):
        acked = self.status()["acked"]
        wait_for(lambda: self.status()["acked"] > acked + 3, 60, self.told)

    def told(self):
        return "\n".join([str(self.status()), self.producer.logs[-3000:], self.consumer.logs[-3000:]])

    def end(self):
        self._enough.touch()
        return [job.wait(120) for job in (self.producer, self.consumer)]


def test_a_broker_and_a_vault_that_are_stopped_for_long_are_waited_for(submit, job_id, tmp_path):
    pairs = [AtWork(submit, f"{job_id}-{n}", tmp_path / "enough") for n in range(2)]
    with stopped(pid_of(pairs[0].name, BROKER_NAME), pid_of(pairs[1].name, VAULT_NAME)):
        time.sleep(STOPPED_S)
    for pair in pairs:
        pair.goes_on()
    for pair in pairs:
        assert pair.end() == ["SUCCEEDED"] * 2
        assert [job.all_said(2)[1]["epoch"] for job in (pair.producer, pair.consumer)] == [1, 1]
    told = "".join(job.logs for pair in pairs for job in (pair.producer, pair.consumer))
    words = r"the broker of namespace '{}' has not answered for \d+ s: {}Ray calls it alive \(pid \d+ on node \w+, "
    assert re.search(words.format(re.escape(pairs[0].name), ""), told)
    waits = r"it answers, and waits for the vault of node \w+ to keep this: "
    assert re.search(words.format(re.escape(pairs[1].name), waits), told)


@pytest.mark.parametrize("who", ["producer", "consumer"])
def test_a_client_that_is_stopped_beyond_its_lease_goes_on_and_so_does_its_peer(submit, job_id, tmp_path, who):
    pair = AtWork(submit, job_id, tmp_path / "enough", LEASE_S)

    def client():
        found = pair.status()
        return found["producer"] if who == "producer" else found["consumers"]["train"]

    with stopped(pair.pids[who == "consumer"]):
        wait_for(lambda: client()["state"] == "silent", 60)
        time.sleep(2 * LEASE_S)
        assert (client()["state"], client()["presumed_dead"]) == ("silent", False)
    pair.goes_on()
    assert client()["epoch"] == 2
    assert pair.end() == ["SUCCEEDED"] * 2
    assert getattr(pair, who).all_said(2)[1]["epoch"] == 2


@pytest.mark.core
def test_a_producer_whose_place_was_taken_in_its_silence_is_fenced(submit, job_id, tmp_path):
    pair = AtWork(submit, job_id, tmp_path / "enough", LEASE_S)
    first = pair.producer
    with stopped(pair.pids[0]):
        wait_for(lambda: pair.status()["producer"]["state"] == "silent", 60)
        pair.producer = pair.start("producer")
        assert pair.producer.said()["epoch"] >= 2  # more where a busy machine kept the first one silent before
    assert first.wait(60) == "FAILED"
    assert "Fenced" in first.logs
    pair.goes_on()
    assert pair.end() == ["SUCCEEDED"] * 2


def test_a_forked_process_and_one_that_left_ray_and_came_back_are_told_at_once(submit, job_id):
    job = submit("left.py", job_id, job_id)
    forked, anew = job.all_said(2)
    assert forked["forked"] == 7
    assert "connected anew" in anew["anew"]
    assert max(forked["took_s"], anew["took_s"]) < patient(10)
    job.wait(60)
    assert job.logs.count("heartbeat of producer") <= 1, job.logs


@pytest.mark.ci
def test_a_cluster_whose_gcs_dies_ends_both_jobs_with_one_verdict(tmp_path):
    with LocalCluster(env={"PYTHONPATH": PYTHONPATH}) as cluster:
        env = {**cluster.env, "RAY_ADDRESS": cluster.address}
        jobs, logs = [], [tmp_path / "producer", tmp_path / "consumer"]
        for log in logs:
            command = [sys.executable, str(JOBS / "at_work.py"), log.name, "exp", "gcs", "30", "/nowhere"]
            with log.open("wb") as out:
                jobs.append(subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT))
        wait_for(lambda: all("SAID" in log.read_text() for log in logs), 90)
        (gcs,) = [p for p in cluster.pids() if "gcs_server" in command_of(p)[0]]
        (block,) = [p for p in cluster.pids() if {"start", "--block"} <= set(command_of(p))]
        with stopped(block):  # it looks once a second and ends the raylet, and with that Ray ends the jobs: a race
            os.kill(gcs, signal.SIGKILL)
            killed = time.monotonic()
            codes = [job.wait(patient(60)) for job in jobs]
            took_s = time.monotonic() - killed
        told = [log.read_text() for log in logs]
        assert codes == [4, 4], told
        assert [text.count("\nClusterUnreachable: ") for text in told] == [1, 1], told
        assert took_s < patient(15)
