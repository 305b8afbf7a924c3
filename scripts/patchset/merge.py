"""A pin's patches at a commit that is no pin: a three-way merge per file, and a look at the names of slime in use.

The base is the pre-image that the patch records, theirs is that file with the lines inserted, ours is the file at
HEAD. All of it happens outside of the working tree.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import NamedTuple

from .checkout import Checkout
from .git import Git, PatchsetError
from .names import Slime, Verdict, Wanted, compare, table
from .series import FilePatch, Patchset, Pin, patched_files


def near_pins(git: Git, pins: list[Pin]) -> dict[Pin, int]:
    """Of these pins the nearest to HEAD, and the nearest one below HEAD, with the number of commits between.

    Raises:
        PatchsetError: none is in the clone's history.
    """
    found: dict[Pin, int] = {}
    for how in ((), ("--is-ancestor",)):
        there = [pin for pin in pins if not git.attempt("merge-base", *how, pin.commit, "HEAD").returncode]
        far = {pin: int(git.text("rev-list", "--count", f"{pin.commit}...HEAD")) for pin in there}
        found |= dict(sorted(far.items(), key=lambda item: item[1])[:1])
    if not found:
        raise PatchsetError("no pin is in this clone's history: use --pin, or fetch all of it (fetch_slime.sh --full)")
    return found


def _merge(checkout: Checkout, pin: Pin, file: FilePatch, theirs: bytes) -> tuple[str, str, bytes | None]:
    """(status, detail, merged bytes) of one file."""
    git, head = checkout.git, checkout.files.get(file.path)
    if head is None:
        renames = git.attempt("diff-tree", "-r", "-M", "--name-status", "--diff-filter=R", pin.commit, "HEAD").stdout
        lines = [line.split("\t") for line in renames.decode(errors="replace").splitlines()]
        moved = "".join(f", upstream has it as {new}" for _, old, new in lines if old == file.path)
        return "conflict", f"{file.path} is not at this commit{moved}", None
    if head == file.before:
        return "clean", "", theirs
    with tempfile.TemporaryDirectory(prefix="slime-cross-job-") as folder:
        names = [f"slime at {checkout.head[:12]}", f"slime at {pin.name}", f"patch of {pin.name}"]  # in the markers
        blobs = (git.output("cat-file", "blob", blob) for blob in (head, file.before))
        for name, data in zip(names, (*blobs, theirs)):
            Path(folder, name).write_bytes(data)
        done = Git(Path(folder)).attempt("merge-file", "-p", "--marker-size=7", *names)
    if done.returncode > 127:
        raise PatchsetError(f"git merge-file failed: {done.stderr.decode(errors='replace').strip()}")
    merged = enumerate(done.stdout.split(b"\n"), 1)
    marks = [str(number) for number, line in merged if line.startswith((b"<<<<<<< ", b">>>>>>> "))]
    where = ", ".join(map("-".join, zip(marks[::2], marks[1::2])))
    return ("conflict", f"{file.path} lines {where}", done.stdout) if where else ("merged", file.path, done.stdout)


class Merged(NamedTuple):
    """The patched files as they are at HEAD (with markers, where they conflict), what is to be said of each patch, and
    how many of them conflict."""

    files: dict[str, bytes]
    lines: list[str]
    conflicts: int


def merge(checkout: Checkout, patchset: Patchset, pin: Pin) -> Merged:
    """Carry the patches of a pin to HEAD; PatchsetError: the clone lacks what they were made for."""
    patches = patchset.series(pin)
    for file in (file for patch in patches for file in patch.files):
        if checkout.git.attempt("cat-file", "-e", file.before).returncode:
            raise PatchsetError(
                f"this clone lacks {file.path} as it is at {pin.name}: {_fetching(checkout, patchset, pin)}"
            )
    patched = patched_files(checkout.git, patches)
    files: dict[str, bytes] = {}
    lines, conflicts = [], 0
    for patch in patches:
        tried = {file.path: _merge(checkout, pin, file, patched[file.path]) for file in patch.files}
        status = max((status for status, _, _ in tried.values()), key=("clean", "merged", "conflict").index)
        details = "; ".join(detail for one, detail, _ in tried.values() if detail and one == status)
        lines.append(f"{status:<8}  {patch.name}{details and ': '}{details}")
        files |= {path: data for path, (_, _, data) in tried.items() if data is not None}
        conflicts += status == "conflict"
    return Merged(files, lines, conflicts)


def names_of_pins(git: Git, patchset: Patchset) -> str:
    """The table of names.md, by a clone that has all pins."""
    overlay = {path: file.data for path, file in patchset.overlay().items()}
    return table(Wanted.read(overlay), {pin.name: Slime.read(git.python_files(pin.commit)) for pin in patchset.pins()})


def names_lost(checkout: Checkout, patchset: Patchset, pin: Pin) -> Verdict:
    """What HEAD lacks, or has in another way, of the names of slime that the overlay uses and the pin has."""
    trees = [tree for tree in (f"{pin.commit}^{{tree}}", pin.tree_before) if tree]
    tree = next((one for one in trees if not checkout.git.attempt("cat-file", "-e", one).returncode), None)
    if tree is None:
        fetching = _fetching(checkout, patchset, pin)
        raise PatchsetError(f"this clone lacks pin {pin.name}, to compare names with: {fetching}")
    overlay = {path: file.data for path, file in patchset.overlay().items()}
    at_pin, head = (Slime.read(checkout.git.python_files(one)) for one in (tree, "HEAD"))
    return compare(Wanted.read(overlay), at_pin, head)


def _fetching(checkout: Checkout, patchset: Patchset, pin: Pin) -> str:
    """The command that brings a pin; it makes no clone shallow that is not."""
    shallow = checkout.git.text("rev-parse", "--is-shallow-repository") == "true"
    url = patchset.upstream()["url"]
    return f"git -C {checkout.top} fetch {'--depth 1 ' if shallow else ''}{url} {pin.commit}"
