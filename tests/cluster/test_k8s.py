"""The manifests for KubeRay, without a cluster: field by field against the schemas of KubeRay's CRDs at the pinned
release (crd_schema.py), against rules that KubeRay has besides, and against each other.

Not checked: what only an API server, or KubeRay's operator, can tell.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from slime.cross_job_arguments import add_arguments
from tests.cluster import crd_schema
from tests.cluster.crd_schema import RULES_FOLDER, TAG, Document, Schema, faults, load

ROOT = Path(__file__).resolve().parents[2]
K8S = ROOT / "docker" / "k8s"
FILES = sorted(path.name for path in K8S.glob("*.yaml") if path.name != "kustomization.yaml")
JOBS = {"rollout": "cross_job_rollout.py", "train": "train.py"}
CLUSTER, TRAIN, REDIS = "RayCluster/slime", "RayJob/exp1-train", "StatefulSet/slime-redis"
HEAD, WORKER = "spec.headGroupSpec.template.spec.containers.0", "spec.workerGroupSpecs.0"


def documents() -> dict[str, Document]:
    """Every document, as kind/name."""
    found: dict[str, Document] = {}
    for file in FILES:
        for document in load((K8S / file).read_text()):
            name = f"{document['kind']}/{document['metadata']['name']}"
            assert name not in found, f"{name} is there twice"
            found[name] = document
    return found


def changed(name: str, path: str, value: Any) -> Document:
    """A document with another value at a path like spec.groups.0.name; None: without it."""
    document = inner = documents()[name]
    *above, key = path.split(".")
    for step in above:
        inner = inner[int(step) if isinstance(inner, list) else step]
    if value is None:
        del inner[key]
    else:
        inner[key] = value
    return document


def groups(spec: Document) -> list[Document]:
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


def containers(document: Document) -> Iterator[tuple[Document, Document]]:
    """(pod specification, container) of every container."""
    spec = document["spec"]
    for group in groups(spec) if document["kind"] == "RayCluster" else [spec]:
        pod = group.get("template", {}).get("spec", {})
        for container in pod.get("containers", []):
            yield pod, container


@pytest.fixture(scope="session")
def kuberay() -> Path:
    return crd_schema.checkout()


@pytest.fixture(scope="session")
def schemas(kuberay: Path) -> dict[str, Schema]:
    return crd_schema.read_schemas(kuberay)


# --- every document -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(documents()))
def test_every_field_is_one_of_its_kind(name: str, schemas: dict[str, Schema]) -> None:
    assert faults(documents()[name], schemas) == []


def test_the_documents_are_these() -> None:
    assert sorted(documents()) == [CLUSTER, "RayJob/exp1-rollout", TRAIN, "Service/slime-redis", REDIS]
    (kustomization,) = load((K8S / "kustomization.yaml").read_text())
    assert sorted(kustomization.pop("resources")) == FILES
    assert kustomization == {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization"}


@pytest.mark.parametrize(
    ("name", "path", "value", "said"),
    [
        (CLUSTER, "spec.gcsFaultTolerance", {}, "spec: .*'gcsFaultTolerance' was unexpected"),
        (CLUSTER, f"{HEAD}.volumeMount", [], "containers.0: .*'volumeMount' was unexpected"),
        (CLUSTER, "spec.authOptions.mode", "tokens", "authOptions.mode: 'tokens' is not one of"),
        (CLUSTER, f"{WORKER}.replicas", "1", "workerGroupSpecs.0.replicas: '1' is not of type 'integer'"),
        (CLUSTER, f"{WORKER}.replicas", True, "workerGroupSpecs.0.replicas: True is not of type 'integer'"),
        (CLUSTER, f"{WORKER}.replicas", 2**31, "workerGroupSpecs.0.replicas: .* greater than"),
        (CLUSTER, f"{WORKER}.groupName", None, "workerGroupSpecs.0: 'groupName' is a required property"),
        (CLUSTER, f"{WORKER}.rayStartParams.num-cpus", 0, "num-cpus: 0 is not of type 'string'"),
        (CLUSTER, f"{HEAD}.resources.limits.memory", "16 Gi", "limits.memory: '16 Gi' does not match"),
        (CLUSTER, f"{HEAD}.env.0.value", 86400, "env.0.value: 86400 is not of type 'string'"),
        (CLUSTER, f"{HEAD}.ports", [{"containerPort": 1}] * 2, "ports: .* is there twice"),
        (CLUSTER, "metadata.namespace", "ml", "metadata: .*'namespace' was unexpected"),
        (TRAIN, "spec", None, "'spec' is a required property"),
        (TRAIN, "spec.clusterselector", {}, "spec: .*'clusterselector' was unexpected"),
        (TRAIN, "spec.entrypointResources", {"train": 1}, "entrypointResources: .* of type 'string'"),
        (TRAIN, "spec.preRunningDeadlineSeconds", 0, "preRunningDeadlineSeconds: 0 is less than"),
        (TRAIN, "metadata.name", "Exp1", "metadata.name: 'Exp1' does not match"),
        ("Service/slime-redis", "spec.ports.0.port", "6379", "spec.ports.0.port: '6379' is not of type"),
        (REDIS, "spec.replica", 1, "spec: .*'replica' was unexpected"),
        (REDIS, "spec.template.spec.container", [], "'container' was unexpected"),
        (REDIS, "spec.volumeClaimTemplates.0.spec.accessModes", "ReadWriteOnce", "accessModes: "),
    ],
)
def test_the_checker_refuses(name: str, path: str, value: Any, said: str, schemas: dict[str, Schema]) -> None:
    (fault,) = faults(changed(name, path, value), schemas)
    assert re.search(said, fault), fault


def test_a_key_that_is_there_twice_is_refused() -> None:
    with pytest.raises(yaml.constructor.ConstructorError, match="twice"):
        load("spec:\n  replicas: 1\n  replicas: 2\n")


# --- what KubeRay checks besides ------------------------------------------------------------------------------------


def _selected(spec: Document) -> bool:
    return bool(spec.get("clusterSelector"))


def _head_env(spec: Document) -> set[str]:
    return {entry["name"] for entry in groups(spec)[0]["template"]["spec"]["containers"][0].get("env", [])}


def _version(spec: Document) -> tuple[int, ...]:
    return tuple(int(part) for part in spec.get("rayVersion", "0").split("."))


OF_A_JOB: dict[str, Callable[[Document], bool]] = {  # the words of KubeRay's validation.go -> whether it says them
    "BackoffLimit is incompatible with ClusterSelector mode": lambda s: _selected(s) and s.get("backoffLimit", 0) > 0,
    "ClusterSelector is not supported in SidecarMode": lambda s: _selected(s) and s["submissionMode"] == "SidecarMode",
    "ClusterSelector mode doesn't support the suspend operation": lambda s: _selected(s) and s.get("suspend", False),
    "cluster name in ClusterSelector should not be empty": lambda s: not s["clusterSelector"].get("ray.io/cluster"),
    "one of RayClusterSpec or ClusterSelector must be set": lambda s: not _selected(s) and "rayClusterSpec" not in s,
    "a RayJob with shutdownAfterJobFinishes set to false cannot have TTLSecondsAfterFinished": lambda s: (
        s.get("ttlSecondsAfterFinished", 0) > 0 and not s.get("shutdownAfterJobFinishes", False)
    ),
}
OF_A_CLUSTER: dict[str, Callable[[Document], bool]] = {
    "authOptions.mode is 'token' but RayVersion was not specified": lambda s: "rayVersion" not in s,
    "authOptions.mode is 'token' but minimum Ray version is 2.52.0": lambda s: (0,) < _version(s) < (2, 52),
    "resource fields should not be set in both rayStartParams and Resources": lambda s: any(
        group.get("resources") and {"num-cpus", "num-gpus", "memory", "resources"} & {*group["rayStartParams"]}
        for group in groups(s)
    ),
    "rayStartParams['labels'] is not supported": lambda s: any("labels" in g["rayStartParams"] for g in groups(s)),
    "has minReplicas %d greater than maxReplicas": lambda s: any(
        group["minReplicas"] > group["maxReplicas"] for group in s["workerGroupSpecs"]
    ),
    "cannot set `redis-password` in rayStartParams": lambda s: "redis-password" in groups(s)[0]["rayStartParams"],
    "cannot set `REDIS_PASSWORD` env var in head Pod": lambda s: "REDIS_PASSWORD" in _head_env(s),
    "cannot set `RAY_REDIS_ADDRESS` env var in head Pod": lambda s: "RAY_REDIS_ADDRESS" in _head_env(s),
}


def refused(document: Document) -> list[str]:
    rules = OF_A_JOB if document["kind"] == "RayJob" else OF_A_CLUSTER
    return [words for words, broken in rules.items() if broken(document["spec"])]


@pytest.mark.parametrize("name", [CLUSTER, "RayJob/exp1-rollout", TRAIN])
def test_kuberay_takes_it(name: str) -> None:
    assert refused(documents()[name]) == []


@pytest.mark.parametrize(
    ("name", "path", "value"),
    [
        (TRAIN, "spec.backoffLimit", 3),
        (TRAIN, "spec.submissionMode", "SidecarMode"),
        (TRAIN, "spec.suspend", True),
        (TRAIN, "spec.clusterSelector", {"cluster": "slime"}),
        (TRAIN, "spec.ttlSecondsAfterFinished", 60),
        (CLUSTER, "spec.rayVersion", "2.51.1"),
        (CLUSTER, "spec.headGroupSpec.resources", {"CPU": "0"}),
        (CLUSTER, "spec.workerGroupSpecs.1.minReplicas", 2),
        (CLUSTER, "spec.headGroupSpec.rayStartParams.redis-password", "x"),
        (CLUSTER, f"{HEAD}.env", [{"name": "REDIS_PASSWORD", "value": "x"}]),
    ],
)
def test_kuberay_would_refuse(name: str, path: str, value: Any) -> None:
    assert len(refused(changed(name, path, value))) == 1


def test_the_rules_are_still_kuberays(kuberay: Path) -> None:
    source = (kuberay / RULES_FOLDER / "validation.go").read_text()
    missing = [words for words in [*OF_A_JOB, *OF_A_CLUSTER] if words not in source]
    assert not missing, "KubeRay's rules have changed: should the manifests still be so? (backoffLimit: see README.md)"


# --- how they go together -------------------------------------------------------------------------------------------


def test_the_jobs_are_on_the_cluster_and_their_drivers_on_their_nodes() -> None:
    found = documents()
    head, *workers = groups(found[CLUSTER]["spec"])
    assert head["rayStartParams"]["num-cpus"] == "0"
    for role, group in zip(JOBS, workers, strict=True):
        assert group["groupName"] == role
        (word,) = shlex.split(group["rayStartParams"]["resources"])  # as the shell that runs `ray start` reads it
        assert json.loads(word) == {role: 1}
        job = found[f"RayJob/exp1-{role}"]
        assert job["spec"]["clusterSelector"] == {"ray.io/cluster": "slime"}
        assert json.loads(job["spec"]["entrypointResources"]) == {role: 0.01}
        assert not job["spec"].get("shutdownAfterJobFinishes", False)
        assert job["metadata"]["labels"] == {"slime-cross-job/id": "exp1"}


def test_redis_is_found_and_asks_for_the_password_that_the_head_has() -> None:
    found = documents()
    service, redis = found["Service/slime-redis"]["spec"], found[REDIS]["spec"]
    options = found[CLUSTER]["spec"]["gcsFaultToleranceOptions"]
    (port,), ((_, container),) = service["ports"], containers(found[REDIS])
    assert options["redisAddress"] == f"slime-redis:{port['port']}"
    assert service["selector"] == redis["selector"]["matchLabels"] == redis["template"]["metadata"]["labels"]
    assert redis["serviceName"] == "slime-redis"
    assert {"name": port["targetPort"], "containerPort": 6379} in container["ports"]
    (password,) = container["env"]
    assert password["valueFrom"] == options["redisPassword"]["valueFrom"]
    assert container["command"] == ["sh", "-c"]
    (script,) = container["args"]
    first, *config = script.splitlines()
    assert password["name"] not in first  # what `ps` shows
    assert config == [f"user default on ~* &* +@all -@admin >${password['name']}", "END"]
    (claim,) = redis["volumeClaimTemplates"]
    assert container["volumeMounts"] == [{"name": claim["metadata"]["name"], "mountPath": "/data"}]
    assert password["valueFrom"]["secretKeyRef"]["name"] != "slime", "KubeRay's own Secret of the token"


def test_no_secret_is_in_the_files() -> None:
    for document in documents().values():
        for _, container in containers(document):
            for entry in container.get("env", []):
                if re.search("PASS|TOKEN|SECRET|AUTH|KEY", entry["name"]):
                    assert [*entry] == ["name", "valueFrom"], entry["name"]


@pytest.mark.parametrize("name", [CLUSTER, REDIS])
def test_pods_are_bounded_and_have_no_more_rights_than_they_need(name: str) -> None:
    document = documents()[name]
    for pod, container in containers(document):
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        claims = {claim["metadata"]["name"] for claim in document["spec"].get("volumeClaimTemplates", [])}
        assert mounted == {volume["name"] for volume in pod.get("volumes", [])} | claims
        requests, limits = container["resources"]["requests"], container["resources"]["limits"]
        assert {*requests} == {*limits} >= {"cpu", "memory"}
        for resource in {*limits} - {"cpu"}:  # Kubernetes demands it for GPUs; memory is not to be taken back
            assert requests[resource] == limits[resource]
        rights = {**pod.get("securityContext", {}), **container["securityContext"]}
        assert rights["allowPrivilegeEscalation"] is False
        assert rights["capabilities"] == {"drop": ["ALL"]}
        assert rights["seccompProfile"] == {"type": "RuntimeDefault"}
        assert "nvidia.com/gpu" in limits or (rights["runAsNonRoot"] and rights["runAsUser"] > 0)
        assert pod["automountServiceAccountToken"] is False


def test_ray_pods_have_shared_memory_and_workers_time_to_stop() -> None:
    document = documents()[CLUSTER]
    for group, (pod, container) in zip(groups(document["spec"]), containers(document), strict=True):
        assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"]
        (shm,) = (volume["emptyDir"] for volume in pod["volumes"] if volume["name"] == "shm")
        assert shm["medium"] == "Memory"
        size = int(shm["sizeLimit"].removesuffix("Gi")) * 2**30
        assert int(group["rayStartParams"]["object-store-memory"]) * 2 == size
        assert size <= int(container["resources"]["limits"]["memory"].removesuffix("Gi")) * 2**30
        env = {entry["name"]: entry["value"] for entry in container["env"]}
        assert ("groupName" in group) == ("RAY_JOB_STOP_WAIT_TIME_S" in env)
        assert all(int(value) > 0 for name, value in env.items() if name.endswith("_S"))
        assert container["image"] == "slime-cross-job:v0.3.1"


def entrypoint(role: str, more: str = "") -> tuple[list[str], argparse.Namespace, list[str]]:
    """(what is run, the cross-job flags, slime's arguments) of a job; an unknown cross-job flag is an error."""
    words = shlex.split(documents()[f"RayJob/exp1-{role}"]["spec"]["entrypoint"] + more)
    parser = add_arguments(argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False))
    known, rest = parser.parse_known_args(words[3:])
    assert not [word for word in rest if word.startswith(("--cross-job", "--job-id", "--enable-cross-job"))]
    return words[:3], known, rest


@pytest.mark.parametrize("role", JOBS)
def test_the_flags_exist(role: str) -> None:
    command, known, _ = entrypoint(role)
    assert command == ["python3", "-u", f"/opt/slime/{JOBS[role]}"]
    assert (ROOT / "slime_overlay" / JOBS[role]).is_file() == (role == "rollout")  # train.py is slime's own
    assert (known.enable_cross_job_communication, known.job_id, known.cross_job_role) == (True, "exp1", role)
    with pytest.raises(AssertionError, match="maximum-ahead"):
        entrypoint(role, " --cross-job-maximum-ahead 1")


def test_both_jobs_have_the_same_arguments_and_environment() -> None:
    (_, rollout, of_rollout), (_, train, of_train) = (entrypoint(role) for role in JOBS)
    assert {**vars(rollout), "cross_job_role": "train"} == vars(train)
    assert of_rollout == of_train
    given = dict(itertools.pairwise(of_train))
    assert given["--load"] == given["--save"], "or a job that is submitted again does not find its checkpoints"
    assert "--save-interval" in given
    (one,), (other,) = (load(documents()[f"RayJob/exp1-{role}"]["spec"]["runtimeEnvYAML"]) for role in JOBS)
    assert one == other
    assert all(isinstance(value, str) for value in one["env_vars"].values())
    assert "/opt/slime" in one["env_vars"]["PYTHONPATH"].split(":")
    assert {"NCCL_CUMEM_ENABLE", "NCCL_NVLS_ENABLE"} <= {*one["env_vars"]}, "or the jobs' defaults may differ"


def test_the_jobs_fit_on_the_nodes() -> None:
    given = dict(itertools.pairwise(entrypoint("train")[2]))
    actors = int(given["--actor-num-nodes"]) * int(given["--actor-num-gpus-per-node"])
    wanted = {"rollout": int(given["--rollout-num-gpus"]), "train": actors}
    for group in documents()[CLUSTER]["spec"]["workerGroupSpecs"]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        assert wanted[group["groupName"]] == group["replicas"] * int(limits["nvidia.com/gpu"])
        assert int(limits["cpu"]) >= int(limits["nvidia.com/gpu"])  # slime's bundles have a CPU each


def test_the_readme_names_the_release_and_every_file() -> None:
    text = (K8S / "README.md").read_text()
    assert f"--version {TAG.removeprefix('v')}" in text
    assert not [path.name for path in K8S.iterdir() if path.is_file() and f"`{path.name}`" not in text + "`README.md`"]
