"""Asking Ray about a job, in an environment that names another cluster."""

import os
from types import SimpleNamespace

import pytest
import ray

from slime.cross_job.broker import liveness


@pytest.fixture
def asked(monkeypatch):
    """Where the state API was sent: it follows this variable first, whatever its argument."""
    seen = []

    def list_jobs(address, **_):
        seen.append((address, os.environ["RAY_API_SERVER_ADDRESS"]))
        return []

    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address="ours:1"))
    monkeypatch.setattr(liveness.state, "list_jobs", list_jobs)
    return seen


@pytest.mark.parametrize("theirs", [None, "http://theirs:8265"])
def test_ray_is_asked_of_the_cluster_of_this_process(asked, monkeypatch, theirs):
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    if theirs:
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", theirs)
    assert liveness.job_words("01000000") is None
    with liveness.this_cluster():  # another thread asks meanwhile
        liveness.job_words("01000000")
        assert os.environ["RAY_API_SERVER_ADDRESS"] == "ours:1"
    assert asked == [("ours:1", "ours:1")] * 2
    assert os.environ.get("RAY_API_SERVER_ADDRESS") == theirs
