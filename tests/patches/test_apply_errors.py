"""Every error of apply and reverse: one clear line, and the checkout exactly as it was."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.patches.toy_upstream import ROOT, Toy, git, snapshot, whole_tree

Fails = Callable[..., str]


@pytest.fixture
def fails(toy: Toy, capfd: pytest.CaptureFixture[str]) -> Fails:
    """Run apply, see that it fails in one line that holds the words, and that nothing was changed."""

    def run(*words: str, args: tuple[str, ...] = (), folder: str | None = None, status: int = 2) -> str:
        before = snapshot(toy.slime)
        capfd.readouterr()
        assert toy.run("apply", str(toy.slime) if folder is None else folder, *args) == status
        said = capfd.readouterr().err
        assert said.startswith("error: ")
        assert said.count("\n") == 1
        for word in words:
            assert word in said
        assert snapshot(toy.slime) == before
        return said

    return run


def test_not_a_checkout(toy: Toy, fails: Fails, tmp_path: Path) -> None:
    fails("not a git repository", "fetch_slime.sh", folder=str(tmp_path))
    fails("not the top folder of a git checkout", folder=str(tmp_path / "nothing"))
    fails("the folder is empty", folder="")


def test_inside_another_repository(toy: Toy, fails: Fails) -> None:
    (toy.slime / "inner").mkdir()
    fails("lies inside the repository", folder=str(toy.slime / "inner"))
    fails("lies inside the repository", folder=str(toy.slime / "pkg"))


def test_no_commit_and_bare(toy: Toy, fails: Fails, tmp_path: Path) -> None:
    (tmp_path / "fresh").mkdir()
    git(tmp_path / "fresh", "init", "-q", ".")
    fails("has no commit", folder=str(tmp_path / "fresh"))
    git(tmp_path, "init", "-q", "--bare", "bare.git")
    fails("work tree", folder=str(tmp_path / "bare.git"))


def test_a_patched_file_with_changes(toy: Toy, fails: Fails) -> None:
    with (toy.slime / "pkg/b.py").open("a") as file:
        file.write("mine\n")
    fails("pkg/b.py has changes of yours")
    fails("pkg/b.py has changes of yours", args=("--check",))


def test_a_patched_file_missing_or_no_file(toy: Toy, fails: Fails) -> None:
    (toy.slime / "pkg/b.py").unlink()
    fails("pkg/b.py is missing")
    (toy.slime / "pkg/b.py").symlink_to("a.py")
    fails("pkg/b.py is in the way")


def test_an_overlay_path_that_exists(toy: Toy, fails: Fails) -> None:
    (toy.slime / "pkg/extra").mkdir()
    (toy.slime / "pkg/extra/run.py").write_text("print('extra')\n")  # even if it is the same
    fails("pkg/extra/run.py exists already and is not ours")
    shutil.rmtree(toy.slime / "pkg/extra")
    (toy.slime / "pkg/extra").write_text("a file")
    fails("pkg/extra/__init__.py is in the way")
    (toy.slime / "pkg/extra").unlink()
    (toy.slime / "pkg/extra").symlink_to("/")
    fails("pkg/extra/__init__.py is in the way", "link")


def test_an_overlay_path_that_slime_has(toy: Toy, fails: Fails) -> None:
    (toy.overlay / "other.txt").write_text("ours\n")
    fails("other.txt of the overlay is a file of slime itself")


def test_an_unknown_commit(toy: Toy, fails: Fails) -> None:
    with (toy.slime / "pkg/b.py").open("a") as file:
        file.write("mine\n")
    git(toy.slime, "commit", "-qam", "mine")
    fails("not of the pins one, two (it adds to pin one, and changes pkg/b.py)", "--port", "fetch_slime.sh")
    git(toy.slime, "checkout", "-q", "--orphan", "elsewhere")
    git(toy.slime, "commit", "-q", "-m", "no pin below")
    fails("is not of the pins one, two: see")
    git(toy.slime, "checkout", "-q", toy.commits["two"])
    fails("not pin one", args=("--pin", "one"))


def test_an_unknown_pin(toy: Toy, fails: Fails) -> None:
    fails("no pin 'three'", "one, two", args=("--pin", "three"))
    fails("no pin 'three'", args=("--pin", "three", "--reverse"))


def test_half_applied(toy: Toy, fails: Fails) -> None:
    git(toy.slime, "apply", "--unidiff-zero", str(toy.patches / "one" / "add-b.patch"))
    fails("half-applied: in pkg/b.py and not in pkg/a.py")
    fails("half-applied", args=("--reverse",))
    git(toy.slime, "checkout", "-q", "--", ".")
    assert toy.apply() == 0
    git(toy.slime, "checkout", "-q", "--", "pkg/a.py")
    fails("half-applied")
    assert toy.apply("--reverse") == 0  # the manifest says what is whose
    assert whole_tree(toy.slime) == toy.tree("one")


def test_crlf(toy: Toy, fails: Fails, tmp_path: Path) -> None:
    other = toy.clone(tmp_path / "crlf", "one", "-c", "core.autocrlf=true")
    before = snapshot(other)
    assert b"\r\n" in before["pkg/a.py"]
    fails("pkg/a.py has CRLF line endings", "autocrlf", folder=str(other))
    assert snapshot(other) == before


def test_an_edit_after_apply_stops_reverse_and_apply(toy: Toy, fails: Fails) -> None:
    assert toy.apply() == 0
    run = toy.slime / "pkg/extra/run.py"
    run.write_text("edited\n")
    fails("pkg/extra/run.py was edited", args=("--reverse",))
    fails("pkg/extra/run.py was edited")
    fails("pkg/extra/run.py was edited", args=("--verify",), status=1)
    run.write_text("print('extra')\n")
    with (toy.slime / "pkg/a.py").open("a") as file:
        file.write("mine\n")
    fails("pkg/a.py has changes of yours", args=("--reverse",))
    fails("pkg/a.py has changes of yours", args=("--verify",), status=1)


def test_another_commit_after_apply(toy: Toy, fails: Fails) -> None:
    assert toy.apply() == 0
    git(toy.slime, "update-ref", "--no-deref", "HEAD", toy.commits["two"])
    fails("were applied at commit", "--reverse")


def test_a_damaged_patch_or_manifest(toy: Toy, fails: Fails) -> None:
    patch = toy.patches / "one" / "add-b.patch"
    text = patch.read_text()
    patch.write_text(text.replace("@@ -11,0 +12 @@", "@@ -12,0 +13 @@"))
    fails("does not give the file that it records")
    patch.write_text(text)
    (toy.slime / ".git/slime-cross-job.json").write_text("{")
    fails("slime-cross-job.json is damaged")


_AT_STEP = """
import os, signal, sys
from pathlib import Path
from patchset.__main__ import main

step, what, calls = int(sys.argv[1]), sys.argv[2], []

def at_step(real):
    def call(self, *args, **kwargs):
        calls.append(self.name)
        if len(calls) == step and what == "error":
            raise PermissionError(13, "Permission denied", str(self))
        if len(calls) == step:
            os.kill(os.getpid(), getattr(signal, what))
        return real(self, *args, **kwargs)
    return call

Path.replace = at_step(Path.replace)
status = main(sys.argv[3:])
assert len(calls) >= step, "it was over before"
sys.exit(status)
"""


def _fail_at(toy: Toy, step: int, what: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run apply in a process of its own, which fails, or gets a signal, before it puts the file of that number."""
    program = [sys.executable, "-c", _AT_STEP, str(step), what, "apply", "--patches", str(toy.patches)]
    command = [*program, "--overlay", str(toy.overlay), str(toy.slime), *options]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "scripts")}
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


# An apply of the toy puts six files: the manifest, two patched ones, two of the overlay, the manifest again.
@pytest.mark.parametrize(("what", "status"), [("error", 2), ("SIGINT", 130), ("SIGTERM", 130)])
def test_a_failure_in_the_middle_rolls_back(toy: Toy, what: str, status: int) -> None:
    before = snapshot(toy.slime)
    for step in range(1, 7):
        done = _fail_at(toy, step, what)
        assert (done.returncode, done.stderr.count("\n")) == (status, 1), done.stderr
        assert "the checkout is as it was" in done.stderr
        assert snapshot(toy.slime) == before
        assert not (toy.slime / "pkg/extra").exists()


def test_a_failure_in_the_middle_of_reverse_rolls_back(toy: Toy) -> None:
    assert toy.apply() == 0
    before = snapshot(toy.slime)
    for step in (1, 2, 3):  # the manifest, and the patched files
        assert "the checkout is as it was" in _fail_at(toy, step, "error", "--reverse").stderr
        assert snapshot(toy.slime) == before
    assert toy.apply("--verify") == 0


def test_killed_in_the_middle(toy: Toy) -> None:
    """After a kill -9 nobody rolls back: the manifest lets apply complete the work, and --reverse undo it."""
    for step in range(2, 7):
        assert _fail_at(toy, step, "SIGKILL").returncode == -9
        assert toy.apply("--reverse") == 0
        assert whole_tree(toy.slime) == toy.tree("one")
    assert _fail_at(toy, 4, "SIGKILL").returncode == -9
    assert toy.apply() == 0
    assert toy.apply("--verify") == 0
    for step in (1, 2, 3):
        assert _fail_at(toy, step, "SIGKILL", "--reverse").returncode == -9
    assert toy.apply() == 0
    assert toy.apply("--verify") == 0


def test_killed_in_the_middle_of_updates(toy: Toy) -> None:
    """What lies there then may come from any of several versions; a patch that is gone takes its lines along."""
    assert toy.apply() == 0
    for number in (2, 3, 4):
        (toy.overlay / "pkg/extra/run.py").write_text(f"print({number})\n")
        patches = {"add-a.patch": {"pkg/a.py": {7: f"a{number}"}}, "add-b.patch": {"pkg/b.py": {11: f"b{number}"}}}
        toy.set_series("one", patches if number < 4 else {"add-a.patch": patches["add-a.patch"]})
        assert _fail_at(toy, 3 if number < 4 else 2, "SIGKILL").returncode == -9
    assert toy.apply() == 0
    assert toy.apply("--verify") == 0
    assert (toy.slime / "pkg/b.py").read_bytes() == (toy.upstream / "pkg/b.py").read_bytes()
    assert toy.apply("--reverse") == 0
    assert whole_tree(toy.slime) == toy.tree("one")


def test_one_at_a_time(toy: Toy, fails: Fails) -> None:
    with (toy.slime / ".git/slime-cross-job.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        fails("another apply works on")
        fails("another apply works on", args=("--reverse",))


def test_no_git(toy: Toy, tmp_path: Path) -> None:
    env = {**os.environ, "PATH": str(tmp_path)}
    script = str(ROOT / "scripts" / "patchset")
    done = subprocess.run([sys.executable, script, "apply", str(toy.slime)], capture_output=True, text=True, env=env)
    assert done.returncode == 2
    assert done.stderr == "error: git is not on PATH: install git 2.30 or newer\n"


def test_the_scripts_without_python_or_arguments(tmp_path: Path) -> None:
    for name in ("apply.sh", "fetch_slime.sh", "export_patches.sh"):
        script = str(ROOT / "scripts" / name)
        env = {**os.environ, "PYTHON": str(tmp_path / "python")}
        done = subprocess.run([script, "x"], capture_output=True, text=True, env=env, check=False)
        assert (done.returncode, done.stderr[:9]) == (2, "error: no")
        env["PYTHON"] = sys.executable
        done = subprocess.run([script], capture_output=True, text=True, env=env, check=False)
        assert done.returncode == 2
        assert "error: the following arguments are required" in done.stderr
