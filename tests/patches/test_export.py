"""Export, record, count: re-export is identical, the policy holds, nothing is written where it does not."""

from __future__ import annotations

import pytest

from tests.patches.toy_upstream import HEADER, Toy, git

GOOD = (
    HEADER.format(subject="add a")
    + "diff --git a/f b/f\nindex "
    + f"{'1' * 40}..{'2' * 40} 100644\n--- a/f\n+++ b/f\n@@ -1,0 +2 @@\n+x\n@@ -3,0 +5,2 @@\n+y\n+z\n"
)


def _series(toy: Toy) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (toy.patches / "one").iterdir()}


def test_export_of_what_apply_made_is_identical(toy: Toy, capfd: pytest.CaptureFixture[str]) -> None:
    before, pins = _series(toy), (toy.patches / "upstream.json").read_bytes()
    assert toy.apply() == 0
    settings = {"diff.noprefix": "true", "diff.mnemonicPrefix": "true", "color.ui": "always", "core.abbrev": "5"}
    for setting, value in {**settings, "diff.algorithm": "patience", "diff.context": "9"}.items():
        git(toy.slime, "config", setting, value)
    assert toy.run("export", str(toy.slime), "one") == 0
    assert "unchanged  add-a.patch: pkg/a.py" in capfd.readouterr().out
    assert _series(toy) == before
    assert (toy.patches / "upstream.json").read_bytes() == pins


def test_export_an_edit(toy: Toy) -> None:
    assert toy.apply() == 0
    lines = (toy.slime / "pkg/b.py").read_text().splitlines(keepends=True)
    (toy.slime / "pkg/b.py").write_text("".join([*lines[:20], "more\n", *lines[20:]]))
    before = _series(toy)
    assert toy.run("export", str(toy.slime), "one") == 0
    changed = {name for name, data in _series(toy).items() if data != before[name]}
    assert changed == {"add-b.patch"}
    assert _series(toy)["add-b.patch"].startswith(HEADER.format(subject="add b").encode() + b"diff --git")
    assert toy.apply("--verify") == 0  # the edited checkout is what the patches make now
    assert toy.apply() == 0


def test_export_refuses(toy: Toy, capfd: pytest.CaptureFixture[str]) -> None:
    assert toy.apply() == 0
    before = _series(toy)

    def refused(words: str, pin: str = "one") -> None:
        assert toy.run("export", str(toy.slime), pin) == 2
        assert words in capfd.readouterr().err
        assert _series(toy) == before

    refused("HEAD is", "two")
    patched = (toy.slime / "pkg/b.py").read_text()
    (toy.slime / "pkg/b.py").write_text(patched.replace("b 20\n", "B 20\n"))
    refused("inserted lines only")
    git(toy.slime, "checkout", "-q", "--", "pkg/b.py")
    refused("inserted lines only")
    (toy.slime / "pkg/b.py").write_text(patched)
    (toy.slime / "other.txt").write_text("other\nmore\n")
    refused("other.txt is changed and no patch names it")


def test_a_file_has_one_owner(toy: Toy, capfd: pytest.CaptureFixture[str]) -> None:
    patch = toy.patches / "one" / "add-b.patch"
    patch.write_text(patch.read_text() + "diff --git a/pkg/a.py b/pkg/a.py\n")
    assert toy.run("export", str(toy.slime), "one") == 2
    assert "add-a.patch and add-b.patch both name pkg/a.py" in capfd.readouterr().err
    patch.write_bytes((toy.patches / "one" / "add-a.patch").read_bytes())
    assert toy.apply("--check") == 2
    assert "both touch" in capfd.readouterr().err


def test_export_records_the_trees(toy: Toy) -> None:
    upstream = toy.patches / "upstream.json"
    before = upstream.read_text()
    upstream.write_text(before.replace(toy.tree("one"), "?").replace(toy.tree("one", "after"), "?"))
    assert toy.apply() == 0
    assert toy.run("export", str(toy.slime), "one") == 0
    assert upstream.read_text() == before


def test_a_long_field_of_a_header_goes_on_in_the_next_line(toy: Toy) -> None:
    patch = toy.patches / "one" / "add-b.patch"
    patch.write_text(patch.read_text().replace("because\n", "because\nof this: and that\n"))
    assert toy.apply() == 0


def test_a_patch_of_more_than_header_and_insertions(toy: Toy, capfd: pytest.CaptureFixture[str]) -> None:
    patch = toy.patches / "one" / "add-b.patch"
    for old, new in (
        ("Why: because\n", ""),
        ("Why: because", "Why:  "),
        ("Subject: add a\n", ""),
        ("Subject", "Title"),
        ("Why", " Why"),
        ("\n\n", "\n"),
        ("+x\n", "+x\n-y\n"),
        ("+x\n", "+x\n y\n"),
        ("+z\n", "+z\n\\ No newline at end of file\n"),
        ("@@ -1,0 +2 @@", "@@ -1 +2 @@"),
        ("@@ -1,0 +2 @@", "@@ -1,0 +2 @@ def f():"),
        ("1" * 40, "1" * 12),
        ("index", "new file mode 100644\nindex"),
        (GOOD[GOOD.index("@@") :], ""),
        (GOOD[GOOD.index("diff") :], ""),
    ):
        assert old in GOOD
        patch.write_text(GOOD.replace(old, new, 1))
        assert toy.apply("--check") == 2
        said = capfd.readouterr().err
        assert said.startswith("error: one/add-b.patch, from line "), (old, new)
        assert said.count("\n") == 1
    patch.write_text(GOOD)
    assert toy.apply("--check") == 2
    assert "are not made for f of this commit" in capfd.readouterr().err


def test_the_policy_of_the_folder(toy: Toy, capfd: pytest.CaptureFixture[str]) -> None:
    series = toy.patches / "one" / "series"
    for text, words in (("add-a.patch # first\nmissing.patch\n", "missing.patch"), ("# none\n", "names no patch")):
        series.write_text(text)
        assert toy.apply("--check") == 2
        assert words in capfd.readouterr().err
