"""--port on the toy: what is reported per patch, and what is written when."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.patches.toy_upstream import Toy, git, snapshot, whole_tree


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
    assert whole_tree(on_two.slime) == on_two.tree("two")


def test_check_only_reports(on_two: Toy, capfd: pytest.CaptureFixture[str]) -> None:
    before = snapshot(on_two.slime)
    assert on_two.apply("--port", "--pin", "one", "--check") == 1
    said = capfd.readouterr()
    assert "conflict  add-b.patch" in said.out
    assert said.err == "error: 1 of 2 patches conflict\n"
    assert snapshot(on_two.slime) == before


@pytest.mark.parametrize("path", ["pkg/b.py", "other.txt"])
def test_no_markers_in_a_tree_with_changes(on_two: Toy, capfd: pytest.CaptureFixture[str], path: str) -> None:
    with (on_two.slime / path).open("a") as file:
        file.write("mine\n")
    before = snapshot(on_two.slime)
    assert on_two.apply("--port", "--pin", "one") == 2
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
    assert on_two.apply("--port", "--pin", "one") == 0
    assert "ported already" in capfd.readouterr().out
    assert on_two.apply("--verify") == 0
    assert "exactly patched: pin one" in capfd.readouterr().out
    assert on_two.apply() == 0
    assert "already applied: pin one" in capfd.readouterr().out
    (on_two.overlay / "pkg/extra/new.py").write_text("new = 1\n")
    (on_two.overlay / "pkg/extra/run.py").unlink()
    assert on_two.apply("--verify") == 1
    assert on_two.apply("--port", "--pin", "one") == 0
    assert not (on_two.slime / "pkg/extra/run.py").exists()
    (on_two.overlay / "pkg/extra/new.py").write_text("new = 2\n")
    assert on_two.apply() == 0
    assert (on_two.slime / "pkg/extra/new.py").read_text() == "new = 2\n"
    assert on_two.apply("--reverse") == 0
    assert snapshot(on_two.slime) == before


def test_check_refuses_what_port_refuses(toy: Toy, capfd: pytest.CaptureFixture[str]) -> None:
    git(toy.slime, "commit", "-q", "--allow-empty", "-m", "after one")
    for path, words in (
        ("other.txt", "other.txt has changes of yours"),
        ("pkg/extra", "pkg/extra/__init__.py is in the way"),
    ):
        target = toy.slime / path
        target.write_text("mine\n")
        for check in ([], ["--check"]):
            before = snapshot(toy.slime)
            assert toy.apply("--port", *check) == 2
            assert words in capfd.readouterr().err
            assert snapshot(toy.slime) == before
        git(toy.slime, "checkout", "-q", "--", "other.txt")
    (toy.slime / "pkg/extra").unlink()
    assert toy.apply("--port", "--check") == 0


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
    assert toy.run("apply", str(shallow), "--port") == 2
    assert "--full" in capfd.readouterr().err
    assert toy.run("apply", str(shallow), "--port", "--pin", "one") == 2
    said = capfd.readouterr().err
    assert f"fetch --depth 1 {toy.upstream.as_uri()} {toy.commits['one']}" in said
    git(shallow, *said.split(": git -C ")[1].split(" ", 1)[1].split())  # the advice helps
    assert toy.run("apply", str(shallow), "--port", "--pin", "one", "--check") == 1
    assert "conflict  add-b.patch" in capfd.readouterr().out


def test_port_goes_with_check_only(toy: Toy, capfd: pytest.CaptureFixture[str]) -> None:
    assert toy.apply("--anyway") == 2
    assert "--anyway goes with --port" in capfd.readouterr().err
    assert toy.apply("--port", "--reverse") == 2
    assert "--port goes with --check only" in capfd.readouterr().err


def test_a_checkout_that_was_reset_after_a_port_gets_clean_again(toy: Toy, capfd: pytest.CaptureFixture[str]) -> None:
    git(toy.slime, "commit", "-q", "--allow-empty", "-m", "after one")
    assert toy.apply("--port") == 0
    git(toy.slime, "reset", "-q", "--hard", toy.commits["two"])
    assert toy.apply() == 2
    assert "run with --reverse first" in capfd.readouterr().err
    assert toy.apply("--reverse") == 0
    assert whole_tree(toy.slime) == toy.tree("two")
    assert toy.apply() == 0


def test_commits_of_the_users_on_a_ported_checkout(toy: Toy, capfd: pytest.CaptureFixture[str]) -> None:
    git(toy.slime, "commit", "-q", "--allow-empty", "-m", "after one")
    assert toy.apply("--port") == 0
    (toy.slime / "other.txt").write_text("mine\n")
    git(toy.slime, "commit", "-qm", "mine", "--", "other.txt")
    for options in (["--verify"], [], ["--port"]):
        assert toy.apply(*options) == 0
    git(toy.slime, "add", "-A")
    git(toy.slime, "commit", "-qm", "all of it, cross-job too")
    committed = whole_tree(toy.slime)
    capfd.readouterr()
    assert toy.apply("--port") == 2
    assert "run with --reverse first" in capfd.readouterr().err
    assert toy.apply("--reverse") == 0
    assert whole_tree(toy.slime) == committed, "what is committed is not taken out"
    assert toy.apply("--port") == 2
    assert "of the overlay is in commit" in capfd.readouterr().err


def test_a_link_that_leads_nowhere_is_in_nobodys_way(toy: Toy) -> None:
    (toy.slime / "train_mine.py").symlink_to("../elsewhere/train.py")
    git(toy.slime, "add", "-A")
    git(toy.slime, "commit", "-qm", "a link")
    assert toy.apply("--check") == 0
    assert toy.apply("--port", "--check") == 0
