"""Apply, check, verify and reverse on the toy: exact, idempotent, all or nothing."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.patches.toy_upstream import Toy, git, run_script, snapshot, whole_tree


def test_apply_verify_reverse(toy: Toy, capfd: pytest.CaptureFixture[str]) -> None:
    before, tree = snapshot(toy.slime), whole_tree(toy.slime)
    assert tree == toy.tree("one")
    assert toy.apply("--verify") == 1
    assert "not patched: the checkout is upstream's" in capfd.readouterr().err
    assert toy.apply() == 0
    assert toy.apply("--verify") == 0
    lines = (toy.slime / "pkg/a.py").read_text().splitlines()
    assert (lines[5], lines[31]) == ("+a", "+end")
    assert (toy.slime / "pkg/extra/run.py").read_text() == "print('extra')\n"
    assert (toy.slime / "pkg/extra/run.py").stat().st_mode & 0o111
    assert not (toy.slime / "pkg/extra/__pycache__").exists()
    assert snapshot(toy.slime)[".git/index"] == before[".git/index"]
    (toy.slime / "pkg/extra/__pycache__").mkdir()
    (toy.slime / "pkg/extra/__pycache__/run.pyc").write_bytes(b"cache")
    assert toy.apply("--reverse") == 0
    assert snapshot(toy.slime) == before
    assert whole_tree(toy.slime) == tree
    assert not (toy.slime / "pkg/extra").exists()
    capfd.readouterr()
    assert toy.apply("--reverse") == 0
    assert "nothing to reverse" in capfd.readouterr().out


def test_the_tree_is_the_recorded_one_and_git_apply_makes_the_same(toy: Toy, tmp_path: Path) -> None:
    assert toy.apply() == 0
    git(toy.slime, "add", "-u")
    assert git(toy.slime, "write-tree") == toy.tree("one", "after")
    other = toy.clone(tmp_path / "by-git")
    for name in ("add-a.patch", "add-b.patch"):
        git(other, "apply", "--index", "--unidiff-zero", str(toy.patches / "one" / name))
    assert git(other, "write-tree") == toy.tree("one", "after")


def test_apply_twice(toy: Toy, capfd: pytest.CaptureFixture[str]) -> None:
    assert toy.apply() == 0
    once = snapshot(toy.slime)
    assert toy.apply() == 0
    assert "already applied" in capfd.readouterr().out
    assert snapshot(toy.slime) == once
    assert toy.apply("--check") == 0
    assert "already applied" in capfd.readouterr().out


def test_check_changes_nothing(toy: Toy, capfd: pytest.CaptureFixture[str]) -> None:
    before = snapshot(toy.slime)
    objects = git(toy.slime, "count-objects", "-v")
    assert toy.apply("--check") == 0
    assert "would write pin one: 2 patched files, 2 overlay files, 0 removed" in capfd.readouterr().out
    assert toy.apply("--check", "--pin", "one") == 0
    assert snapshot(toy.slime) == before
    assert git(toy.slime, "count-objects", "-v") == objects


def test_a_newer_overlay_replaces_the_older(toy: Toy, capfd: pytest.CaptureFixture[str]) -> None:
    """Modules that the newer overlay no longer has go, with their folders and caches; the user's own files stay."""
    for path in ("pkg/extra/gone.py", "pkg/extra/room/gone.py", "pkg/house/inner/gone.py", "gone.py", "gone.svg"):
        (toy.overlay / path).parent.mkdir(parents=True, exist_ok=True)
        (toy.overlay / path).write_text("old\n")
    assert toy.apply() == 0
    manifest = toy.slime / ".git/slime-cross-job.json"
    older = {**json.loads(manifest.read_text()), "patches": {"add-a.patch": "0" * 64}, "folders": ["pkg/extra"]}
    manifest.write_text(json.dumps(older))  # with what versions before this one wrote as well
    own = {"pkg/extra/own.py": "own\n", "pkg/house/own.py": "own\n", "own.py": "own\n"}
    for path, text in own.items():
        (toy.slime / path).write_text(text)
    for path in ("pkg/extra/room/__pycache__/gone.pyc", "pkg/house/inner/__pycache__/gone.pyc"):
        (toy.slime / path).parent.mkdir()
        (toy.slime / path).write_text("cache")
    for path in ("pkg/extra/gone.py", "pkg/extra/room", "pkg/house", "gone.py", "gone.svg", "pkg/extra/__init__.py"):
        shutil.rmtree(toy.overlay / path) if (toy.overlay / path).is_dir() else (toy.overlay / path).unlink()
    (toy.overlay / "pkg/extra/run.py").write_text("print('newer')\n")
    (toy.overlay / "pkg/more.py").write_text("more\n")
    assert toy.apply("--verify") == 1
    capfd.readouterr()
    assert toy.apply() == 0
    assert "2 overlay files, 6 removed" in capfd.readouterr().out
    assert toy.apply("--verify") == 0
    new = git(toy.slime, "ls-files", "--others").splitlines()
    assert {*new} == {"pkg/extra/run.py", "pkg/more.py", *own}
    assert (toy.slime / "pkg/extra/run.py").read_text() == "print('newer')\n"
    assert not (toy.slime / "pkg/extra/room").exists()
    assert not (toy.slime / "pkg/house/inner").exists()
    assert toy.apply("--reverse") == 0
    assert git(toy.slime, "ls-files", "--others").splitlines() == sorted(own)
    assert git(toy.slime, "status", "--porcelain", "-uno") == ""


def test_newer_patches_replace_the_older(toy: Toy) -> None:
    assert toy.apply() == 0
    toy.set_series("one", {"add-a.patch": {"pkg/a.py": {7: "a2"}}, "add-o.patch": {"other.txt": {1: "o"}}})
    assert toy.apply("--verify") == 1
    assert toy.apply() == 0
    assert toy.apply("--verify") == 0
    assert "+b" not in (toy.slime / "pkg/b.py").read_text()
    assert toy.apply("--reverse") == 0
    assert whole_tree(toy.slime) == toy.tree("one")


def test_changes_of_the_user_elsewhere_are_left_alone(toy: Toy) -> None:
    (toy.slime / "other.txt").write_text("mine\n")
    (toy.slime / "own.py").write_text("own\n")
    git(toy.slime, "add", "other.txt")
    before = snapshot(toy.slime)
    assert toy.apply() == 0
    assert toy.apply("--verify") == 1  # other.txt is not upstream's
    assert toy.apply("--reverse") == 0
    assert snapshot(toy.slime) == before


def test_undone_by_hand_then_applied_again(toy: Toy) -> None:
    assert toy.apply() == 0
    git(toy.slime, "checkout", "-q", "--", ".")
    assert toy.apply("--verify") == 1
    assert toy.apply() == 0
    assert toy.apply("--verify") == 0
    git(toy.slime, "checkout", "-q", "--", ".")
    git(toy.slime, "clean", "-fdq")
    git(toy.slime, "checkout", "-q", toy.commits["two"])
    assert toy.apply() == 0
    assert toy.apply("--verify", "--pin", "two") == 0


def test_a_lost_manifest_is_made_again(toy: Toy) -> None:
    assert toy.apply() == 0
    manifest = toy.slime / ".git/slime-cross-job.json"
    manifest.unlink()
    assert toy.apply() == 0
    assert json.loads(manifest.read_text())["pin"] == "one"
    manifest.unlink()
    assert toy.apply("--reverse") == 0
    assert whole_tree(toy.slime) == toy.tree("one")


def test_the_pin_by_its_tree_in_another_history(toy: Toy) -> None:
    git(toy.slime, "commit", "-q", "--amend", "-m", "vendored")
    assert toy.apply() == 2
    assert toy.apply("--pin", "two") == 2
    assert toy.apply("--pin", "one") == 0
    assert toy.apply("--pin", "one", "--verify") == 0


def test_a_linked_worktree_has_its_own_manifest(toy: Toy, tmp_path: Path) -> None:
    linked = tmp_path / "linked"
    git(toy.slime, "worktree", "add", "-q", "--detach", str(linked), toy.commits["two"])
    assert toy.apply() == 0
    assert toy.run("apply", str(linked)) == 0
    assert toy.run("apply", str(linked), "--verify") == 0
    assert toy.run("apply", str(linked), "--reverse") == 0
    assert toy.apply("--verify") == 0


def test_the_environment_of_a_git_hook_leads_nowhere_else(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    before = snapshot(toy.upstream)
    monkeypatch.setenv("GIT_DIR", str(toy.upstream / ".git"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(toy.upstream / ".git" / "index"))
    monkeypatch.setenv("GIT_WORK_TREE", str(toy.upstream))
    assert toy.apply() == 0
    assert toy.apply("--verify") == 0
    assert snapshot(toy.upstream) == before


def test_the_script(toy: Toy) -> None:
    options = ("--patches", str(toy.patches), "--overlay", str(toy.overlay))
    assert run_script("apply.sh", str(toy.slime), *options).returncode == 0
    done = run_script("apply.sh", str(toy.slime), "--verify", *options)
    assert (done.returncode, done.stdout[:15]) == (0, "exactly patched")


@pytest.mark.parametrize("full", [False, True])
def test_fetch(toy: Toy, tmp_path: Path, full: bool) -> None:
    folder = tmp_path / "new" / "slime"
    assert toy.run("fetch", str(folder), *(["two", "--full"] if full else [])) == 0
    assert git(folder, "rev-parse", "HEAD") == toy.commits["two" if full else "one"]
    assert git(folder, "rev-parse", "--is-shallow-repository") == ("false" if full else "true")
    assert toy.run("apply", str(folder)) == 0
    assert toy.run("apply", str(folder), "--verify") == 0


def test_fetch_falls_back_to_a_full_clone(toy: Toy, tmp_path: Path) -> None:
    git(toy.upstream, "config", "uploadpack.allowAnySHA1InWant", "false")
    env = {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "protocol.version", "GIT_CONFIG_VALUE_0": "0"}
    git(toy.upstream, "checkout", "-q", "main")  # so that commit one is no tip of anything
    options = ("--patches", str(toy.patches), "--overlay", str(toy.overlay))
    done: subprocess.CompletedProcess[str] = run_script("fetch_slime.sh", str(tmp_path / "s"), *options, env=env)
    assert done.returncode == 0, done.stderr
    assert git(tmp_path / "s", "rev-parse", "HEAD", "--is-shallow-repository").split() == [toy.commits["one"], "false"]


def test_fetch_refuses_and_cleans_up(toy: Toy, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert toy.run("fetch", str(toy.slime)) == 2
    assert "not an empty folder" in capfd.readouterr().err
    assert toy.run("fetch", str(tmp_path / "new"), "nine") == 2
    assert "the pins are one, two" in capfd.readouterr().err
    toy.upstream.rename(tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    for name in ("new", "empty"):
        assert toy.run("fetch", str(tmp_path / name)) == 2
        assert capfd.readouterr().err.startswith("error: git fetch failed")
    assert not (tmp_path / "new").exists()
    assert list((tmp_path / "empty").iterdir()) == []


def test_commits_of_the_users_on_top_of_a_pin(toy: Toy, capfd: pytest.CaptureFixture[str]) -> None:
    """They touch no patched file, before apply or after it."""
    (toy.slime / "other.txt").write_text("mine\n")
    git(toy.slime, "commit", "-qam", "mine")
    before = snapshot(toy.slime)
    assert toy.apply("--check") == 0
    assert toy.apply() == 0
    assert toy.apply("--verify") == 0
    assert "exactly patched: pin one" in capfd.readouterr().out
    (toy.slime / "other.txt").write_text("more of mine\n")
    git(toy.slime, "commit", "-qm", "more of mine", "--", "other.txt")
    (toy.overlay / "pkg/extra/run.py").write_text("print('newer')\n")
    assert toy.apply() == 0
    assert (toy.slime / "pkg/extra/run.py").read_text() == "print('newer')\n"
    assert toy.apply("--verify") == 0
    assert toy.apply("--reverse") == 0
    git(toy.slime, "checkout", "-q", "--detach", "HEAD~1")
    assert snapshot(toy.slime).keys() == before.keys()
    assert whole_tree(toy.slime) == git(toy.slime, "rev-parse", "HEAD^{tree}")
