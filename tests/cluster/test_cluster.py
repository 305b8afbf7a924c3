"""Rollout and training on separate machines: containers of docker/docker-compose.yml, or namespaces without Docker."""

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.machine_faults import NODE_FAULTS
from tests.support import compose, namespaces
from tests.support.node_cluster import ROOT, NodeCluster
from tests.support.patience import patient

FEW = [
    *("rollout machine killed", "rollout machine cut off for 60 s"),
    *("train machine killed", "train machine cut off for 5 s", "train machine paused"),
    *("head machine killed", "redis killed"),
]
MORE = [name for name in NODE_FAULTS if name not in FEW]


@pytest.fixture(scope="module")
def kind(tmp_path_factory) -> Iterator[str]:
    """What the machines are, here; MACHINES chooses. A Docker daemon is there meanwhile, where they need one."""
    reasons = {"compose": compose.why_not(), "namespaces": namespaces.why_not()}
    reasons = {name: reasons[name] for name in [os.environ["MACHINES"]]} if "MACHINES" in os.environ else reasons
    with contextlib.ExitStack() as stack:
        if reasons.get("compose") == "":
            try:
                stack.enter_context(compose.daemon(tmp_path_factory.mktemp("docker") / "log"))
            except (RuntimeError, TimeoutError) as error:
                reasons["compose"] = str(error)
        for name, reason in reasons.items():
            print(f"{name}: {reason or 'here it is'}")
            if not reason:
                yield name
                return
        pytest.skip("; ".join(f"{name}: {reason}" for name, reason in reasons.items()))


# first: it has machines of its own, and two clusters at once are too much for two cores
@pytest.mark.parametrize("faults", [pytest.param(FEW, id="few"), pytest.param(MORE, id="more")])
def test_whatever_happens_to_a_machine_or_its_network_loses_and_repeats_nothing(kind, tmp_path, faults):
    """Each fault of machine_faults.py once, each with its witness; then the auditor of the chaos suite."""
    report, count = tmp_path / "report.json", str(len(faults))
    command = [ROOT / "scripts" / "chaos.sh", "--on", kind, "--minutes", "14", "--least", count, "--most", count]
    command += ["--faults", ",".join(faults)]
    done = subprocess.run(
        [*command, "--json", report], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=patient(1500)
    )
    print(done.stdout, *(f"{r['name']}: {r['witness']}" for r in found(report)["records"]), sep="\n")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert (found(report)["kinds"], found(report)["lost"], found(report)["duplicated"]) == (len(faults), 0, 0)


@pytest.fixture(scope="module")
def machines(kind, tmp_path_factory) -> Iterator[NodeCluster]:
    folder = tmp_path_factory.mktemp("machines")
    for path in (folder, *folder.parents[:2]):
        path.chmod(0o755)
    made = compose.ComposeCluster(folder) if kind == "compose" else namespaces.NamespaceCluster(folder)
    with made as cluster:
        yield cluster


@pytest.mark.ci
def test_the_jobs_of_the_demo_train_on_separate_machines(machines, kind):
    out, home = machines.folder / "demo", {"compose": "/opt/slime-cross-job"}.get(kind, str(ROOT))
    words = [machines.python, f"{home}/scripts/demo.py", "--address", "auto", "--rollouts", "6", "--out", str(out)]
    print(machines.run("control", *words, timeout_s=240))
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["published"], summary["acked"], summary["lost"], summary["duplicated"]) == (6, 6, 0, 0)
    assert summary["nodes"] == {role: [machines.address(role)] for role in ("rollout", "train")}


def test_the_broker_is_on_the_head(machines):
    what = """
import ray
from ray.util import state
from slime.cross_job.client.connection import Connection
ray.init("auto", logging_level="ERROR")
Connection("placed")
filters = [("ray_namespace", "=", "placed"), ("class_name", "=", "Broker")]
address = ray.get_runtime_context().gcs_address
(broker,) = state.list_actors(address=address, filters=filters, timeout=30)
print([node["NodeManagerAddress"] for node in ray.nodes() if node["NodeID"] == broker.node_id])
"""
    assert machines.run("control", machines.python, "-c", what).split()[-1] == f"['{machines.address('head')}']"


@pytest.mark.parametrize("env", [{}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "f" * 64}], ids=["none", "wrong"])
def test_a_machine_without_the_token_is_refused_and_told_so(machines, env):
    words = ["ray", "start", f"--address={machines.address('head')}:6379", "--block", "--num-cpus=1"]
    refused = machines.stranger(words, 90, **env)
    assert refused.returncode != 0
    said = refused.stdout + refused.stderr
    assert "token" in said.lower(), said[-2000:]
    assert "Ray runtime started" not in said, said[-2000:]


def found(report: Path) -> dict:
    return json.loads(report.read_text()) if report.exists() else {"records": []}
