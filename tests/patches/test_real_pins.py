"""The real patches: the policy that they keep, and apply and reverse on clones of upstream slime at every pin."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from patchset import main
from patchset_apply import apply, reverse, verify
from patchset_export import BEGIN, END, count, export
from patchset_git import Checkout
from patchset_port import port_patches
from patchset_series import Patchset, Pin
from toy_upstream import ROOT, git, whole_tree

PATCHSET = Patchset(ROOT / "patches", ROOT / "slime_overlay")
PINS = PATCHSET.pins()
MOST_PATCHES, MOST_LINES = 6, 40


@pytest.fixture(params=PINS, ids=lambda pin: pin.name)
def pin(request: pytest.FixtureRequest) -> Pin:
    return request.param


def _clone(mirror: Path, folder: Path, pin: Pin) -> Checkout:
    git(folder.parent, "clone", "-q", "--shared", "--no-checkout", str(mirror), str(folder))
    git(folder, "checkout", "-q", "--detach", pin.commit)
    return Checkout.open(str(folder))


def test_the_series_keeps_the_policy(pin: Pin) -> None:
    patches = PATCHSET.series(pin)  # refuses anything but headers and inserted lines
    names = [patch.name for patch in patches]
    on_disk = {path.name for path in (PATCHSET.folder / pin.name).iterdir()}
    assert on_disk == {*names, "series"}, "each file of the folder must be in the series"
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*\.patch", name) for name in names), "a few words, with dashes"
    assert len(patches) <= MOST_PATCHES
    assert sum(patch.inserted for patch in patches) <= MOST_LINES


def test_the_same_subject_has_the_same_name_in_every_pin() -> None:
    pairs = {(patch.fields["Subject"], patch.name) for pin in PINS for patch in PATCHSET.series(pin)}
    assert len({subject for subject, _ in pairs}) == len({name for _, name in pairs}) == len(pairs), sorted(pairs)


def test_the_readme_has_the_count() -> None:
    text = (PATCHSET.folder / "README.md").read_text()
    table = text.partition(BEGIN)[2].partition(END)[0].strip()
    assert table == count(PATCHSET).strip(), "run scripts/patchset.py count --update"


def test_apply_verify_reverse(pin: Pin, slime_mirror: Path, tmp_path: Path) -> None:
    checkout = _clone(slime_mirror, tmp_path / "slime", pin)
    assert checkout.tree == pin.tree_before
    assert apply(checkout, PATCHSET, None, dry=True).startswith("would write")
    assert whole_tree(checkout.top) == pin.tree_before
    assert apply(checkout, PATCHSET, None, dry=False).startswith("applied")
    assert verify(checkout, PATCHSET, None).startswith("exactly patched")
    assert apply(checkout, PATCHSET, None, dry=False).startswith("already applied")
    git(checkout.top, "add", "-u")
    assert git(checkout.top, "write-tree") == pin.tree_after
    git(checkout.top, "reset", "-q")
    for path in PATCHSET.overlay():
        assert not git(checkout.top, "ls-files", "--ignored", "--others", "--exclude-standard", "--", path), (
            f"slime's .gitignore hides {path}"
        )
    assert reverse(checkout, PATCHSET, None).startswith("reversed")
    assert whole_tree(checkout.top) == pin.tree_before


def test_git_apply_makes_the_same_tree(pin: Pin, slime_mirror: Path, tmp_path: Path) -> None:
    checkout = _clone(slime_mirror, tmp_path / "slime", pin)
    for patch in PATCHSET.series(pin):
        git(checkout.top, "apply", "--index", "--unidiff-zero", str(PATCHSET.folder / pin.name / patch.name))
    assert git(checkout.top, "write-tree") == pin.tree_after


def test_export_is_identical(pin: Pin, slime_mirror: Path, tmp_path: Path) -> None:
    copied = Patchset(tmp_path / "patches", PATCHSET.overlay_folder)
    for path in [PATCHSET.folder / "upstream.json", *(PATCHSET.folder / pin.name).iterdir()]:
        target = copied.folder / path.relative_to(PATCHSET.folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    checkout = _clone(slime_mirror, tmp_path / "slime", pin)
    apply(checkout, PATCHSET, None, dry=False)
    assert all(line.startswith("unchanged") for line in export(checkout, copied, pin.name))
    assert copied.pin(pin.name) == pin


@pytest.mark.parametrize(("of", "onto"), [(0, 1), (1, 0), (1, 2), (2, 1)])
def test_port_onto_the_neighbour(
    of: int, onto: int, slime_mirror: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    checkout = _clone(slime_mirror, tmp_path / "slime", PINS[onto])
    outcomes = port_patches(checkout, PINS[of], PATCHSET.series(PINS[of]))
    assert [outcome.patch.name for outcome in outcomes] == PATCHSET.series_names(PINS[of])
    conflicts = [outcome for outcome in outcomes if outcome.status == "conflict"]
    status = main(["apply", str(checkout.top), "--port", "--pin", PINS[of].name])
    said = capfd.readouterr()
    assert status == (1 if conflicts else 0), said.err
    for outcome in outcomes:
        assert f"{outcome}\n" in said.out
    for outcome in conflicts:
        assert all(re.search(r" lines \d+-\d+|is not at this commit", detail) for detail in outcome.details)
    for outcome in outcomes:
        for path, (before, _) in outcome.files.items():
            inserted = [
                line for file in outcome.patch.files if file.path == path for _, lines in file.hunks for line in lines
            ]
            text = (checkout.top / path).read_bytes()
            assert all(line in text for line in inserted)
            assert git(checkout.top, "rev-parse", f"HEAD:{path}") == before
            assert (b"<<<<<<<" in text) <= (outcome.status == "conflict")
