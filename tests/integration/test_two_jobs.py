"""Two separate Ray jobs, real kills: what was published survives, and each side learns how the other ended."""

import os
import time

import pytest
import ray

from local_cluster import is_alive
from slime.cross_job import Consumer
from slime.cross_job.types import BROKER_NAME
from tests.integration.jobs.speak import columns
from tests.support.patience import patient
from tests.support.ray_jobs import wait_for


@pytest.mark.core
@pytest.mark.parametrize("how", ["value", "actor", "ref"])
def test_what_was_published_survives_sigkill_of_actor_and_driver(driver, submit, job_id, how):
    producer = submit("produce.py", job_id, "--how", how, "--end", "linger")
    pids = producer.said()
    for pid in (pids["actor_pid"], pids["pid"]):
        os.kill(pid, 9)
    assert producer.wait() == "FAILED"  # the witness: Ray saw the driver die
    wait_for(lambda: not is_alive(pids["actor_pid"]), 60)
    with Consumer(job_id, timeout_s=20) as consumer:
        assert [located.rollout_id for located in consumer.catalog()] == [0, 1, 2]
        for rollout_id in range(3):
            rollout = consumer.claim()
            assert rollout.rollout_id == rollout_id
            value = rollout.batch if how == "ref" else rollout.batch.to_pydict()
            assert value == columns(rollout_id)
            assert rollout.weight_version == (None if how == "ref" else rollout_id)
            rollout.ack()


@pytest.mark.core
def test_another_job_that_waits_reads_everything_and_learns_the_end(submit, job_id):
    consumer = submit("consume.py", job_id)
    consumer.said()
    assert submit("produce.py", job_id, "--how", "actor").wait() == "SUCCEEDED"
    assert consumer.wait(30) == "SUCCEEDED", consumer.logs
    assert consumer.all_said(2)[1]["seen"] == [0, 1, 2]


@pytest.mark.ci
@pytest.mark.parametrize(
    ("end", "verdict"),
    [
        ("raise", "the reward model is on fire"),
        ("sigkill", "its Ray job is FAILED ("),
        ("sigkill", "out of memory, these are my last words"),
        ("silent", "its Ray job is SUCCEEDED"),
    ],
)
def test_a_crashed_rollout_job_fails_the_train_job_within_15_s(submit, job_id, end, verdict):
    consumer = submit("consume.py", job_id, "--timeout", 240)
    consumer.said()
    producer = submit("produce.py", job_id, "--end", end)
    assert producer.wait() == ("SUCCEEDED" if end == "silent" else "FAILED")
    crashed = producer.client.get_job_info(producer.id).end_time / 1000
    assert consumer.wait(30) == "FAILED"
    said = consumer.all_said(2)[1]
    assert said["seen"] == [0, 1, 2]
    assert said["ended"] - crashed < patient(15)
    assert "PeerFailed" in consumer.logs
    assert verdict in consumer.logs


@pytest.mark.core
@pytest.mark.parametrize(
    ("end", "verdict"), [("raise", "the loss is not a number"), ("sigkill", "its Ray job is FAILED")]
)
def test_a_crashed_train_job_fails_a_rollout_job_that_waits_for_demand(submit, job_id, end, verdict):
    rollout = submit("demand_driven.py", job_id)
    train = submit("consume.py", job_id, "--demand", 1, "--samples", 8, "--end", end)
    assert train.wait() == "FAILED"
    crashed = train.client.get_job_info(train.id).end_time / 1000
    assert rollout.wait(30) == "FAILED"
    said = rollout.all_said(1)[0]
    assert said["published"] == [0]
    assert said["ended"] - crashed < patient(15)
    assert verdict in rollout.logs


@pytest.mark.core
def test_a_second_rollout_job_under_a_live_job_id_is_refused(submit, job_id):
    first = submit("produce.py", job_id, "--end", "linger")
    first.said()
    second = submit("produce.py", job_id)
    assert second.wait() == "FAILED"
    assert f"job id {job_id} is taken" in second.logs
    assert "choose another --job-id" in second.logs
    assert first.status == "RUNNING"


@pytest.mark.core
def test_a_killed_rollout_job_is_replaced_at_once(submit, job_id):
    first = submit("produce.py", job_id, "--end", "linger")
    os.kill(first.said()["pid"], 9)
    second = submit("produce.py", job_id, "--rollouts", 5)
    assert second.wait() == "SUCCEEDED", second.logs


def test_both_jobs_at_the_same_moment_make_one_broker(driver, submit, job_id, tmp_path):
    jobs = [submit("meet.py", job_id, tmp_path, n) for n in range(2)]
    wait_for(lambda: len(list(tmp_path.glob("ready-*"))) == 2, 60, lambda: jobs[0].logs + jobs[1].logs)
    (tmp_path / "tmp").write_text(str(time.time() + 1))
    (tmp_path / "tmp").rename(tmp_path / "go")
    met = [job.all_said(20, 120) for job in jobs]
    for job in jobs:
        assert job.wait() == "SUCCEEDED", job.logs
    for first, second in zip(*met, strict=True):
        assert first["namespace"] == second["namespace"]
        assert first["broker"] == second["broker"]
        assert abs(first["started"] - second["started"]) < 0.3  # the witness: making a broker takes longer
        ray.kill(ray.get_actor(BROKER_NAME, namespace=first["namespace"]))
    assert len({said["broker"] for said in met[0]}) == 20


@pytest.mark.core
def test_the_object_store_returns_to_where_it_was(driver, submit, job_id):
    before = store_used()
    producer = submit("produce.py", job_id, "--samples", 200, "--end", "linger")
    producer.said()
    with Consumer(job_id) as consumer:
        held = consumer.status()["held_bytes"]
        assert held > 3_000_000
        wait_for(lambda: store_used() > before + 0.9 * held, 30)
        for rollout_id in range(3):
            consumer.claim(rollout_id).ack()
        assert consumer.status()["held_bytes"] == 0
    wait_for(lambda: store_used() <= before + 100_000, 30, lambda: f"{store_used()} > {before}")


def store_used() -> float:
    time.sleep(0.2)
    return ray.cluster_resources()["object_store_memory"] - ray.available_resources().get("object_store_memory", 0.0)
