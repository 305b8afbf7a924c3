"""Carry a pin's patches to a commit that is no pin: a three-way merge per file, reported per patch.

The base is the pre-image blob that the patch records, theirs is that file with the lines inserted, ours is the file at
HEAD. All merging happens outside of the working tree; files are written only onto a clean one, and then all at once.
"""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from patchset_apply import Target, current_manifest, overlay_changes
from patchset_disk import Change, locked, missing_folders, read_file, transaction
from patchset_git import Checkout, Git, PatchsetError
from patchset_series import FilePatch, Patch, Patchset, Pin

_CONFLICT = re.compile(rb"^<<<<<<< .*?^>>>>>>> [^\n]*\n", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Outcome:
    """What became of one patch: clean (its own files, unchanged), merged or conflict, with file and lines."""

    patch: Patch
    status: str
    details: tuple[str, ...]
    files: dict[str, tuple[str, bytes]]

    def __str__(self) -> str:
        where = f": {'; '.join(self.details)}" if self.details else ""
        return f"{self.status:<8}  {self.patch.name}{where}"


def nearest_pin(checkout: Checkout, patchset: Patchset) -> tuple[Pin, int]:
    """The pin with the fewest commits between it and HEAD, and how many; it must be in the clone's history."""
    distances = {
        pin.name: int(checkout.git.text("rev-list", "--count", f"{pin.commit}...HEAD"))
        for pin in patchset.pins()
        if checkout.git.has(f"{pin.commit}^{{commit}}")
        and not checkout.git.attempt("merge-base", pin.commit, "HEAD").returncode
    }
    if not distances:
        raise PatchsetError(
            "no pin is in this clone's history: name one with --pin, or clone slime whole (fetch_slime.sh --full)"
        )
    name = min(distances, key=distances.__getitem__)
    return patchset.pin(name), distances[name]


def _merge(git: Git, ours: bytes, base: bytes, theirs: bytes, labels: tuple[str, str, str]) -> tuple[bytes, int]:
    with tempfile.TemporaryDirectory(prefix="slime-cross-job-") as folder:
        names = []
        for name, data in (("ours", ours), ("base", base), ("theirs", theirs)):
            Path(folder, name).write_bytes(data)
            names.append(str(Path(folder, name)))
        named = [part for label in labels for part in ("-L", label)]
        done = git.attempt("merge-file", "-p", "--marker-size=7", *named, *names)
    if done.returncode > 127:
        raise PatchsetError(f"git merge-file failed: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout, done.returncode


def _renamed(checkout: Checkout, pin: Pin, path: str) -> str:
    found = checkout.git.attempt("diff-tree", "-r", "-M", "--name-status", "--diff-filter=R", pin.commit, "HEAD")
    for line in found.stdout.decode(errors="replace").splitlines():
        _, old, new = line.split("\t")
        if old == path:
            return f", upstream has it as {new}"
    return ""


def _port_file(checkout: Checkout, pin: Pin, file: FilePatch) -> tuple[str, str, tuple[str, bytes] | None]:
    """(status, detail, (blob at HEAD, new bytes)) for one file."""
    entry = checkout.git.entry(checkout.tree, file.path)
    if entry is None:
        return "conflict", f"{file.path} is not at this commit{_renamed(checkout, pin, file.path)}", None
    if not checkout.git.has(file.before):
        raise PatchsetError(
            f"this clone lacks {file.path} as it is at {pin.name}:"
            f" git -C {checkout.top} fetch --depth 1 origin {pin.commit}"
        )
    base = checkout.git.output("cat-file", "blob", file.before)
    theirs = file.apply(base)
    if entry[1] == file.before:
        return "clean", "", (entry[1], theirs)
    ours = checkout.git.output("cat-file", "blob", entry[1])
    labels = (f"slime at {checkout.head[:12]}", f"slime at {pin.name}", f"patch of {pin.name}")
    data, conflicts = _merge(checkout.git, ours, base, theirs, labels)
    if not conflicts:
        return "merged", file.path, (entry[1], data)
    ranges = []
    for found in _CONFLICT.finditer(data):
        first = data.count(b"\n", 0, found.start()) + 1
        ranges.append(f"{first}-{first + found[0].count(bytes([10])) - 1}")
    return "conflict", f"{file.path} lines {', '.join(ranges)}", (entry[1], data)


def port_patches(checkout: Checkout, pin: Pin, patches: list[Patch]) -> list[Outcome]:
    """Try every patch of the pin at HEAD; nothing is written."""
    outcomes = []
    for patch in patches:
        tried = [(file.path, *_port_file(checkout, pin, file)) for file in patch.files]
        status = max((status for _, status, _, _ in tried), key=("clean", "merged", "conflict").index)
        details = tuple(detail for _, state, detail, _ in tried if detail and state == status)
        outcomes.append(Outcome(patch, status, details, {path: new for path, _, _, new in tried if new is not None}))
    return outcomes


def _in_the_way(checkout: Checkout, files: dict[str, tuple[str, bytes]]) -> str:
    """The name of a file that makes the working tree differ from HEAD, '' for a clean one."""
    with checkout.git.scratch() as scratch:
        changed = scratch.changed(checkout.tree, scratch.tracked(checkout.tree))
    for path, (before, _) in files.items():  # by bytes as well: git would not see other line endings
        if read_file(checkout, path) != checkout.git.output("cat-file", "blob", before):
            changed.append(path)
    return changed[0] if changed else ""


def port(checkout: Checkout, patchset: Patchset, pin_name: str | None, dry: bool) -> int:
    """Print what becomes of each patch, and write the result onto a clean tree; 1 where there are conflicts."""
    if current_manifest(checkout) is not None:
        raise PatchsetError("patches are applied to this checkout already: run with --reverse first")
    pin, between = (patchset.pin(pin_name), None) if pin_name else nearest_pin(checkout, patchset)
    patches, overlay = patchset.series(pin), patchset.overlay()
    outcomes = port_patches(checkout, pin, patches)
    far = "" if between is None else f", {between} commits apart"
    print(f"patches of pin {pin.name} at commit {checkout.head[:12]}{far}:")
    for outcome in outcomes:
        print(outcome, flush=True)
    files = {path: new for outcome in outcomes for path, new in outcome.files.items()}
    conflicts = sum(outcome.status == "conflict" for outcome in outcomes)
    if dry:
        return 1 if conflicts else 0
    dirty = _in_the_way(checkout, files)
    if dirty:
        found = f"{conflicts} of {len(outcomes)} patches conflict, and " if conflicts else ""
        raise PatchsetError(
            f"{found}nothing was written: {dirty} has changes of yours; commit them or undo them first"
        )
    changes = [Change(path, data) for path, (_, data) in files.items()]
    if conflicts:
        with locked(checkout), transaction(checkout, changes, None):
            pass
        raise PatchsetError(
            f"{conflicts} of {len(outcomes)} patches conflict: resolve the markers and export the patches for a new"
            f" pin (patches/README.md); to undo: git checkout -- {' '.join(files)}"
        )
    changes += overlay_changes(checkout, overlay, None, adopt=False)
    manifest = Target(pin, patches, files, overlay).manifest(checkout, missing_folders(checkout, changes))
    with locked(checkout), transaction(checkout, changes, manifest):
        pass
    print(f"ported: {len(files)} patched files and {len(overlay)} overlay files; --reverse takes them out again")
    return 0
