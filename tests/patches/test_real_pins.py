"""The real patches: the policy that they keep, and apply and reverse on clones of upstream slime at every pin."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from patchset.__main__ import main
from patchset.git import Git
from patchset.merge import names_of_pins
from patchset.series import Patchset
from tests.patches.toy_upstream import ROOT, git, whole_tree

PATCHES = ROOT / "patches"
PINS = json.loads((PATCHES / "upstream.json").read_text())["pins"]
MOST_PATCHES, MOST_LINES = 6, 40


@pytest.fixture(params=PINS, ids=lambda pin: pin["name"])
def pin(request: pytest.FixtureRequest) -> dict[str, Any]:
    return request.param


def _clone(mirror: Path, folder: Path, pin: dict[str, Any]) -> str:
    git(folder.parent, "clone", "-q", "--shared", "--no-checkout", str(mirror), str(folder))
    git(folder, "checkout", "-q", "--detach", pin["commit"])
    return str(folder)


def _series(pin: dict[str, Any]) -> dict[str, str]:
    """The text of each patch by name, in order."""
    folder = PATCHES / pin["name"]
    names = [line for line in (folder / "series").read_text().splitlines() if not line.startswith("#")]
    return {name: (folder / name).read_text() for name in names}


def _inserted(text: str) -> list[str]:
    return re.findall(r"^\+(?!\+\+ b/)(.*)$", text, re.MULTILINE)


def test_the_series_keeps_the_policy(pin: dict[str, Any]) -> None:
    series = _series(pin)  # that they hold headers and inserted lines only: see the count
    assert {path.name for path in (PATCHES / pin["name"]).iterdir()} == {*series, "series"}
    assert all(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*\.patch", name) for name in series), "a few words, with dashes"
    assert len(series) <= MOST_PATCHES
    assert sum(len(_inserted(text)) for text in series.values()) <= MOST_LINES


def test_the_same_subject_has_the_same_name_in_every_pin() -> None:
    pairs = {(text.splitlines()[0], name) for pin in PINS for name, text in _series(pin).items()}
    assert len({subject for subject, _ in pairs}) == len({name for _, name in pairs}) == len(pairs), sorted(pairs)


def test_the_readme_has_the_count() -> None:
    names = [pin["name"] for pin in PINS]
    lines: dict[str, dict[str, int]] = {}
    for pin in PINS:
        for text in _series(pin).values():
            subject = text.splitlines()[0].removeprefix("Subject: ")
            lines.setdefault(subject, {})[pin["name"]] = len(_inserted(text))
    rows = [["patch", *names], ["---", *("--:" for _ in names)]]
    rows += [[subject, *(str(of.get(name, "-")) for name in names)] for subject, of in lines.items()]
    sums = [[of[name] for of in lines.values() if name in of] for name in names]
    rows.append(["**patches, inserted lines**", *(f"{len(counts)}, {sum(counts)}" for counts in sums)])
    table = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    assert f"\n\n{table}\n" in (PATCHES / "README.md").read_text(), f"write this into patches/README.md:\n{table}"


def test_apply_verify_reverse(
    pin: dict[str, Any], slime_mirror: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    slime = _clone(slime_mirror, tmp_path / "slime", pin)
    assert whole_tree(Path(slime)) == pin["tree_before"]
    for options, said in (
        (["--check"], "would write"),
        (["--reverse"], "not applied"),
        ([], "applied"),
        (["--verify"], "exactly patched"),
        ([], "already applied"),
    ):
        capfd.readouterr()
        assert main(["apply", slime, *options]) == 0
        assert capfd.readouterr().out.startswith(said)
    git(Path(slime), "add", "-u")
    assert git(Path(slime), "write-tree") == pin["tree_after"]
    git(Path(slime), "reset", "-q")
    new = git(Path(slime), "ls-files", "--others")
    assert new == git(Path(slime), "ls-files", "--others", "--exclude-standard"), "slime's .gitignore hides files"
    assert not re.findall(r".*\.(?:png|svg|jpg|gif)$", new, re.MULTILINE), "pictures belong to docs/"
    assert main(["apply", slime, "--reverse"]) == 0
    assert whole_tree(Path(slime)) == pin["tree_before"]


def test_git_apply_makes_the_same_tree(pin: dict[str, Any], slime_mirror: Path, tmp_path: Path) -> None:
    slime = Path(_clone(slime_mirror, tmp_path / "slime", pin))
    for name in _series(pin):
        git(slime, "apply", "--index", "--unidiff-zero", str(PATCHES / pin["name"] / name))
    assert git(slime, "write-tree") == pin["tree_after"]


def test_export_is_identical(
    pin: dict[str, Any], slime_mirror: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    copied = tmp_path / "patches"
    shutil.copytree(PATCHES, copied)
    slime = _clone(slime_mirror, tmp_path / "slime", pin)
    assert main(["apply", slime]) == 0
    capfd.readouterr()
    assert main(["export", "--patches", str(copied), slime, pin["name"]]) == 0
    assert all(line.startswith("unchanged") for line in capfd.readouterr().out.splitlines())
    for path in (path for path in PATCHES.rglob("*") if path.is_file()):
        assert (copied / path.relative_to(PATCHES)).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(("of", "onto"), [(0, 1), (1, 0), (1, 2), (2, 1), (2, 3)])
def test_port_onto_the_neighbour(
    of: int, onto: int, slime_mirror: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    slime = Path(_clone(slime_mirror, tmp_path / "slime", PINS[onto]))
    status = main(["apply", str(slime), "--port", "--pin", PINS[of]["name"]])
    said = capfd.readouterr()
    told = dict(re.findall(r"^(?:clean|merged|conflict) +(\S+\.patch)(.*)$", said.out, re.MULTILINE))
    series = _series(PINS[of])
    assert list(told) == list(series)
    conflicts = re.findall(r"^conflict +.*$", said.out, re.MULTILINE)
    assert status == (1 if conflicts else 0), said.err
    assert all(re.search(r" lines \d+-\d+|is not at this commit", line) for line in conflicts)
    for name, text in series.items():
        for path in re.findall(r"^\+\+\+ b/(\S+)$", text, re.MULTILINE):
            if f"{path} is not at this commit" in told[name]:
                continue
            merged = (slime / path).read_text()
            part = text.partition(f"+++ b/{path}\n")[2].partition("diff --git")[0]
            assert all(f"{line}\n" in merged for line in _inserted(part))
            assert ("<<<<<<< " in merged) == (f"{path} lines " in told[name])


def test_names_that_moved_in_slime_end_a_port(
    slime_mirror: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """As the patches of v0.3.1 met the commit of pin main: all merge, and the rollout job would die of an import."""
    overlay = tmp_path / "overlay"
    shutil.copytree(ROOT / "slime_overlay", overlay)
    driver = overlay / "slime/cross_job/adapter/rollout_driver.py"
    text = driver.read_text()
    assert 'of_slime("init_tracking")(args)' in text
    driver.write_text(text + "\n\ndef _old():\n    from slime.utils.logging_utils import init_tracking\n")
    slime = Path(_clone(slime_mirror, tmp_path / "slime", PINS[3]))
    told = []
    for options in (["--check"], []):
        assert main(["apply", str(slime), "--overlay", str(overlay), "--port", "--pin", "v0.3.1", *options]) == 1
        told.append(capfd.readouterr())
        assert whole_tree(slime) == PINS[3]["tree_before"], "nothing is written"
    assert told[0] == told[1]
    assert "conflict" not in told[0].out
    name = "slime.utils.logging_utils.init_tracking"
    where = f"{len(text.splitlines()) + 4}"
    moved = "was in slime/utils/logging_utils.py, is in slime.observability.logging_utils now"
    assert f"missing   {name}: {moved}; wanted by {driver.relative_to(overlay)}:{where}\n" in told[0].out
    assert told[0].err.startswith("error: 1 names of slime are not as cross-job wants them")
    assert main(["apply", str(slime), "--overlay", str(overlay), "--port", "--pin", "v0.3.1", "--anyway"]) == 0
    assert main(["apply", str(slime), "--overlay", str(overlay), "--reverse"]) == 0
    assert whole_tree(slime) == PINS[3]["tree_before"]


def test_the_table_of_names_is_that_of_the_code(slime_mirror: Path) -> None:
    made = names_of_pins(Git(slime_mirror), Patchset(PATCHES, ROOT / "slime_overlay"))
    wrong = f"write what `python3 scripts/patchset names {slime_mirror}` prints into patches/names.md"
    assert made in (PATCHES / "names.md").read_text(), wrong
