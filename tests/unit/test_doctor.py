"""What `doctor` concludes from facts, and how it keeps its time and its secrets: no cluster, no waiting."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from slime.cross_job.errors import BadInput, NoBroker, StoreRefused
from slime.cross_job.ledger.state import Event, Progress
from slime.cross_job.ops.doctor import CHECKS, SEVERITIES, Finding, complete, diagnose, jobs, nodes, stores, versions
from slime.cross_job.ops.doctor.__main__ import within
from slime.cross_job.ops.doctor.nodes import Node
from slime.cross_job.storage.memory import MemoryStore
from slime.cross_job.types import PROTOCOL
from tests.support.patience import patient

ROOT = Path(__file__).parents[2]
GB = 10**9


def only(found: Finding | list[Finding]) -> Finding:
    (one,) = [found] if isinstance(found, Finding) else found
    assert one.check in CHECKS
    assert one.severity in SEVERITIES
    if one.severity in ("error", "warning") and not one.what.startswith("not looked at"):
        assert all([one.what, one.do]), one
    return one


# ------------------------------------------------------------------ jobs, broker and vaults


def test_a_job_is_told_in_the_words_of_its_status_with_who_its_clients_are():
    client = {"state": "live", "activity": "at work", "activity_s": 3.0, "silent_s": 0.4, "presumed_dead": False}
    client |= {"dead_after_s": 30.0, "ray_job_id": "01000000", "submission_id": "raysubmit_1", "pid": 77, "host": "g7"}
    standing = [
        {"level": "error", "text": "The train job is dead. Start it again."},
        {"level": "ok", "text": "Balanced."},
    ]
    gone = client | {"presumed_dead": True, "submission_id": ""}
    status = {"standing": standing, "producer": client, "consumers": {"train": gone, "archive": None}}
    found = jobs.look_at_job("exp", status)
    assert [(one.check, one.severity, one.where) for one in found] == [
        ("jobs", level, "exp") for level in ("error", "ok", "ok", "ok")
    ]
    assert [one.what for one in found[:2]] == [one["text"] for one in standing]
    assert found[2].what == (
        "rollout job (Ray job raysubmit_1, pid 77 on g7) is live, silent for 0.4 of 30 s, at 'at work' for 3.0 s"
    )
    assert "group train (Ray job 01000000, pid 77 on g7) is presumed dead" in found[3].what


def test_a_broker_that_was_restarted():
    def look(*events: Event) -> dict:
        return {"exp": {"events": [*enumerate(events)], "status": {"events": {"restarted": 3} if events else {}}}}

    assert jobs.restarts(look(), 1e9) == []
    assert jobs.restarts({}, 1e9) == []
    found = only(jobs.restarts(look(Event(900.0, "restarted", ""), Event(950.0, "lost", "")), 1000.0))
    assert (found.severity, "3 times; the last time 100.0 s ago" in found.what) == ("warning", True)
    assert jobs.restarts(look(Event(900.0, "restarted", "")), 9000.0) == [], "it is no news"


def test_vaults():
    def judged(*said: int | str, nodes: int = 2, open_jobs: int = 1) -> Finding:
        return only(jobs.vaults({f"vault {number}": one for number, one in enumerate(said)}, nodes, open_jobs))

    assert judged(PROTOCOL, PROTOCOL).severity == "ok"
    assert judged(open_jobs=0).severity == "ok", "there is nothing to remember yet"
    assert judged(PROTOCOL).severity == "warning"
    assert judged(PROTOCOL, nodes=1).severity == "ok", "one node can have no second"
    silent = judged(PROTOCOL, PROTOCOL, "no answer")
    assert (silent.severity, silent.where, silent.what) == ("error", "vault 2", "it does not answer: no answer")
    assert f"speaks protocol 1, we {PROTOCOL}" in judged(PROTOCOL, PROTOCOL, 1).what


# ------------------------------------------------------------------ nodes

WELL = Node(
    "n1",
    "gpu7",
    store_bytes=100 * GB,
    shm=(200 * GB, 150 * GB),
    disk=(1000 * GB, 500 * GB),
    offset_s=0.002,
    uncertain_s=0.001,
    metrics={"spilled": 0.0, "ever_spilled": 0.0, "fallback": 0.0, "in_shm": 0.0},
)


def ill(**facts) -> Finding:
    """What is found on a node that is well but for this."""
    found = only(nodes.judge(replace(WELL, **facts)))
    assert found.where == "gpu7"
    return found


def test_nodes_that_are_well():
    assert nodes.judge(WELL) == []
    assert [one.severity for one in nodes.judged([WELL, WELL])] == ["ok"] * 5
    sick = nodes.judged([WELL, replace(WELL, disk=(100, 1))])
    assert [one.check for one in sick if one.severity == "ok"] == ["nodes", "spilling", "shared memory", "clocks"]
    assert nodes.judge(replace(WELL, shm=None, disk=None)) == []


@pytest.mark.parametrize(
    ("largest", "ahead", "held", "severity"),
    [(33, 1, 0, "ok"), (34, 1, 0, "warning"), (1, 0, 101, "warning"), (101, 0, 0, "error"), (0, 0, 0, "ok")],
)
def test_object_stores(largest, ahead, held, severity):
    def look(node_id: str) -> dict:
        status = {"producer": {"node_id": node_id}, "consumers": {"train": None}}
        status |= {"max_ahead": ahead, "held_bytes": held * GB}
        return {"exp": {"status": status, "progress": [(0, Progress("published", 1, nbytes=largest * GB))]}}

    found = only(nodes.object_stores([WELL], look("n1")))
    assert found.severity == severity
    if severity != "ok":
        assert f"--object-store-memory {max(largest * (ahead + 2), held) * GB} or more" in found.do
        assert only(nodes.object_stores([WELL], look("n2"))).severity == "ok", "nothing of the job is on this node"
    assert only(nodes.object_stores([], {})).severity == "ok"


def test_spilling():
    found = ill(metrics={"spilled": 3.0 * GB, "ever_spilled": 5.0 * GB})
    assert found.severity == "warning"
    assert "3.0 GB of objects lie on disk" in found.what
    assert "5.0 GB went" in found.what
    assert ill(metrics={"spilled": 0.0, "ever_spilled": 5.0 * GB}).severity == "note"
    assert ill(metrics={"spilled": 0.0, "fallback": 1.0 * GB}).severity == "warning"
    found = ill(metrics={})
    assert (found.severity, "not looked at" in found.what) == ("note", True)


def test_figures_of_a_nodes_metrics():
    text = """# HELP ray_object_store_memory Object store memory by various sub-kinds on this node
ray_object_store_memory{Component="raylet",Location="SPILLED",Version="2.60.0"} 8e+07
ray_object_store_memory{Location="MMAP_SHM"} 12.0 1700000000000
ray_spill_manager_objects_bytes{State="Spilled"} 9e+07
ray_spill_manager_objects_bytes{State="PendingSpill"} 1.0
ray_object_store_fallback_memory 0.0
ray_object_store_used_memory 5.0
damage{"""
    assert nodes.figures(text) == {"spilled": 8e7, "in_shm": 12.0, "ever_spilled": 9e7, "fallback": 0.0}
    assert nodes.figures("") == {}


def test_shared_memory():
    small = ill(shm=(64 << 20, 64 << 20))
    assert (small.severity, "under /tmp" in small.why) == ("error", True)
    assert ill(shm=(200 * GB, 90 * GB)).severity == "warning"
    own = {**WELL.metrics, "in_shm": 60.0 * GB}
    assert nodes.judge(replace(WELL, shm=(200 * GB, 90 * GB), metrics=own)) == []
    assert ill(shm=(200 * GB, 9 * GB), metrics=own).severity == "warning"


def test_disks():
    assert ill(disk=(1000 * GB, 49 * GB)).severity == "error"


@pytest.mark.parametrize(
    ("offset_s", "uncertain_s", "severity", "words"),
    [
        (1.2, 0.1, "warning", "1.2 s ahead of"),
        (-1.2, 0.1, "warning", "1.2 s behind"),
        (-400.0, 0.1, "error", "7 min behind"),
    ],
)
def test_clocks(offset_s, uncertain_s, severity, words):
    found = ill(offset_s=offset_s, uncertain_s=uncertain_s)
    assert found.severity == severity
    assert words in found.what
    assert nodes.judge(replace(WELL, offset_s=offset_s, uncertain_s=abs(offset_s))) == [], "the way explains it"


def test_a_node_on_which_nothing_runs_is_told_once():
    assert ill(error="a task on it does not end within the time", metrics={}, disk=(100, 1)).check == "nodes"


# ------------------------------------------------------------------ stores


class _Changing(MemoryStore):
    """Stands for a store that changes what it keeps."""

    def get(self, key):
        return pa.py_buffer(b"\0" + bytes(memoryview(super().get(key)))[1:])


class _Refusing(MemoryStore):
    """Stands for a store that lets nobody write."""

    def put(self, key, data):
        raise StoreRefused(f"{self.uri} does not let us write")


def look(kind) -> Finding:
    store = kind("redis://:secret@host/0")
    found = only(stores.look_at_store(store.uri, 1.0, lambda uri, timeout_s: store))
    assert store._values == {}, "it left something behind"
    assert "secret" not in str(found)
    return found


def test_a_store_that_gives_back_something_else():
    assert (look(_Changing).severity, "something else" in look(_Changing).what) == ("error", True)


def test_a_store_that_refuses_does_not_tell_its_password():
    assert (look(_Refusing).severity, "does not let us write" in look(_Refusing).what) == ("error", True)


@pytest.mark.parametrize(
    ("small_s", "large_s", "severity"),
    [(0.4, 1.9, "ok"), (0.6, 0.7, "warning"), (0.1, 2.1, "warning"), (2.1, 3, "error")],
)
def test_how_slow_is_too_slow(small_s, large_s, severity):
    took = {"put bytes": small_s, "get bytes": 0.01, "put MB": large_s, "delete": 0.01}
    found = only(stores.judge(took, "redis://host"))
    assert found.severity == severity
    assert f"put bytes {small_s:.3f} s" in found.what


def test_stores_that_cannot_be_tried_from_here(tmp_path):
    assert stores.look_at_store("memory://x", 1.0).severity == "note"
    absent = stores.look_at_store(f"file://{tmp_path}/new", 1.0)
    assert (absent.severity, [*tmp_path.iterdir()]) == ("note", []), "it made a folder"
    assert only(stores.look_at_store("nonsense", 1.0)).severity == "error"


# ------------------------------------------------------------------ versions

GOOD = {"ray": "2.60.0", "pyarrow": "20.0.0", "numpy": "2.0.0"}


def test_versions_that_were_tested():
    assert only(versions.look_at_versions(GOOD.__getitem__)).severity == "ok"


@pytest.mark.parametrize("other", ["2.46.9", "2.61.0", "3.0.0.dev0"])
def test_versions_outside_of_what_was_tested(other):
    found = only(versions.look_at_versions((GOOD | {"ray": other}).__getitem__))
    assert found.severity == "warning"
    assert f"ray {other}: tested were 2.47 to 2.60" in found.what


def test_the_commits_of_slime_are_those_of_the_patches():
    pins = json.loads((ROOT / "patches" / "upstream.json").read_text())["pins"]
    assert {pin["commit"]: pin["name"] for pin in pins} == versions.SLIME


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A folder that stands for a checkout of slime, patched, at a commit that counts as tested here."""
    top = tmp_path / "slime-checkout"
    parser, overlay = top / "slime" / "utils" / "arguments.py", top / "slime" / "cross_job" / "errors.py"
    for file, text in ((parser, "from slime.cross_job_arguments import add\n"), (overlay, "class E: ...\n")):
        file.parent.mkdir(parents=True)
        file.write_text(text)
    git = ["git", "-C", str(top), "-c", "user.name=t", "-c", "user.email=t@example.org"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "slime"]):
        subprocess.run([*git, *words], check=True, capture_output=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    monkeypatch.setattr(versions, "SLIME", {head: "v9"})
    blob = subprocess.run(
        [*git, "hash-object", str(parser)], check=True, capture_output=True, text=True
    ).stdout.strip()
    manifest = {
        "files": {"slime/utils/arguments.py": ["0" * 40, blob]},
        "overlay": {"slime/cross_job/errors.py": hashlib.sha256(overlay.read_bytes()).hexdigest()},
        "complete": True,
    }
    (top / ".git" / "slime-cross-job.json").write_text(json.dumps(manifest))
    return top


PARSER, OVERLAY, MANIFEST = "slime/utils/arguments.py", "slime/cross_job/errors.py", ".git/slime-cross-job.json"


@pytest.mark.parametrize(
    ("file", "change", "severity", "what"),
    [
        (PARSER, lambda text: text, "ok", "it is patched; at v9"),
        (PARSER, lambda text: "", "error", r"it is not patched \(at v9\)"),
        (OVERLAY, lambda text: "class F: ...", "warning", ".*slime/cross_job/errors.py were changed.*"),
        (OVERLAY, None, "warning", ".*slime/cross_job/errors.py were changed.*"),
        (MANIFEST, lambda text: text.replace('"complete": true', '"complete": false'), "error", ".*broken off.*"),
    ],
    ids=["as it should be", "not patched", "changed since", "deleted since", "patching broken off"],
)
def test_slime_of_a_checkout(checkout, file, change, severity, what):
    if change is None:
        (checkout / file).unlink()
    else:
        (checkout / file).write_text(change((checkout / file).read_text()))
    found = only(versions.look_at_slime(str(checkout)))
    assert found.severity == severity
    assert re.fullmatch(what, found.what)
    assert severity != "error" or "scripts/apply.sh" in found.do


def test_slime_at_another_commit(checkout, monkeypatch):
    monkeypatch.setattr(versions, "SLIME", {"f" * 40: "v1"})
    found = only(versions.look_at_slime(str(checkout)))
    assert (found.severity, "none of those tested: v1" in found.what) == ("warning", True)


def test_slime_of_an_image_and_no_slime_at_all(checkout, tmp_path):
    (checkout / ".git").rename(tmp_path / "git")
    found = only(versions.look_at_slime(str(checkout)))
    assert (found.severity, "git does not tell its commit" in found.what) == ("note", True)
    assert only(versions.look_at_slime(str(tmp_path))).severity == "error"


# ------------------------------------------------------------------ the whole


def test_every_check_is_told_in_order_and_says_what_it_lacked():
    broken = Finding("cluster", "error", "nobody listens there", do="do")
    well = [Finding(check, "ok", "2.60") for check in ("versions", "slime")]
    found = complete([broken, *well], "")
    assert [one.check for one in found] == [*CHECKS]
    assert [one.severity for one in found] == ["ok", "ok", "error", *["note"] * (len(CHECKS) - 3)]
    assert {one.what for one in found[3:]} == {"not looked at: it needs what 'cluster' looks at, see there"}


def test_a_process_that_ends_before_its_time_is_an_error_of_the_check_in_which_it_did():
    found = complete([Finding("versions", "ok", "2.60")], "the time of 5 s was over")
    assert [one.severity for one in found] == ["ok", "error", *["note"] * (len(CHECKS) - 2)]
    assert {one.what for one in found[1:]} == {"not looked at: the time of 5 s was over"}


def told(capsys: pytest.CaptureFixture[str]) -> list[Finding]:
    return [Finding(**json.loads(line)) for line in capsys.readouterr().out.splitlines()]


def test_what_fails_or_hangs_is_an_error_of_its_check_and_ends_no_other(capsys):
    def refused(words: str) -> None:
        raise BadInput(words)

    def nobody() -> None:
        raise NoBroker("namespace 'x' has no broker")

    assert within("broker", 60.0, refused, "no such namespace") is None
    assert within("broker", 60.0, nobody) is None
    assert within("cluster", 60.0, refused, "Version mismatch: 2.53.0") is None
    assert within("cluster", 60.0, refused, "Token authentication is enabled") is None
    release = threading.Event()
    assert within("vaults", 0.0, release.wait) is None
    release.set()
    broker, none, other, token, vaults = told(capsys)
    assert "start a job there" in none.do
    assert (broker.severity, "BadInput: no such namespace" in broker.what) == ("error", True)
    assert "the cluster's interpreter" in other.do
    assert "RAY_AUTH_TOKEN" in token.do
    assert "no answer within 0 s" in vaults.what


def test_what_is_found_is_told_and_returned(capsys):
    well = Finding("slime", "ok", "it is patched")
    assert within("slime", 60.0, lambda: [well]) == [well]
    assert within("slime", 60.0, lambda: well) == well
    assert within("nodes", 60.0, lambda: [WELL]) == [WELL]
    assert told(capsys) == [well, well]


def test_what_ray_prints_is_no_finding(tmp_path, monkeypatch):
    """As its raylets' warnings, which it prints to stdout."""
    (tmp_path / "ray.py").write_text("print('(raylet) WARNING: 8 PYTHON worker processes', flush=True)\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = diagnose("127.0.0.1:1", "none", timeout_s=60)
    assert {one.check for one in found} == {*CHECKS}
    assert not [one for one in found if "raylet" in f"{one.what}{one.why}" and one.check != "cluster"]


def test_its_process_is_told_by_stdin_what_it_looks_at(monkeypatch):
    started = []
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda words, **how: started.append(words) or popen(words, **how))
    found = diagnose("127.0.0.1:1", "none", store="memory://x?password=hunter2", timeout_s=60)
    (store,) = [one for one in found if one.check == "durable store"]
    assert store.where == "memory://x?password=***"  # the witness: it was told
    assert started
    assert "hunter2" not in str(started)


def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch):
    (tmp_path / "pyarrow.py").write_text("raise ModuleNotFoundError('No module named pyarrow')")
    monkeypatch.syspath_prepend(tmp_path)
    errors = [one for one in diagnose("127.0.0.1:1", "none", timeout_s=60) if one.severity == "error"]
    assert "No module named pyarrow" in only(errors).what


def test_a_check_that_hangs_does_not_hide_why_the_others_cannot_begin():
    """Where a package is missing, too: the process would wait for the thread of the first until its time is over."""
    code = """
import concurrent.futures, runpy, sys, time
from slime.cross_job.ops.doctor import versions
result = concurrent.futures.Future.result
concurrent.futures.Future.result = lambda future, seconds: result(future, 0.1)
versions.look_at_slime = lambda path: time.sleep(600)
sys.modules["slime.cross_job.ops.doctor.jobs"] = None  # as where it cannot be imported
runpy.run_module("slime.cross_job.ops.doctor", run_name="__main__")
"""
    path = os.pathsep.join(str(Path(entry).resolve()) for entry in sys.path)
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        input=json.dumps({"slime": "/nowhere", "store": "", "address": "", "namespace": "", "job_id": None}),
        capture_output=True,
        text=True,
        timeout=patient(60),
        check=False,
    )
    assert done.returncode == 1
    assert "ops.doctor.jobs halted" in done.stderr
    assert "no answer within" in done.stdout
