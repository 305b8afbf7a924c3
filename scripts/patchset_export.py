"""Write the patches of a pin anew from an edited checkout, and count them for the README's table.

A patch file owns the files that its diff names. Its header stays as it is, byte for byte; the diff is made anew from
what the working tree holds. Exporting what apply made gives identical files. To begin a patch, or to give it one more
file, write the header and a line `diff --git a/FILE b/FILE` for each file that it shall own.
"""

from __future__ import annotations

from pathlib import Path

from patchset_disk import read_file
from patchset_git import Checkout, PatchsetError
from patchset_series import FIELDS, Patchset, Pin, named_files, parse_patch, split_header

BEGIN, END = "<!-- counted by scripts/patchset.py count -->", "<!-- end of the count -->"


def _owners(patchset: Patchset, pin: Pin) -> tuple[dict[str, str], dict[str, bytes]]:
    """(patch per owned file, header per patch) of a series; PatchsetError for a file with two owners."""
    owner: dict[str, str] = {}
    headers: dict[str, bytes] = {}
    for name in patchset.series_names(pin):
        path = patchset.folder / pin.name / name
        if not path.is_file():
            raise PatchsetError(f"{path} is in the series and does not exist: write its header and `diff --git` lines")
        headers[name], diff = split_header(path.read_bytes(), f"{pin.name}/{name}")
        for file in named_files(diff):
            if owner.setdefault(file, name) != name:
                raise PatchsetError(f"{pin.name}: {owner[file]} and {name} both name {file}: one patch must own it")
    return owner, headers


def export(checkout: Checkout, patchset: Patchset, pin_name: str) -> list[str]:
    """Export every patch of the pin's series and record the tree; writes nothing if any breaks the policy."""
    pin = patchset.pin(pin_name)
    if checkout.head != pin.commit:
        raise PatchsetError(
            f"HEAD is {checkout.head[:12]} and not {pin.commit[:12]} of pin {pin_name}: check that commit out"
        )
    owner, headers = _owners(patchset, pin)
    files = {}
    for path in owner:
        data = read_file(checkout, path)
        if data is None:
            raise PatchsetError(
                f"{path} is missing from the checkout and {owner[path]} names it: restore it, or the name"
            )
        files[path] = data
    said, written = [], {}
    with checkout.git.scratch() as scratch:
        for path in scratch.changed(checkout.tree, scratch.tracked(checkout.tree)):
            if path not in owner:
                raise PatchsetError(
                    f"{path} is changed and no patch names it: add `diff --git a/{path} b/{path}` to one"
                )
        after = scratch.tree_with(checkout.tree, files)
        for name, header in headers.items():
            diff = scratch.diff(checkout.tree, after, [path for path in owner if owner[path] == name])
            data = header + diff
            patch = parse_patch(name, data, f"{pin.name}/{name}")
            target = patchset.folder / pin.name / name
            state = "unchanged" if target.read_bytes() == data else "exported"
            said.append(f"{state}  {name}: {patch.inserted} lines into {len(patch.files)} files")
            written[target] = data
    for target, data in written.items():
        target.write_bytes(data)
    patchset.write_trees(pin.name, checkout.tree, after)
    return said


def count(patchset: Patchset) -> str:
    """The README's table: inserted lines per patch and pin, and the sums."""
    pins = patchset.pins()
    lines: dict[str, dict[str, int]] = {}
    for pin in pins:
        for patch in patchset.series(pin):
            lines.setdefault(patch.fields[FIELDS[0]], {})[pin.name] = patch.inserted
    rows = [["patch", *(pin.name for pin in pins)], ["---", *("--:" for _ in pins)]]
    rows += [[subject, *(str(of.get(pin.name, "-")) for pin in pins)] for subject, of in lines.items()]
    of_pin = [[of[pin.name] for of in lines.values() if pin.name in of] for pin in pins]
    rows.append(["**patches, inserted lines**", *(f"{len(counts)}, {sum(counts)}" for counts in of_pin)])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def update_readme(readme: Path, table: str) -> None:
    """Put the table between the two marks of the README."""
    before, begin, rest = readme.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise PatchsetError(f"{readme} lacks the lines {BEGIN!r} and {END!r}: the table goes between them")
    readme.write_text(f"{before}{BEGIN}\n\n{table}\n{END}{after}")
