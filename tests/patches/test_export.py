"""Export, record, count: re-export is identical, the policy holds, nothing is written where it does not."""

from __future__ import annotations

from pathlib import Path

import pytest
from patchset_export import BEGIN, END, count
from patchset_git import PatchsetError
from patchset_series import FIELDS, parse_patch
from toy_upstream import HEADER, Toy, git

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
    for setting in (
        "diff.noprefix",
        "diff.mnemonicPrefix",
        "color.ui",
        "core.abbrev",
        "diff.algorithm",
        "diff.context",
    ):
        value = {"diff.algorithm": "patience", "diff.context": "9", "core.abbrev": "5", "color.ui": "always"}
        git(toy.slime, "config", setting, value.get(setting, "true"))
    assert toy.run("export", str(toy.slime), "one") == 0
    assert "unchanged  add-a.patch: 2 lines into 1 files" in capfd.readouterr().out
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
    refused("is not an inserted line")
    git(toy.slime, "checkout", "-q", "--", "pkg/b.py")
    refused("changes no file")
    (toy.slime / "pkg/b.py").write_text(patched)
    (toy.slime / "other.txt").write_text("other\nmore\n")
    refused("other.txt is changed and no patch names it")


def test_a_file_has_one_owner(toy: Toy, capfd: pytest.CaptureFixture[str]) -> None:
    patch = toy.patches / "one" / "add-b.patch"
    patch.write_text(patch.read_text() + "diff --git a/pkg/a.py b/pkg/a.py\n")
    assert toy.run("export", str(toy.slime), "one") == 2
    assert "add-a.patch and add-b.patch both name pkg/a.py" in capfd.readouterr().err
    patch.write_bytes((toy.patches / "one" / "add-a.patch").read_bytes())
    with pytest.raises(PatchsetError, match="both touch"):
        toy.patchset.series(toy.patchset.pin("one"))


def test_record_is_what_export_recorded(toy: Toy) -> None:
    pins = toy.patchset.pins()
    toy.patchset.write_trees("one", "?", "?")
    assert toy.run("record") == 0
    assert toy.patchset.pins() == pins


def test_count(toy: Toy) -> None:
    readme = toy.patches / "README.md"
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    assert toy.run("count", "--update") == 0
    table = count(toy.patchset)
    assert table.splitlines() == [
        "| patch | one | two |",
        "| --- | --: | --: |",
        "| add a | 2 | 2 |",
        "| add b | 1 | - |",
        "| **patches, inserted lines** | 2, 3 | 1, 2 |",
    ]
    assert readme.read_text() == f"before\n{BEGIN}\n\n{table}\n{END}\nafter\n"


def test_parse_a_good_patch() -> None:
    patch = parse_patch("add-a.patch", GOOD.encode(), "one/add-a.patch")
    assert patch.inserted == 3
    assert patch.files[0].hunks == ((1, (b"x\n",)), (3, (b"y\n", b"z\n")))
    assert tuple(patch.fields) == FIELDS
    longer = GOOD.replace("because\n", "because\nof this: and that\n")
    assert parse_patch("a", longer.encode(), "a").fields["Why"] == "because of this: and that"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("Why: because\n", "", "must have the header fields"),
        ("Why: because", "Why:  ", "must have the header fields"),
        ("Subject: add a\n", "", "must have the header fields"),
        ("Subject", "Title", "the first line must be"),
        ("Why", " Why", "must not start with a blank"),
        ("\n\n", "\n", "no empty line"),
        ("+x\n", "+x\n-y\n", "is not an inserted line"),
        ("+x\n", "+x\n y\n", "is not an inserted line"),
        ("+z\n", "+z\n+more\n", "is not an inserted line"),
        ("+z\n", "", "does not add up"),
        ("+z\n", "+z\n\\ No newline at end of file\n", "is not an inserted line"),
        ("@@ -1,0 +2 @@", "@@ -1,0 +3 @@", "does not add up"),
        ("@@ -1,0 +2 @@", "@@ -1 +2 @@", "inserts nothing"),
        ("@@ -1,0 +2 @@", "@@ -1,0 +2 @@ def f():", "inserts nothing"),
        ("1" * 40, "1" * 12, "is not an inserted line"),
        ("index", "new file mode 100644\nindex", "is not an inserted line"),
        (GOOD[GOOD.index("@@") :], "", "inserts nothing"),
        (GOOD[GOOD.index("diff") :], "", "changes no file"),
    ],
)
def test_parse_refuses(old: str, new: str, words: str) -> None:
    assert old in GOOD
    with pytest.raises(PatchsetError, match=words):
        parse_patch("add-a.patch", GOOD.replace(old, new, 1).encode(), "one/add-a.patch")


def test_the_policy_of_the_folder(toy: Toy, tmp_path: Path) -> None:
    one = toy.patchset.pin("one")
    (toy.patches / "one" / "series").write_text("add-a.patch # first\nmissing.patch\n")
    with pytest.raises(PatchsetError, match="does not exist"):
        toy.patchset.series(one)
    (toy.patches / "one" / "series").write_text("# none\n")
    with pytest.raises(PatchsetError, match="names no patch"):
        toy.patchset.series(one)
    (toy.overlay / "link").symlink_to("pkg")
    with pytest.raises(PatchsetError, match="plain files only"):
        toy.patchset.overlay()
    (toy.patches / "upstream.json").write_text('{"pins": [{}]}')
    with pytest.raises(PatchsetError, match="cannot read the pins"):
        toy.patchset.pins()
