"""The broker restarts on a real cluster while its only vault is alive and silent: it waits for it, and says so."""

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import ray
from typer.testing import CliRunner

from slime.cross_job import Consumer, Producer
from slime.cross_job.errors import BrokerLost, RolloutNotFound
from slime.cross_job.ops import cli, export, steer  # noqa: F401  they add their commands
from slime.cross_job.ops.app import app
from slime.cross_job.ops.viewer import starting
from slime.cross_job.types import BROKER_NAME, VAULT_NAME
from tests.integration.jobs.speak import columns
from tests.support.actors import pid_of, stopped
from tests.support.patience import patient, wait_for, within

pytestmark = pytest.mark.usefixtures("driver")

SILENT_S = 35.0  # longer than a vault was given once, before it was counted as lost


@pytest.fixture
def silent(job_id) -> Iterator[tuple[str, int]]:
    """(the only vault, its process): rollout 0 is acked, 1 to 3 are published. Then the vault is stopped, the broker
    killed; the vault goes on when the test is over, at the latest."""
    with Producer(job_id, namespace=job_id, retain=5) as producer, Consumer(job_id, namespace=job_id) as consumer:
        for rollout_id in range(4):
            producer.publish(rollout_id, columns(rollout_id))
        consumer.claim(0).ack()
        name = f"{VAULT_NAME}_{producer.info.node_id}"
        vault, broker = pid_of(job_id, name), pid_of(job_id, BROKER_NAME)
        producer.stop()
        consumer.stop()
    with stopped(vault):
        os.kill(broker, signal.SIGKILL)
        yield name, vault


def command(job_id: str, *words: str) -> Any:
    address = {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}  # this machine may have other clusters
    return CliRunner().invoke(app, [*words, "--namespace", job_id], env=address)


def waits(job_id: str) -> Any:
    """What the broker waits for; None: it has begun, or is not there yet."""
    try:
        return starting(job_id)
    except BrokerLost:
        return None


def test_a_broker_waits_for_a_vault_that_is_alive_and_forgets_nothing(silent, job_id):
    name, vault = silent
    wait_for(lambda: (found := waits(job_id)) and found["stuck"], 60)
    told = command(job_id, "status")
    assert isinstance(told.exception, BrokerLost)
    for words in (
        f"{name} on node {name.rpartition('_')[2]}",
        "Ray calls it alive",
        f"slime-cross-job give-up {name}",
    ):
        assert words in str(told.exception)
    wait_for(lambda: (found := waits(job_id)) and found["since_s"] > SILENT_S, SILENT_S + patient(30))
    (waited_for,) = waits(job_id)["waits_for"]
    assert waited_for["vault"] == name
    assert waited_for["silent_s"] > SILENT_S - 5, "it was the vault that was waited for"
    os.kill(vault, signal.SIGCONT)
    wait_for(lambda: waits(job_id) is None, 60)
    with Producer(job_id, namespace=job_id) as producer, Consumer(job_id, namespace=job_id) as consumer:
        status = consumer.status()
        assert {k: status[k] for k in ("published", "acked", "lost", "losses")} == {
            "published": 4,
            "acked": 1,
            "lost": [],
            "losses": 0,
        }
        with pytest.raises(RolloutNotFound, match="was acked"):
            consumer.claim(0)
        assert consumer.claim(timeout_s=30).rollout_id == 1
        assert consumer.claim(2).batch.to_pydict() == columns(2)
        assert producer.epoch == 2, "its history goes on"
        producer.publish(4, columns(4))
        assert consumer.status()["published"] == 5


@pytest.mark.ci
def test_a_vault_can_be_given_up_by_name_and_is_taken_back_when_it_answers(silent, job_id):
    name, vault = silent
    wait_for(lambda: (found := waits(job_id)) and found["stuck"], 60)
    assert "does not wait for nobody" in str(command(job_id, "give-up", "nobody", "--yes").exception)
    assert "add --yes" in str(command(job_id, "give-up", name).exception), "nobody is there to be asked"
    assert waits(job_id) is not None
    given_up = command(job_id, "give-up", name, "--yes")
    assert given_up.exit_code == 0, given_up.output
    with within(10):
        wait_for(lambda: waits(job_id) is None, 30)
    listed = command(job_id, "jobs", "--json")
    assert (listed.exit_code, listed.stdout.strip()) == (0, "{}"), "nobody else knows the job"
    os.kill(vault, signal.SIGCONT)
    wait_for(lambda: job_id in command(job_id, "jobs", "--json").stdout, 60)
    with Consumer(job_id, namespace=job_id) as consumer:
        assert (consumer.status()["published"], consumer.status()["acked"]) == (4, 1)
        assert consumer.claim(timeout_s=30).batch.to_pydict() == columns(1)
