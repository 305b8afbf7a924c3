"""The command that ends a namespace: said first, refused while somebody works there, and nothing is left of it."""

import numpy as np
import pytest
import ray
from typer.testing import CliRunner

from slime.cross_job import Consumer, Producer
from slime.cross_job.errors import Fenced, NoBroker, Refused
from slime.cross_job.ops import steer  # noqa: F401  it adds its commands
from slime.cross_job.ops.app import app

MB = 1_000_000


def shutdown(namespace: str, *words: str) -> tuple[str, BaseException | None]:
    """(what it says, the error that it ends with)."""
    address = ray.get_runtime_context().gcs_address
    result = CliRunner().invoke(app, ["shutdown", "--address", address, "--namespace", namespace, *words])
    return result.output, result.exception


def actors(namespace: str) -> list[str]:
    return [a["name"] for a in ray.util.list_named_actors(all_namespaces=True) if a["namespace"] == namespace]


@pytest.mark.ci
def test_a_namespace_ends_and_what_it_held_is_freed(driver, job_id):
    with Producer(job_id, namespace=f"{job_id}-other") as other:
        with Producer(job_id, namespace=job_id) as producer:
            producer.publish(0, {"x": np.zeros((8, MB // 8))})
        payload = producer.connection.call("get", job_id, 0).payload
        (ref,) = producer.connection.open_refs(payload)
        said, error = shutdown(job_id)
        assert "add --yes" in str(error), "nobody is there to be asked"
        assert "1 payloads are freed, 8.0 MB" in said
        assert f"rollouts that are not acked are among them, of {job_id}" in said
        assert "how 1 jobs without a durable store stand is forgotten; what lies in durable stores stays" in said
        assert len(actors(job_id)) == 2
        assert ray.get(ref).num_samples == 8
        said, error = shutdown(job_id, "--yes")
        assert error is None, error
        assert "2 actors ended, 8.0 MB freed" in said
        assert actors(job_id) == []
        del ref
        with pytest.raises(NoBroker):
            raise shutdown(job_id, "--yes")[1]
        assert other.publish(0, {"x": [1]}).version == 1, "another namespace is none of its business"
    assert shutdown(f"{job_id}-other", "--yes")[1] is None


def test_while_clients_are_attached_it_is_refused_and_with_force_they_hear_it(driver, job_id):
    producer = Producer(job_id, namespace=job_id, heartbeat_s=0.3)
    consumer = Consumer(job_id, namespace=job_id, heartbeat_s=0.3)
    _, error = shutdown(job_id, "--yes")
    assert isinstance(error, Refused)
    assert "2 clients are attached" in str(error)
    assert "producer of job" in str(error)
    assert len(actors(job_id)) == 2
    said, error = shutdown(job_id, "--yes", "--force")
    assert error is None, error
    assert "2 clients end with an error" in said
    for client in (producer, consumer):
        with pytest.raises(Fenced, match="its namespace was shut down by its operator"):
            client.check()
        client.finish()
    assert actors(job_id) == [], "who was ended makes no new broker to say that it ends"
