"""Apply, check, verify and reverse the patch set on a slime checkout.

Everything is worked out before the first file is touched: the bytes of every file that will be written are known, and
so is the tree that they make. A file that is neither slime's nor ours as recorded is an error that names it; the
user's other changes are left alone. The user's index is never written to.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass

from patchset_disk import (
    Change,
    Manifest,
    locked,
    missing_folders,
    read_file,
    read_manifest,
    refuse_unwritable,
    transaction,
)
from patchset_git import Checkout, PatchsetError, blob_id
from patchset_series import OverlayFile, Patch, Patchset, Pin


@dataclass(frozen=True)
class Target:
    """What a checkout shall hold: per patched file (blob before, bytes after), and the overlay."""

    pin: Pin
    patches: list[Patch]
    files: Mapping[str, tuple[str, bytes]]
    overlay: Mapping[str, OverlayFile]

    def manifest(self, checkout: Checkout, folders: list[str]) -> Manifest:
        """The manifest of having applied this."""
        return Manifest(
            pin=self.pin.name,
            head=checkout.head,
            patches={patch.name: patch.digest for patch in self.patches},
            files={path: [before, blob_id(after)] for path, (before, after) in self.files.items()},
            overlay={path: file.digest for path, file in self.overlay.items()},
            folders=folders,
        )


def find_pin(checkout: Checkout, patchset: Patchset, name: str | None) -> Pin:
    """The pin that is checked out; PatchsetError lists the pins where it is none, or not the one asked for."""
    known = ", ".join(f"{pin.name} ({pin.commit[:12]})" for pin in patchset.pins())
    if name is not None:
        pin = patchset.pin(name)
        # By tree as well: a copy in another history is the pin too.
        if checkout.head != pin.commit and checkout.tree != pin.tree_before:
            raise PatchsetError(
                f"HEAD is {checkout.head[:12]} and not pin {name} ({pin.commit[:12]}):"
                " check that commit out, or use --port"
            )
        return pin
    for pin in patchset.pins():
        if pin.commit == checkout.head:
            return pin
    raise PatchsetError(
        f"commit {checkout.head[:12]} is none of the pins {known}:"
        " check one out (scripts/fetch_slime.sh), or use --port"
    )


def build_target(checkout: Checkout, patchset: Patchset, pin: Pin) -> Target:
    """Work out what the checkout shall hold, and hold it against the tree that was recorded for the pin."""
    patches = patchset.series(pin)
    overlay = patchset.overlay()
    files: dict[str, tuple[str, bytes]] = {}
    for patch in patches:
        for file in patch.files:
            entry = checkout.git.entry(checkout.tree, file.path)
            if entry is None or entry[1] != file.before:
                raise PatchsetError(
                    f"{pin.name}/{patch.name} is not made for {file.path} of this commit: export it again"
                )
            files[file.path] = (file.before, file.apply(checkout.git.output("cat-file", "blob", file.before)))
    for path in overlay:
        if checkout.git.entry(checkout.tree, path):
            raise PatchsetError(f"{path} of the overlay is a file of slime itself: rename it in the overlay")
    with checkout.git.scratch() as scratch:
        tree = scratch.tree_with(checkout.tree, {path: after for path, (_, after) in files.items()})
    if tree != pin.tree_after:
        raise PatchsetError(
            f"the patches of {pin.name} give tree {tree[:12]} and {str(pin.tree_after)[:12]} is recorded:"
            " run scripts/patchset.py record if the patches are meant to have changed"
        )
    return Target(pin, patches, files, overlay)


def file_state(checkout: Checkout, path: str, before: str, afters: set[str]) -> str:
    """'out' or 'in': whether the working tree's file is slime's or patched; PatchsetError where it is neither."""
    data = read_file(checkout, path)
    if data is None:
        raise PatchsetError(f"{path} is missing from the checkout: restore it with git checkout -- {path}")
    if blob_id(data) == before:
        return "out"
    if blob_id(data) in afters:
        return "in"
    if b"\r\n" in data and blob_id(data.replace(b"\r\n", b"\n")) in {before, *afters}:
        raise PatchsetError(f"{path} has CRLF line endings: clone slime again with git clone -c core.autocrlf=false")
    raise PatchsetError(
        f"{path} has changes of yours: commit them elsewhere or undo them (git checkout -- {path}) first"
    )


def _patch_states(checkout: Checkout, target: Target, old: Manifest | None) -> dict[str, str]:
    """State per patched file, the files of an older patch set included; PatchsetError where patches are half in."""
    states = {}
    for path in {**target.files, **(old.files if old else {})}:
        afters = old.left(path) if old and path in old.files else set()
        if path in target.files:
            before, after = target.files[path]
            states[path] = file_state(checkout, path, before, {*afters, blob_id(after)})
        elif old:
            states[path] = file_state(checkout, path, old.files[path][0], afters)
    together = old.files if old else target.files
    inside, outside = ([path for path in together if states[path] == which] for which in ("in", "out"))
    if inside and outside and (old is None or old.complete):
        raise PatchsetError(
            f"half-applied: {_names(target, inside)} in, {_names(target, outside)} not:"
            f" restore with git checkout -- {' '.join(inside)}, then apply again"
        )
    return states


def _names(target: Target, paths: list[str]) -> str:
    owner = {file.path: patch.name for patch in target.patches for file in patch.files}
    return ", ".join(dict.fromkeys(f"{owner.get(path, 'an older patch')} ({path})" for path in paths))


def overlay_changes(
    checkout: Checkout, overlay: Mapping[str, OverlayFile], old: Manifest | None, adopt: bool
) -> list[Change]:
    """What to do so that the overlay is there; PatchsetError for a file in the way that is not as we left it.

    `old` says what was applied before; `adopt` takes a file for ours that is byte for byte the overlay's.
    """
    changes = []
    ours = {path: old.left(path) for path in old.overlay_paths()} if old else {}
    for path in sorted({*overlay, *ours}):
        wanted = overlay.get(path)
        data = read_file(checkout, path)
        have = None if data is None else OverlayFile(data, False).digest
        if have == (wanted.digest if wanted else None) and (adopt or have is None or path in ours):
            continue
        if have is not None and path not in ours:
            raise PatchsetError(f"{path} exists already and is not ours: move it away, then apply again")
        if have is not None and have not in ours[path]:
            raise PatchsetError(f"{path} was edited after apply: save your edit elsewhere and remove the file first")
        if wanted or have is not None:
            changes.append(Change(path, wanted.data if wanted else None, wanted.executable if wanted else None))
    return changes


def current_manifest(checkout: Checkout) -> Manifest | None:
    """The manifest, unless everything of it was undone by hand with git checkout and git clean."""
    manifest = read_manifest(checkout.git)
    if manifest is None or any((checkout.top / path).exists() for path in manifest.overlay_paths()):
        return manifest
    files = {path: read_file(checkout, path) for path in manifest.files}
    patched = any(data is not None and blob_id(data) in manifest.left(path) for path, data in files.items())
    return manifest if patched else None


def plan_apply(checkout: Checkout, target: Target, old: Manifest | None) -> tuple[list[Change], Manifest]:
    """The changes that make the checkout the target, and its manifest; none where all is as it shall be."""
    if old is not None and old.head != checkout.head:
        raise PatchsetError(
            f"the patches of {old.pin} were applied at commit {old.head[:12]} and HEAD is {checkout.head[:12]} now:"
            " run with --reverse first, then apply"
        )
    states = _patch_states(checkout, target, old)
    changes = []
    for path in states:
        after = target.files[path][1] if path in target.files else None
        wanted = checkout.git.output("cat-file", "blob", f"{checkout.tree}:{path}") if after is None else after
        if read_file(checkout, path) != wanted:
            changes.append(Change(path, wanted))
    applied = set(states.values()) == {"in"}
    changes += overlay_changes(checkout, target.overlay, old, adopt=applied or old is not None)
    folders = {*(old.folders if old else []), *missing_folders(checkout, changes)}
    return changes, target.manifest(checkout, sorted(folders))


def mismatches(checkout: Checkout, target: Target) -> list[str]:
    """What differs from an exactly patched checkout, tracked files and overlay."""
    wrong = {}
    for path, (before, after) in target.files.items():
        try:
            if file_state(checkout, path, before, {blob_id(after)}) == "out":
                wrong[path] = f"{path} is not patched"
        except PatchsetError as error:
            wrong[path] = str(error)
    with checkout.git.scratch() as scratch:
        expected = scratch.tree_with(checkout.tree, {path: after for path, (_, after) in target.files.items()})
        for path in scratch.changed(expected, scratch.tracked(checkout.tree)):
            wrong.setdefault(path, f"{path} was changed")
    left = read_manifest(checkout.git)
    for path in sorted({*target.overlay, *(left.overlay if left else {})}):
        data = read_file(checkout, path)
        if path not in target.overlay:
            wrong.update({path: f"{path} is left from an older overlay"} if data is not None else {})
        elif data is None:
            wrong[path] = f"{path} of the overlay is missing"
        elif data != target.overlay[path].data:
            wrong[path] = f"{path} differs from the overlay"
    return list(wrong.values())


def apply(checkout: Checkout, patchset: Patchset, pin_name: str | None, dry: bool) -> str:
    """Apply the pin's patches and the overlay; returns what was done, or would be done where `dry`."""
    target = build_target(checkout, patchset, find_pin(checkout, patchset, pin_name))
    old = current_manifest(checkout)
    changes, manifest = plan_apply(checkout, target, old)
    overlay = [change for change in changes if change.path in target.overlay]
    what = f"{len(changes) - len(overlay)} patched files, {len(overlay)} overlay files"
    if dry:
        refuse_unwritable(checkout, changes)
        return (
            f"would write {what} for pin {target.pin.name}" if changes else f"already applied: pin {target.pin.name}"
        )
    with locked(checkout), transaction(checkout, changes, manifest, old):
        for path, (_, after) in target.files.items():
            if read_file(checkout, path) != after:
                raise PatchsetError(f"{path} is not what was written to it: is another program editing the checkout?")
        for path, file in target.overlay.items():
            if read_file(checkout, path) != file.data:
                raise PatchsetError(f"{path} is not what was written to it: is another program editing the checkout?")
    return f"applied pin {target.pin.name}: {what}" if changes else f"already applied: pin {target.pin.name}"


def verify(checkout: Checkout, patchset: Patchset, pin_name: str | None) -> str:
    """Say that the checkout is exactly patched; PatchsetError names what is not."""
    target = build_target(checkout, patchset, find_pin(checkout, patchset, pin_name))
    wrong = mismatches(checkout, target)
    if wrong:
        more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
        raise PatchsetError(f"not exactly patched: {'; '.join(wrong[:3])}{more}")
    return f"exactly patched: pin {target.pin.name}, tree {target.pin.tree_after}, {len(target.overlay)} overlay files"


def _lost_manifest(checkout: Checkout, patchset: Patchset, pin_name: str | None) -> Manifest | None:
    """What a checkout without a manifest has applied: all, or nothing (None)."""
    target = build_target(checkout, patchset, find_pin(checkout, patchset, pin_name))
    if set(_patch_states(checkout, target, None).values()) == {"out"}:
        return None
    overlay_changes(checkout, target.overlay, None, adopt=True)  # refuses files that are not byte for byte ours
    return target.manifest(checkout, [])


def reverse(checkout: Checkout, patchset: Patchset, pin_name: str | None, dry: bool = False) -> str:
    """Take the patches and the overlay out again, as the manifest says; an edit of the user is an error."""
    manifest = read_manifest(checkout.git) or _lost_manifest(checkout, patchset, pin_name)
    if manifest is None:
        return "not applied: nothing to reverse"
    changes = []
    for path, (before, _) in manifest.files.items():
        if file_state(checkout, path, before, manifest.left(path)) == "in":
            changes.append(Change(path, checkout.git.output("cat-file", "blob", before)))
    changes += overlay_changes(checkout, {}, manifest, adopt=False)
    if dry:
        return f"would restore or remove {len(changes)} files of pin {manifest.pin}"
    with locked(checkout), transaction(checkout, changes, None, manifest):
        pass
    for folder in sorted(manifest.folders, reverse=True):
        _remove_folder(checkout, folder)
    return f"reversed pin {manifest.pin}: {len(changes)} files"


def _remove_folder(checkout: Checkout, folder: str) -> None:
    """Remove a folder that we made, unless something of the user's is in it; Python's caches of our files go too."""
    path = checkout.top / folder
    if path.is_dir() and all(child.name == "__pycache__" for child in path.iterdir()):
        shutil.rmtree(path, ignore_errors=True)
