"""slime's two jobs on a machine each, with addresses and GPUs of their own, launched as users launch them."""

import contextlib
import json
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slime import single_job
from tests.slime.slime_jobs import FIGURES, ROLLOUTS, SCRIPTS, SILENCE_S, Run, at_pins
from tests.support.namespaces import NamespaceCluster, why_not
from tests.support.node_cluster import NodeCluster, output
from tests.support.patience import wait_for

GPUS = {"rollout": 1, "train": 2}  # as many as the job of that name asks for
ACTORS = {  # that slime and cross-job start in it
    "rollout": {"InfoActor": 1, "RolloutManager": 1, "SGLangEngine": 1, "Lock": 1},
    "train": {"InfoActor": 2, "Gateway": 1, "MegatronTrainRayActor": 2},
}


@contextlib.contextmanager
def machines(folder: Path) -> Iterator[NodeCluster]:
    """Only those of the two jobs have CPUs: slime's manager, which needs no GPU, would prefer one without GPUs."""
    only = {role: {"CPUS": "8", "GPUS": str(count)} for role, count in GPUS.items()}
    patience = {"RAY_health_check_failure_threshold": "30"}  # all machines are slow while one imports torch
    with NamespaceCluster(folder, only=only, CPUS="0", GPUS="0", REDIS_ADDRESS="", **patience) as cluster:
        for role in GPUS:  # slime gives its router the address by which this one would be reached
            cluster.run(role, "ip", "route", "add", "8.8.8.8", "dev", "eth0")
        yield cluster


@at_pins(also=("v0.3.1", "main"))
def test_two_jobs_on_two_machines_train_as_one_job_on_one(pin, single, checkout, tmp_path, monkeypatch):
    """Engines and training ranks are apart, and yet every figure of every step is that of slime's single job."""
    if reason := why_not(redis=False):
        pytest.skip(reason)
    expected = single(pin, "train.py")
    with machines(tmp_path) as cluster:  # whose network this process is in, meanwhile
        monkeypatch.setenv("RAY_AUTH_MODE", "token")
        monkeypatch.setenv("RAY_AUTH_TOKEN", cluster.token)
        addresses = {role: cluster.address(role) for role in GPUS}
        run = Run(cluster.api, pin, checkout(pin), tmp_path / "run", probe=True)
        launch_both(run)
        stands = {role: how_it_stands(run, role) for role in GPUS}
        where = {role: actors(cluster, stands[role]["submission_id"]) for role in GPUS}

    for role, address in addresses.items():
        print(f"{role} job: {stands[role]['state']}, driver at {stands[role]['node']}")
        print(f"    GPUs at {places_of_gpus(run.told(role))}, actors {where[role]}")
        assert (stands[role]["state"], stands[role]["node"]) == ("SUCCEEDED", address)
        assert places_of_gpus(run.told(role)) == [address] * GPUS[role]
        assert where[role] == Counter({(actor, address): count for actor, count in ACTORS[role].items()})
    assert f"Router launched at {addresses['rollout']}:" in run.told("rollout")
    probes = single_job.read_log(run.folders.log, "probe")  # the training ranks have asked the engine itself
    assert [probe["version"] for probe in probes] == list(range(1, ROLLOUTS + 1))
    for probe in probes:
        (engine,) = probe["servers"]
        assert engine["url"].startswith(f"http://{addresses['rollout']}:")
        assert engine["checksum"] == probe["trainer_checksum"]
    assert run.steps(*FIGURES) == expected


def launch_both(run: Run) -> None:
    """Both jobs to their ends. The engine would fit into either machine: the train job takes its GPUs before it."""
    jobs: dict[str, subprocess.Popen[str]] = {}

    def placed() -> bool:
        assert jobs["train"].poll() is None, run.told("train")[-5000:]
        return len(places_of_gpus(run.told("train"))) == GPUS["train"]

    try:
        jobs["train"] = run.launch("train")
        wait_for(placed, SILENCE_S, lambda: run.told("train")[-5000:], lambda: len(run.told("train")))
        jobs["rollout"] = run.launch("rollout")
        codes = run.codes(jobs)
    finally:
        for job in jobs.values():
            job.kill()
    assert codes == {"rollout": 0, "train": 0}, "\n".join(run.told(role)[-5000:] for role in jobs)


def places_of_gpus(log: str) -> list[str]:
    """Address of each GPU of a job's placement group, as slime logs it."""
    return re.findall(r"bundle +\d+, actual_bundle_index: +\d+, node: ([\d.]+), gpu: \d+", log)


def how_it_stands(run: Run, role: str) -> dict[str, str]:
    command = [SCRIPTS / f"launch_{role}.sh", "--job-id", run.name, "--address", run.api, "--status", "--json"]
    return json.loads(output([str(word) for word in command]))


def actors(cluster: NodeCluster, submission: str) -> Counter[tuple[str, str]]:
    """(class, address of its machine) of all actors that a job has had and that were to end with it, as Ray knows."""

    def listed(what: str, *more: str) -> list[dict[str, str]]:
        return json.loads(cluster.run("control", "ray", "list", what, "--format=json", "--limit=1000", *more))

    address = {node["node_id"]: node["node_ip"] for node in listed("nodes")}
    (job,) = (job["job_id"] for job in listed("jobs") if job["submission_id"] == submission)
    own = [actor for actor in listed("actors", "--detail", f"--filter=job_id={job}") if not actor["is_detached"]]
    return Counter((actor["class_name"], address[actor["node_id"]]) for actor in own)
