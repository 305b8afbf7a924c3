"""How a document for KubeRay is checked without a cluster: by the CRDs of KubeRay's pinned release, as an API server
reads them that refuses unknown fields.

Pod templates, Services and claims of Kubernetes' own kinds are checked against the copies of them that the CRDs hold,
the few fields around these by schemas written here.
"""

from __future__ import annotations

import copy
import fcntl
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]
from jsonschema import Draft202012Validator, ValidationError, validators  # type: ignore[import-untyped]

KUBERAY, TAG = "https://github.com/ray-project/kuberay", "v1.7.0"
COMMIT = "59d663aeec13760646da3db9c1cf8cfe883e30b7"
CRDS, RULES_FOLDER = "ray-operator/config/crd/bases", "ray-operator/controllers/ray/utils"

Document = dict[str, Any]
Schema = dict[str, Any]


def load(text: str) -> list[Document]:
    """The documents of a YAML file."""
    return list(yaml.load_all(text, _StrictLoader))


def faults(document: Document, schemas: dict[str, Schema]) -> list[str]:
    """What is wrong with a document, as "path: what"."""
    errors = _Checker(schemas[document["kind"]]).iter_errors(document)
    return sorted(f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in errors)


def checkout() -> Path:
    """A sparse checkout of KubeRay at the pinned release, in the user's cache; skips where it cannot be cloned."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slime-cross-job"
    folder = cache / f"kuberay-{TAG}"
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / f"kuberay-{TAG}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            new = cache / f"kuberay-{TAG}.new"
            shutil.rmtree(new, ignore_errors=True)
            options = ["--quiet", "--depth=1", "--filter=blob:none", "--sparse", f"--branch={TAG}"]
            _git("-c", "advice.detachedHead=false", "clone", *options, KUBERAY, str(new))
            _git("-C", str(new), "sparse-checkout", "set", CRDS, RULES_FOLDER)
            new.rename(folder)
    assert _git("-C", str(folder), "rev-parse", "HEAD") == COMMIT, f"{TAG} is another commit: remove {folder}"
    return folder


def read_schemas(kuberay: Path) -> dict[str, Schema]:
    """Kind -> the schema of its documents."""
    specs = {}
    for kind in ("RayCluster", "RayJob"):
        crd = yaml.load((kuberay / CRDS / f"ray.io_{kind.lower()}s.yaml").read_text(), yaml.CSafeLoader)
        assert crd["spec"]["names"]["kind"] == kind
        (version,) = (v for v in crd["spec"]["versions"] if v["name"] == "v1" and v["served"])
        specs[kind] = _strict(version["schema"]["openAPIV3Schema"])["properties"]["spec"]
    head = specs["RayCluster"]["properties"]["headGroupSpec"]["properties"]
    volume = head["template"]["properties"]["spec"]["properties"]["volumes"]["items"]["properties"]
    claim = copy.deepcopy(volume["ephemeral"]["properties"]["volumeClaimTemplate"])
    claim["properties"]["metadata"] = _METADATA
    stateful = _closed(
        "selector template serviceName",
        replicas={"type": "integer", "minimum": 0},
        selector=_closed("matchLabels", matchLabels=_LABELS),
        serviceName=_NAME,
        template=head["template"],
        volumeClaimTemplates={"type": "array", "items": claim, "minItems": 1},
    )
    return {
        "RayCluster": _kind("ray.io/v1", "RayCluster", specs["RayCluster"]),
        "RayJob": _kind("ray.io/v1", "RayJob", specs["RayJob"]),
        "Service": _kind("v1", "Service", head["headService"]["properties"]["spec"]),
        "StatefulSet": _kind("apps/v1", "StatefulSet", stateful),
    }


class _StrictLoader(yaml.SafeLoader):
    """YAML as kubectl reads it: a key that is there twice is an error."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if twice := {key for key in keys if keys.count(key) > 1}:
            raise yaml.constructor.ConstructorError(None, None, f"twice: {sorted(twice)}", node.start_mark)
        return super().construct_mapping(node, deep)


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
            env={**os.environ, "GIT_TERMINAL_PROMPT": "0"},
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"KubeRay cannot be cloned: {error}")
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["no message"]
        pytest.skip(f"KubeRay cannot be cloned: {said[-1]}")
    return done.stdout.strip()


def _closed(required: str = "", **properties: Schema) -> Schema:
    """An object with these fields and no other."""
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


# DNS-1035, at most 47 characters: what KubeRay takes for a RayJob's name, and any other kind
_NAME = {"type": "string", "pattern": r"^[a-z]([-a-z0-9]*[a-z0-9])?$", "maxLength": 47}
_KEY = r"^([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$"
_LABELS = {
    "type": "object",
    "patternProperties": {_KEY: {"type": "string", "pattern": r"^([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?$"}},
    "additionalProperties": False,
}
_METADATA = _closed("name", name=_NAME, labels=_LABELS)  # no namespace: that is kubectl's -n
_RANGES = {"int32": 2**31, "int64": 2**63}


def _kind(version: str, kind: str, spec: Schema) -> Schema:
    fields = {"apiVersion": {"const": version}, "kind": {"const": kind}, "metadata": _METADATA, "spec": spec}
    return _closed(" ".join(fields), **fields)


def _strict(schema: Schema) -> Schema:
    """A schema of a CRD as the API server reads it when it refuses unknown fields."""
    taken = {"type", "enum", "pattern", "required", "minimum", "maximum", "minLength", "maxLength", "minItems"}
    left = {"description", "default", "format", "nullable", "anyOf", "properties", "items", "additionalProperties"}
    unknown = [key for key in schema if key not in taken | left and not key.startswith("x-kubernetes-")]
    assert not unknown, f"this checker does not know {unknown}"
    out = {key: value for key, value in schema.items() if key in taken}
    if schema.get("x-kubernetes-int-or-string"):
        out["type"] = ["integer", "string"]
    elif "type" not in schema:
        assert "anyOf" not in schema
    if schema.get("nullable"):
        out["type"] = [schema["type"], "null"]
    if schema.get("format") in _RANGES:
        bound = _RANGES[schema["format"]]
        out = {"minimum": -bound, "maximum": bound - 1, **out}
    if "x-kubernetes-list-map-keys" in schema:
        out["x-kubernetes-list-map-keys"] = schema["x-kubernetes-list-map-keys"]
    if "items" in schema:
        out["items"] = _strict(schema["items"])
    if schema.get("type") == "object" and not schema.get("x-kubernetes-preserve-unknown-fields"):
        out["properties"] = {name: _strict(inner) for name, inner in schema.get("properties", {}).items()}
        more = schema.get("additionalProperties", False)
        out["additionalProperties"] = _strict(more) if isinstance(more, dict) else more
    return out


def _no_entry_twice(validator: Any, keys: list[str], value: Any, schema: Schema) -> Iterator[ValidationError]:
    entries = [tuple(entry.get(key) for key in keys) for entry in value if isinstance(entry, dict)]
    for twice in sorted({entry for entry in entries if entries.count(entry) > 1}, key=repr):
        yield ValidationError(f"{twice} is there twice")


_Checker = validators.extend(
    Draft202012Validator,
    {"x-kubernetes-list-map-keys": _no_entry_twice},
    type_checker=Draft202012Validator.TYPE_CHECKER.redefine(
        "integer", lambda _, value: isinstance(value, int) and not isinstance(value, bool)
    ),
)
