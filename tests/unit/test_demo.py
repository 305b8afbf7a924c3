"""The demo without a cluster: whose cluster it goes to, and what its audit calls lost."""

import json
import socket
import time

import pytest

import demo
from slime.cross_job.errors import ClusterUnreachable


def test_a_cluster_that_says_nothing_is_given_up_soon(monkeypatch):
    """Ray, and its client, would wait without end."""
    assert demo._LISTENS_S + demo._ANSWERS_S < 15
    monkeypatch.setattr(demo, "_ANSWERS_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        began = time.monotonic()
        with pytest.raises(ClusterUnreachable, match=f"no Ray cluster answers at {address}: .* says nothing"):
            demo.connect(address, theirs=True)
    assert time.monotonic() - began < 5


def test_a_job_api_that_says_nothing_is_given_up_soon(monkeypatch):
    monkeypatch.setattr(demo, "_ANSWERS_S", 0.2)
    monkeypatch.setattr(demo, "probe", lambda *_: None)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        where = f"127.0.0.1:{silent.getsockname()[1]}"
        context = type("Context", (), {"dashboard_url": where})
        monkeypatch.setattr(demo, "ensure_ray", lambda *_, **__: context)
        with pytest.raises(ClusterUnreachable, match=f"no Ray job API answers at http://{where}"):
            demo.connect("10.0.0.1:6379", theirs=True)


def test_what_the_broker_holds_is_not_lost(tmp_path):
    published = [{"rollout_id": r, "publish_ms": 1.0, "node": "a"} for r in range(5)]
    trained = [{"rollout_id": r, "reward": 0.5, "claim_ms": 1.0, "staleness": 0, "node": "a"} for r in range(2)]
    for name, lines in (("rollout", published), ("train", trained)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = demo.audit(tmp_path, {"claimed": 3}, held={2, 3})
    assert (found["published"], found["acked"], found["not_acked"], found["lost"]) == (5, 2, 2, 1)
