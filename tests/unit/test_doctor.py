"""What `doctor` concludes from facts, and how it keeps its time and its secrets: no cluster, no waiting."""

import hashlib
import json
import subprocess
from dataclasses import asdict, replace
from pathlib import Path

import pyarrow as pa
import pytest

from slime.cross_job.errors import StoreRefused
from slime.cross_job.ops import doctor, doctor_store, doctor_versions
from slime.cross_job.ops import doctor_checks as checks
from slime.cross_job.ops import doctor_nodes as nodes
from slime.cross_job.ops.doctor import CHECKS, NEEDS, complete
from slime.cross_job.ops.doctor_checks import SEVERITIES, Finding
from slime.cross_job.ops.doctor_nodes import Need, Node
from slime.cross_job.stores.memory import MemoryStore
from slime.cross_job.types import PROTOCOL

ROOT = Path(__file__).parents[2]
GB = 10**9


def client(state="live", silent_s=0.4, **more):
    return {
        **{"state": state, "reason": "", "activity": "at work", "activity_s": 3.0, "silent_s": silent_s},
        **{
            "presumed_dead": False,
            "dead_after_s": 30.0,
            "ray_job_id": "01000000",
            "submission_id": "raysubmit_1",
            "pid": 77,
            "host": "gpu7",
        },
        **more,
    }


def status(producer=None, train=None, **more):
    """Of a job with both sides at work, where not said otherwise."""
    return {
        **{"complete": False, "control": "running", "published": 5, "acked": 3, "queue_depth": 2, "leased": 0},
        **{"demanded": 0, "lost": [], "held_bytes": 100, "max_bytes": None, "idle_s": 4.0},
        **{"recent": {"per_minute": None}, "producer": client() if producer is None else producer},
        **{"consumers": {"train": client() if train is None else train}, "groups": {"train": {"closed": False}}},
        **more,
    }


def only(found: list[Finding]) -> Finding:
    (one,) = found
    assert one.check in dict(CHECKS)
    assert one.severity in SEVERITIES
    if one.severity in ("error", "warning"):
        assert all([one.what, one.why, one.do]), one
    return one


# ------------------------------------------------------------------ jobs


def test_both_sides_at_work():
    assert only(checks.peers("exp", status())).severity == "ok"
    assert checks.progress("exp", status()).severity == "ok"
    found = only(checks.leases("exp", status()))
    assert (found.severity, found.what) == ("ok", "2 clients; the longest silence is 0.4 of 30 s")


@pytest.mark.parametrize(("state", "severity"), [("failed", "error"), ("dead", "error"), ("stopped", "warning")])
@pytest.mark.parametrize("side", ["producer", "train"])
def test_a_side_that_is_gone_while_the_other_waits(state, severity, side):
    gone = client(state, silent_s=300, reason="out of memory")
    found = only(checks.peers("exp", status(**{side: gone})))
    assert found.severity == severity
    assert f"is {state}: out of memory; it was last heard 5 min ago" in found.what
    assert "raysubmit_1, pid 77 on gpu7" in found.what
    assert ("train job (group train)" if side == "train" else "rollout job") in found.what.partition("while")[0]


def test_a_side_that_never_came():
    nobody = status()
    nobody["consumers"] = {}
    found = only(checks.peers("exp", nobody))
    assert (found.severity, "no train job has attached yet" in found.what) == ("warning", True)
    nobody = status()
    nobody["producer"] = None
    assert "no rollout job has attached yet" in only(checks.peers("exp", nobody)).what
    assert "start the rollout job with --job-id exp" in only(checks.peers("exp", nobody)).do


def test_what_ended_as_it_should_is_no_fault():
    assert only(checks.peers("exp", status(producer=client("finished")))).severity == "ok"
    assert (
        only(checks.peers("exp", status(train=client("finished"), groups={"train": {"closed": True}}))).severity
        == "ok"
    )
    assert only(checks.peers("exp", status(producer=client("stopped"), control="draining"))).severity == "ok"
    assert only(checks.peers("exp", status(complete=True))).severity == "ok"


def test_nobody_is_left():
    found = only(checks.peers("exp", status(producer=client("dead", reason="killed"), train=client("stopped"))))
    assert (found.severity, "nobody is attached" in found.what) == ("warning", True)
    found = only(checks.peers("exp", status(producer=client("stopped"), train=client("stopped"))))
    assert found.severity == "note"


def test_rollouts_that_were_lost():
    found = only(checks.peers("exp", status(lost=[*range(20)])))
    assert found.severity == "warning"
    assert "0, 1, 2, 3, 4, 5, 6, 7 and 12 more" in found.what


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"leased": 1}, "the train job has 1 rollouts and does not ack them"),
        ({"queue_depth": 3}, "3 published rollouts wait for the train job to claim them"),
        (
            {"queue_depth": 0, "demanded": 2},
            "the train job waits for the rollout job, of which it demanded 2 rollouts",
        ),
        ({"queue_depth": 0}, "the rollout job waits for the train job to demand"),
    ],
)
def test_a_job_that_stands_still_says_who_waits_for_whom(more, words):
    found = only([checks.progress("exp", status(idle_s=checks.STUCK_S + 1, **more))])
    assert found.severity == "warning"
    assert words in found.what
    assert "rollout job 'at work' for 3.0 s" in found.what


def test_a_job_whose_rollouts_take_an_hour_does_not_stand_still_after_ten_minutes():
    slow = status(idle_s=700, recent={"per_minute": 1 / 60})
    assert checks.progress("exp", slow).severity == "ok"
    assert checks.progress("exp", {**slow, "idle_s": 5 * 3600 + 1}).severity == "warning"


def test_a_job_that_is_held_back():
    found = only([checks.progress("exp", status(control="paused"))])
    assert (found.severity, "it is paused" in found.what) == ("warning", True)
    found = only([checks.progress("exp", status(max_bytes=100))])
    assert (found.severity, "waits for room: 100 bytes are held" in found.what) == ("warning", True)
    assert checks.progress("exp", status(max_bytes=101)).severity == "ok"
    assert checks.progress("exp", status(producer=client("dead"))).severity == "note"


def test_a_lease_that_is_about_to_end():
    assert only(checks.leases("exp", status(train=client(silent_s=15.0)))).severity == "ok"
    found = only(checks.leases("exp", status(train=client(silent_s=15.1))))
    assert found.severity == "warning"
    assert "the group train (pid 77 on gpu7) is silent for 15.1 s, of a lease of 30 s" in found.what
    assert only(checks.leases("exp", status(train=client("dead", silent_s=400)))).severity == "ok"


# ------------------------------------------------------------------ broker and vaults


def test_protocols():
    hello = {"protocol": PROTOCOL, "namespace": "ns"}
    assert only(checks.broker_speaks(hello, {"vault of node a": PROTOCOL})).severity == "ok"
    found = only(checks.broker_speaks({**hello, "protocol": 1}, {}))
    assert (found.severity, f"speaks protocol 1, we {PROTOCOL}" in found.what) == ("error", True)
    assert only(checks.broker_speaks(hello, {"vault of node a": 2})).where == "vault of node a"


def test_the_namespaces_that_have_a_broker_are_named():
    found = only([checks.no_broker("ns", ["one", "two"])])
    assert "one, two" in found.what
    assert "--namespace one" in found.do
    assert "one: none" in only([checks.no_broker("ns", [])]).what


def test_a_broker_that_was_restarted():
    assert only(checks.broker_stands("ns", 1, 0.01, {"count": 0})).severity == "ok"
    _, found = checks.broker_stands("ns", 1, 0.01, {"count": 3, "at": 1000.0, "now": 1100.0})
    assert (found.severity, "3 times; the last time 100.0 s ago" in found.what) == ("warning", True)
    assert checks.broker_stands("ns", 1, 0.01, {"count": 3, "at": 0.0, "now": 9000.0})[1].severity == "note"


def test_vaults():
    assert only(checks.vaults_answer({}, [], 2, 2, 1)).severity == "ok"
    assert only(checks.vaults_answer({}, [], 0, 2, 0)).severity == "ok", "there is nothing to remember yet"
    assert only(checks.vaults_answer({}, [], 1, 2, 1)).severity == "warning"
    assert only(checks.vaults_answer({}, [], 1, 1, 1)).severity == "note", "one node can have no second"
    assert only(checks.vaults_answer({"v": "no answer"}, [], 2, 3, 1)).severity == "error"
    assert only(checks.vaults_answer({}, ["v"], 2, 3, 1)).severity == "note"


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


def test_a_node_that_is_well():
    judges = (nodes.not_reached, nodes.spilling, nodes.shared_memory, nodes.disks, nodes.clocks)
    assert [only(judge([WELL])).severity for judge in judges] == ["ok"] * 5


@pytest.mark.parametrize(
    ("largest", "ahead", "held", "severity"),
    [(33, 1, 0, "ok"), (34, 1, 0, "warning"), (1, 0, 101, "warning"), (101, 0, 0, "error"), (0, 0, 0, "ok")],
)
def test_object_stores(largest, ahead, held, severity):
    found = only(nodes.object_store([WELL], [Need("exp", largest * GB, ahead, held * GB, ("n1",))]))
    assert found.severity == severity
    if severity != "ok":
        least = max(largest * (ahead + 2), held) * GB
        assert f"--object-store-memory {least} or more" in found.do
        other = Need("exp", largest * GB, ahead, held * GB, ("n2",))
        assert only(nodes.object_store([WELL], [other])).severity == "ok", "nothing of the job is on this node"


def test_spilling():
    now = replace(WELL, metrics={"spilled": 3.0 * GB, "ever_spilled": 5.0 * GB})
    found = only(nodes.spilling([now]))
    assert (found.severity, "3.0 GB of objects lie on disk" in found.what, "5.0 GB went" in found.what) == (
        "warning",
        True,
        True,
    )
    before = replace(WELL, metrics={"spilled": 0.0, "ever_spilled": 5.0 * GB})
    assert only(nodes.spilling([before])).severity == "note"
    beside = replace(WELL, metrics={"spilled": 0.0, "fallback": 1.0 * GB})
    assert only(nodes.spilling([beside])).severity == "warning"
    found = only(nodes.spilling([replace(WELL, metrics={})]))
    assert (found.severity, "not looked at on gpu7" in found.what) == ("note", True)


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
    small = only(nodes.shared_memory([replace(WELL, shm=(64 << 20, 64 << 20))]))
    assert (small.severity, "under /tmp" in small.why) == ("error", True)
    assert only(nodes.shared_memory([replace(WELL, shm=(200 * GB, 90 * GB))])).severity == "warning"
    own = {**WELL.metrics, "in_shm": 60.0 * GB}
    assert only(nodes.shared_memory([replace(WELL, shm=(200 * GB, 90 * GB), metrics=own)])).severity == "ok"
    assert only(nodes.shared_memory([replace(WELL, shm=(200 * GB, 9 * GB), metrics=own)])).severity == "warning"
    assert only(nodes.shared_memory([replace(WELL, shm=None)])).severity == "note"


def test_disks():
    assert only(nodes.disks([replace(WELL, disk=(1000 * GB, 49 * GB))])).severity == "error"
    assert only(nodes.disks([replace(WELL, disk=None)])).severity == "note"


@pytest.mark.parametrize(
    ("offset_s", "uncertain_s", "severity", "words"),
    [
        (1.2, 0.1, "warning", "1.2 s ahead of"),
        (-1.2, 0.1, "warning", "1.2 s behind"),
        (1.2, 0.3, "ok", ""),  # the way there and back explains it
        (-400.0, 0.1, "error", "7 min behind"),
    ],
)
def test_clocks(offset_s, uncertain_s, severity, words):
    found = only(nodes.clocks([WELL, replace(WELL, name="gpu8", offset_s=offset_s, uncertain_s=uncertain_s)]))
    assert found.severity == severity
    assert words in found.what
    assert severity == "ok" or found.where == "gpu8"
    assert only(nodes.clocks([replace(WELL, offset_s=None)])).severity == "note"


def test_a_node_on_which_nothing_runs():
    dead = Node("n2", "gpu8", error="a task on it does not end within the time")
    assert only(nodes.not_reached([WELL, dead])).where == "gpu8"
    for judge in (nodes.spilling, nodes.shared_memory, nodes.disks, nodes.clocks):
        assert only(judge([WELL, dead])).severity == "ok", "a node that was not reached is told once"


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
    found = only(doctor_store.look_at_store(store.uri, 1.0, lambda uri, timeout_s: store))
    assert store._values == {}, "it left something behind"
    assert "secret" not in str(found)
    return found


def test_a_store_that_gives_back_something_else():
    assert (look(_Changing).severity, "something else" in look(_Changing).what) == ("error", True)


def test_a_store_that_refuses_does_not_tell_its_password():
    assert "it refuses" in look(_Refusing).what


@pytest.mark.parametrize(
    ("small_s", "large_s", "severity"),
    [(0.4, 1.9, "ok"), (0.6, 0.7, "warning"), (0.1, 2.1, "warning"), (2.1, 3, "error")],
)
def test_how_slow_is_too_slow(small_s, large_s, severity):
    found = only(doctor_store.judge((small_s, 0.01), (large_s, 0.01), 0.01, 0.01, "redis://host"))
    assert found.severity == severity
    assert f"put {small_s:.3f} s" in found.what


def test_stores_that_cannot_be_tried_from_here(tmp_path):
    assert only(doctor_store.look_at_store("memory://x", 1.0)).severity == "note"
    absent = only(doctor_store.look_at_store(f"file://{tmp_path}/new", 1.0))
    assert (absent.severity, [*tmp_path.iterdir()]) == ("note", []), "it made a folder"
    assert only(doctor_store.look_at_store("nonsense", 1.0)).severity == "error"
    assert doctor_store.quarantine("memory://x", "exp", 1.0).severity == "note"


# ------------------------------------------------------------------ versions

GOOD = {"python": "3.11.7", "ray": "2.60.0", "pyarrow": "20.0.0", "numpy": "2.0.0"}


def test_versions_that_were_tested():
    assert only(doctor_versions.versions(GOOD)).severity == "ok"
    assert {"ray", "python", "pyarrow", "numpy"} == doctor_versions.installed().keys()


@pytest.mark.parametrize("other", [{"ray": "2.46.9"}, {"ray": "2.61.0"}, {"ray": "3.0.0.dev0"}, {"python": "3.13.1"}])
def test_versions_outside_of_what_was_tested(other):
    found = only(doctor_versions.versions(GOOD | other))
    assert found.severity == "warning"
    assert next(iter(other.values())) in found.what


def test_a_package_that_is_missing():
    assert only(doctor_versions.versions(GOOD | {"pyarrow": ""})).severity == "error"


def test_the_words_of_ray_on_another_version():
    words = (
        "Version mismatch: The cluster was started with:\n    Ray: 2.53.0\n    Python: 3.10.1\nThis process on node "
    )
    words += "10.0.0.1 was started with:\n    Ray: 2.60.0\n    Python: 3.11.7\n"
    found = doctor_versions.same_versions(words)
    assert found is not None
    assert found.what == "the cluster has Ray 2.53.0 and Python 3.10.1, this process Ray 2.60.0 and Python 3.11.7"
    assert doctor_versions.same_versions("no such thing") is None


def test_the_commits_of_slime_are_those_of_the_patches():
    pins = json.loads((ROOT / "patches" / "upstream.json").read_text())["pins"]
    assert {pin["commit"]: pin["name"] for pin in pins} == doctor_versions.SLIME


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
    monkeypatch.setattr(doctor_versions, "SLIME", {head: "v9"})
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


def test_slime_as_it_should_be(checkout):
    found = only(doctor_versions.look_at_slime(str(checkout)))
    assert (found.severity, found.what) == ("ok", "it is patched; at v9")


def test_slime_that_is_not_patched(checkout):
    (checkout / "slime" / "utils" / "arguments.py").write_text("")
    found = only(doctor_versions.look_at_slime(str(checkout)))
    assert (found.severity, found.what) == ("error", "it is not patched (at v9)")
    assert "scripts/apply.sh" in found.do


def test_slime_at_another_commit(checkout, monkeypatch):
    monkeypatch.setattr(doctor_versions, "SLIME", {"f" * 40: "v1"})
    found = only(doctor_versions.look_at_slime(str(checkout)))
    assert (found.severity, "none of those tested: v1" in found.what) == ("warning", True)


def test_slime_that_was_changed_since(checkout):
    (checkout / "slime" / "cross_job" / "errors.py").write_text("class F: ...\n")
    found = only(doctor_versions.look_at_slime(str(checkout)))
    assert (found.severity, "slime/cross_job/errors.py were changed" in found.what) == ("warning", True)
    (checkout / "slime" / "cross_job" / "errors.py").unlink()
    assert only(doctor_versions.look_at_slime(str(checkout))).severity == "warning"


def test_slime_whose_patching_was_broken_off(checkout):
    manifest = checkout / ".git" / "slime-cross-job.json"
    manifest.write_text(manifest.read_text().replace('"complete": true', '"complete": false'))
    assert "broken off" in only(doctor_versions.look_at_slime(str(checkout))).what


def test_slime_of_an_image_and_no_slime_at_all(checkout, tmp_path):
    (checkout / ".git").rename(tmp_path / "git")
    found = only(doctor_versions.look_at_slime(str(checkout)))
    assert (found.severity, "git does not tell its commit" in found.what) == ("note", True)
    assert only(doctor_versions.look_at_slime(str(tmp_path))).severity == "error"


# ------------------------------------------------------------------ the whole


def test_every_check_is_told_in_order_and_says_what_it_lacked():
    broken = Finding("token", "error", "ours is another", "why", "do")
    found = complete([broken, Finding("versions", "ok", "3.11")], "the time of 5 s was over")
    assert [one.check for one in found] == [name for name, _ in CHECKS]
    told = {one.check: one for one in found}
    assert told["versions"].severity == "ok"
    assert told["broker"] == Finding("broker", "note", "not looked at: it needs what 'token' looks at, see there")
    assert told["slime"] == Finding("slime", "note", "not looked at: the time of 5 s was over")
    assert not [one for one in found if one.severity == "ok" and one.check != "versions"]


def test_what_checks_need_are_checks():
    names = [name for name, _ in CHECKS]
    assert len({*names}) == len(names)
    for check, needs in NEEDS.items():
        assert {check, *needs} <= {*names}
        assert all(names.index(need) < names.index(check) for need in needs), check


def test_a_finding_travels_as_json():
    one = Finding("clocks", "warning", "what", "why", "do", "gpu7")
    assert Finding(**json.loads(json.dumps(asdict(one)))) == one


def test_its_process_is_told_by_stdin_what_it_looks_at(monkeypatch):
    started = []
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda words, **how: started.append(words) or popen(words, **how))
    found = doctor.diagnose("127.0.0.1:1", "none", store="memory://x?password=hunter2", timeout_s=60)
    (store,) = [one for one in found if one.check == "durable store"]
    assert store.where == "memory://x?password=***"  # the witness: it was told
    assert started
    assert "hunter2" not in str(started)
