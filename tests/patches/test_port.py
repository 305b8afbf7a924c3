"""--port on the toy: what is reported per patch, and what is written when."""

from __future__ import annotations

from pathlib import Path

import pytest
from toy_upstream import Toy, git, snapshot, whole_tree


@pytest.fixture
def on_two(toy: Toy) -> Toy:
    """The toy's checkout at pin two: a.py has one more line at its top, b.py another line where the patch inserts."""
    git(toy.slime, "checkout", "-q", "--detach", toy.commits["two"])
    return toy


def test_merged_and_conflict(on_two: Toy, capfd: pytest.CaptureFixture[str]) -> None:
    assert on_two.apply("--port", "--pin", "one") == 1
    said = capfd.readouterr()
    assert "merged    add-a.patch: pkg/a.py" in said.out
    text = (on_two.slime / "pkg/b.py").read_text().splitlines()
    first = next(number for number, line in enumerate(text, 1) if line.startswith("<<<<<<<"))
    last = next(number for number, line in enumerate(text, 1) if line.startswith(">>>>>>>"))
    assert f"conflict  add-b.patch: pkg/b.py lines {first}-{last}" in said.out
    assert said.err.startswith("error: 1 of 2 patches conflict")
    assert said.err.count("\n") == 1
    assert (on_two.slime / "pkg/a.py").read_text().splitlines()[6] == "+a"
    assert not (on_two.slime / "pkg/extra").exists()
    git(on_two.slime, "checkout", "-q", "--", "pkg")
    assert whole_tree(on_two.slime) == on_two.patchset.pin("two").tree_before


def test_check_only_reports(on_two: Toy, capfd: pytest.CaptureFixture[str]) -> None:
    before = snapshot(on_two.slime)
    assert on_two.apply("--port", "--pin", "one", "--check") == 1
    assert "conflict  add-b.patch" in capfd.readouterr().out
    assert snapshot(on_two.slime) == before


@pytest.mark.parametrize("path", ["pkg/b.py", "other.txt"])
def test_no_markers_in_a_tree_with_changes(on_two: Toy, capfd: pytest.CaptureFixture[str], path: str) -> None:
    with (on_two.slime / path).open("a") as file:
        file.write("mine\n")
    before = snapshot(on_two.slime)
    assert on_two.apply("--port", "--pin", "one") == 1
    said = capfd.readouterr()
    assert "merged    add-a.patch" in said.out
    assert "conflict  add-b.patch" in said.out
    assert f"nothing was written: {path} has changes of yours" in said.err
    assert snapshot(on_two.slime) == before


def test_without_conflicts_the_result_is_applied_and_reversible(
    on_two: Toy, capfd: pytest.CaptureFixture[str]
) -> None:
    (on_two.slime / "pkg/b.py").write_text((on_two.slime / "pkg/b.py").read_text().replace("changed 11", "b 11"))
    git(on_two.slime, "commit", "-qam", "b as it was")
    before = snapshot(on_two.slime)
    assert on_two.apply("--port", "--pin", "one", "--check") == 0
    assert snapshot(on_two.slime) == before
    assert on_two.apply("--port", "--pin", "one") == 0
    said = capfd.readouterr().out
    assert "merged    add-a.patch: pkg/a.py" in said
    assert "clean     add-b.patch\n" in said
    assert (on_two.slime / "pkg/extra/run.py").exists()
    assert on_two.apply("--port", "--pin", "one") == 1
    assert "applied to this checkout already" in capfd.readouterr().err
    assert on_two.apply("--reverse") == 0
    assert snapshot(on_two.slime) == before


def test_the_nearest_pin(toy: Toy, capfd: pytest.CaptureFixture[str]) -> None:
    git(toy.slime, "commit", "-q", "--allow-empty", "-m", "after one")
    assert toy.apply("--port", "--check") == 0
    assert "patches of pin one" in capfd.readouterr().out
    git(toy.slime, "checkout", "-q", "--detach", toy.commits["two"])
    git(toy.slime, "commit", "-q", "--allow-empty", "-m", "after two")
    assert toy.apply("--port") == 0
    said = capfd.readouterr().out
    assert "patches of pin two" in said
    assert ", 1 commits apart" in said
    assert "clean     add-a.patch" in said


def test_a_file_that_upstream_renamed(on_two: Toy, capfd: pytest.CaptureFixture[str]) -> None:
    git(on_two.slime, "mv", "pkg/a.py", "pkg/moved.py")
    git(on_two.slime, "commit", "-qm", "moved")
    assert on_two.apply("--port", "--pin", "one", "--check") == 1
    said = capfd.readouterr().out
    assert "conflict  add-a.patch: pkg/a.py is not at this commit, upstream has it as pkg/moved.py" in said
    assert "conflict  add-b.patch" in said


def test_a_shallow_clone_lacks_what_it_needs(toy: Toy, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert toy.run("fetch", str(tmp_path / "shallow"), "two") == 0
    shallow = tmp_path / "shallow"
    git(shallow, "commit", "-q", "--amend", "--allow-empty", "-m", "no pin")
    capfd.readouterr()
    assert toy.run("apply", str(shallow), "--port") == 1
    assert "--full" in capfd.readouterr().err
    assert toy.run("apply", str(shallow), "--port", "--pin", "one") == 1
    said = capfd.readouterr().err
    assert f"fetch --depth 1 origin {toy.commits['one']}" in said
    git(shallow, *said.split(": git -C ")[1].split(" ", 1)[1].split())  # the advice helps
    assert toy.run("apply", str(shallow), "--port", "--pin", "one", "--check") == 1
    assert "conflict  add-b.patch" in capfd.readouterr().out


def test_port_goes_with_check_only(toy: Toy, capfd: pytest.CaptureFixture[str]) -> None:
    assert toy.apply("--port", "--reverse") == 1
    assert "--port goes with --check only" in capfd.readouterr().err
