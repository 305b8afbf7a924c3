"""Every error of apply and reverse: one clear line, and the checkout exactly as it was."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import patchset_disk
import pytest
from toy_upstream import ROOT, Toy, git, snapshot, whole_tree

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
    fails("not a git checkout", "fetch_slime.sh", folder=str(tmp_path))
    fails("is not a folder", folder=str(tmp_path / "nothing"))
    fails("SLIME_DIR is empty", folder="")


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
    fails("pkg/extra is in the way")
    (toy.slime / "pkg/extra").unlink()
    (toy.slime / "pkg/extra").symlink_to("/")
    fails("leads out of the checkout")


def test_an_overlay_path_that_slime_has(toy: Toy, fails: Fails) -> None:
    (toy.overlay / "other.txt").write_text("ours\n")
    fails("other.txt of the overlay is a file of slime itself")


def test_an_unknown_commit(toy: Toy, fails: Fails) -> None:
    git(toy.slime, "commit", "-q", "--allow-empty", "-m", "mine")
    fails("none of the pins one", "two", "--port", "fetch_slime.sh")
    git(toy.slime, "checkout", "-q", toy.commits["two"])
    fails("not pin one", args=("--pin", "one"))


def test_an_unknown_pin(toy: Toy, fails: Fails) -> None:
    fails("no pin 'three'", "one, two", args=("--pin", "three"))
    fails("no pin 'three'", args=("--pin", "three", "--reverse"))


def test_half_applied(toy: Toy, fails: Fails) -> None:
    git(toy.slime, "apply", "--unidiff-zero", str(toy.patches / "one" / "add-b.patch"))
    fails("half-applied", "add-b.patch (pkg/b.py) in", "add-a.patch (pkg/a.py) not")
    fails("half-applied", args=("--reverse",))
    git(toy.slime, "checkout", "-q", "--", ".")
    assert toy.apply() == 0
    git(toy.slime, "checkout", "-q", "--", "pkg/a.py")
    fails("half-applied")
    assert toy.apply("--reverse") == 0  # the manifest says what is whose
    assert whole_tree(toy.slime) == toy.patchset.pin("one").tree_before


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
    fails("pkg/extra/run.py differs", args=("--verify",), status=1)
    run.write_text("print('extra')\n")
    with (toy.slime / "pkg/a.py").open("a") as file:
        file.write("mine\n")
    fails("pkg/a.py has changes of yours", args=("--reverse",))
    fails("pkg/a.py has changes of yours", args=("--verify",), status=1)


def test_another_commit_after_apply(toy: Toy, fails: Fails) -> None:
    assert toy.apply() == 0
    git(toy.slime, "update-ref", "--no-deref", "HEAD", toy.commits["two"])
    fails("were applied at commit", "--reverse")


def test_patches_that_do_not_give_the_recorded_tree(toy: Toy, fails: Fails) -> None:
    recorded = json.loads((toy.patches / "upstream.json").read_text())
    recorded["pins"][0]["tree_after"] = "0" * 40
    (toy.patches / "upstream.json").write_text(json.dumps(recorded))
    fails("patchset.py record")
    assert toy.run("record", "--clone", str(toy.slime)) == 0
    assert toy.apply() == 0


def test_a_damaged_patch_or_manifest(toy: Toy, fails: Fails) -> None:
    patch = toy.patches / "one" / "add-b.patch"
    text = patch.read_text()
    patch.write_text(text.replace("@@ -11,0 +12 @@", "@@ -12,0 +13 @@"))
    fails("does not give the file that it records")
    patch.write_text(text)
    (toy.slime / ".git/slime-cross-job.json").write_text("{")
    fails("slime-cross-job.json is damaged")


@pytest.mark.parametrize("after", range(6))
@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), KeyboardInterrupt()])
def test_a_failure_in_the_middle_rolls_back(
    toy: Toy, monkeypatch: pytest.MonkeyPatch, after: int, error: BaseException
) -> None:
    before = snapshot(toy.slime)
    real, calls = Path.replace, []

    def replace(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == after + 1:
            raise error
        return real(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    assert toy.apply() == (130 if isinstance(error, KeyboardInterrupt) else 2)
    assert len(calls) > after  # the witness: it did happen, at the manifest, at each file, at the manifest again
    assert snapshot(toy.slime) == before
    assert whole_tree(toy.slime) == toy.patchset.pin("one").tree_before
    assert not (toy.slime / "pkg/extra").exists()


def test_a_failure_in_the_middle_of_reverse_rolls_back(
    toy: Toy, fails: Fails, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert toy.apply() == 0
    real, calls = Path.unlink, []

    def unlink(self: Path, missing_ok: bool = False) -> None:
        if self.name == "run.py":
            calls.append(self)
            raise PermissionError(1, "Operation not permitted", str(self))
        real(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink)
    fails("cannot write", "run.py", "the checkout is as it was", args=("--reverse",))
    assert calls
    monkeypatch.undo()
    assert toy.apply("--verify") == 0


def test_a_file_that_changes_under_us(toy: Toy, fails: Fails, monkeypatch: pytest.MonkeyPatch) -> None:
    real, broken = patchset_disk._write, []

    def write(target: Path, data: bytes, mode: int) -> None:
        first = target.name == "a.py" and not broken
        broken.extend([target] if first else [])
        real(target, data + b"!" if first else data, mode)

    monkeypatch.setattr(patchset_disk, "_write", write)
    fails("pkg/a.py is not what was written to it")
    assert broken


def test_no_permission_is_seen_before_anything_is_written(
    toy: Toy, fails: Fails, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Root may write everywhere, so the answer of the system is made up.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "pkg")
    fails("no permission to write into", "pkg")
    fails("no permission to write into", args=("--check",))


def test_killed_in_the_middle(toy: Toy) -> None:
    """After a kill -9 nobody rolls back: the manifest lets apply complete the work, and --reverse undo it."""
    program = (
        "import os, sys; from pathlib import Path; import patchset; real, calls = Path.replace, []\n"
        "def replace(self, target):\n"
        "    calls.append(target)\n"
        "    if len(calls) == int(sys.argv[1]): os.kill(os.getpid(), 9)\n"
        "    return real(self, target)\n"
        "Path.replace = replace; patchset.main(sys.argv[2:])\n"
    )
    options = ["--patches", str(toy.patches), "--overlay", str(toy.overlay), str(toy.slime)]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "scripts")}

    def kill_at(write: int) -> None:
        done = subprocess.run([sys.executable, "-c", program, str(write), "apply", *options], env=env, check=False)
        assert done.returncode == -9

    for write in (2, 3, 4, 5, 6):
        kill_at(write)
        assert toy.apply("--reverse") == 0
        assert whole_tree(toy.slime) == toy.patchset.pin("one").tree_before
    kill_at(3)
    assert toy.apply() == 0
    assert toy.apply("--verify") == 0
    (toy.overlay / "pkg/extra/run.py").write_text("print('newer')\n")
    toy.set_series("one", {"add-a.patch": {"pkg/a.py": {7: "a2"}}, "add-b.patch": {"pkg/b.py": {11: "b2"}}})
    kill_at(3)
    kill_at(4)
    assert toy.apply() == 0
    assert toy.apply("--verify") == 0
    assert toy.apply("--reverse") == 0
    assert whole_tree(toy.slime) == toy.patchset.pin("one").tree_before


def test_one_at_a_time(toy: Toy, fails: Fails) -> None:
    from patchset_git import Checkout

    with patchset_disk.locked(Checkout.open(str(toy.slime))):
        fails("another apply works on")


def test_no_git(toy: Toy, tmp_path: Path) -> None:
    env = {**os.environ, "PATH": str(tmp_path)}
    script = str(ROOT / "scripts" / "patchset.py")
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
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert done.stderr.startswith("error: the following arguments are required")
