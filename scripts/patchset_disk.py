"""What the patch tools leave on disk: the manifest of what was applied, and changes that happen all or not at all.

The manifest lies in git's own folder, so that no tree hash sees it. It is written before the first file is touched
(`complete` is false then) and again at the end: after a kill -9 in the middle, the next apply completes the work and
--reverse undoes it. An error in the middle, an interrupt included, puts every file back as it was.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath

from patchset_git import Checkout, Git, PatchsetError

_NAME = "slime-cross-job.json"
_FORMAT = 1


@dataclass(frozen=True)
class Manifest:
    """What was applied: per patched file its blob before and after, per overlay file its SHA-256."""

    pin: str
    head: str
    patches: dict[str, str]
    files: dict[str, list[str]]
    overlay: dict[str, str]
    folders: list[str] = field(default_factory=list)
    complete: bool = True
    replaced: dict[str, str] = field(default_factory=dict)  # while incomplete: what an update finds under these paths
    format: int = _FORMAT

    def left(self, path: str) -> set[str]:
        """The digests under which we may have left this path: blobs of patched files, SHA-256 of overlay files."""
        ours = self.files[path][1] if path in self.files else self.overlay.get(path)
        return {digest for digest in (ours, self.replaced.get(path)) if digest}

    def overlay_paths(self) -> set[str]:
        """All paths where an overlay file of ours may lie."""
        return {*self.overlay, *(path for path in self.replaced if path not in self.files)}


def read_manifest(git: Git) -> Manifest | None:
    """The manifest of this checkout, None where nothing was applied."""
    path = git.path(_NAME)
    if not path.exists():
        return None
    try:
        manifest = Manifest(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise PatchsetError(
            f"{path} is damaged ({error}): restore the checkout with git, and remove that file"
        ) from error
    if manifest.format != _FORMAT:
        raise PatchsetError(f"{path} was written by another version of slime cross-job: reverse it with that version")
    return manifest


@dataclass(frozen=True)
class Change:
    """One file to be written (data) or removed (None); executable None keeps the mode that the file has."""

    path: str
    data: bytes | None
    executable: bool | None = None


def read_file(checkout: Checkout, path: str) -> bytes | None:
    """The bytes of a file of the working tree, None where there is nothing; PatchsetError for anything but a file."""
    target = checkout.top / path
    if not target.parent.resolve().is_relative_to(checkout.top):
        raise PatchsetError(f"{target.parent} leads out of the checkout: replace that link with a folder")
    for parent in target.relative_to(checkout.top).parents:
        if (checkout.top / parent).exists() and not (checkout.top / parent).is_dir():
            raise PatchsetError(f"{parent} is in the way: it is a file of yours where a folder must be; move it away")
    if not os.path.lexists(target):
        return None
    if target.is_symlink() or not target.is_file():
        raise PatchsetError(f"{path} is in the way: it is not a plain file; move it away")
    try:
        return target.read_bytes()
    except OSError as error:
        raise PatchsetError(f"cannot read {path}: {error.strerror}; make it readable") from error


def missing_folders(checkout: Checkout, changes: list[Change]) -> list[str]:
    """Folders that writing the files will make, the outermost first."""
    parents = {
        parent for change in changes if change.data is not None for parent in PurePosixPath(change.path).parents
    }
    return sorted(str(parent) for parent in parents if not (checkout.top / parent).exists())


def refuse_unwritable(checkout: Checkout, changes: list[Change]) -> None:
    """PatchsetError names a folder that the changes need and that may not be written to."""
    for change in changes:
        folder = (checkout.top / change.path).parent
        while not folder.exists():
            folder = folder.parent
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PatchsetError(f"no permission to write into {folder}: run as the owner of the checkout")


def _temporary(target: Path) -> Path:
    return target.with_name(f".{target.name}.slime-cross-job.tmp")  # a fixed name: a later run replaces a left-over


def _write(target: Path, data: bytes, mode: int) -> None:
    temporary = _temporary(target)
    temporary.write_bytes(data)
    temporary.chmod(mode)
    temporary.replace(target)


@contextlib.contextmanager
def locked(checkout: Checkout) -> Iterator[None]:
    """One apply or reverse at a time on a checkout; the second is refused."""
    path = checkout.git.path("slime-cross-job.lock")
    try:
        handle = path.open("w")
    except OSError as error:
        raise PatchsetError(f"no permission to write into {path.parent}: run as the owner of the checkout") from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise PatchsetError(f"another apply works on {checkout.top}: wait until it is done") from error
        yield


@contextlib.contextmanager
def transaction(
    checkout: Checkout, changes: list[Change], manifest: Manifest | None, old: Manifest | None = None
) -> Iterator[None]:
    """Make the changes and keep the manifest (None: remove it), or on any error leave all as it was.

    `old` is the manifest that an update or a reverse replaces.

    The body of the `with` is the place to check the result: what it raises also puts everything back.
    """
    refuse_unwritable(checkout, changes)
    path = checkout.git.path(_NAME)
    old_manifest = path.read_bytes() if path.exists() else None
    undo: list[tuple[Path, bytes | None, int]] = []
    made: list[Path] = []
    try:
        if manifest is not None and changes:
            patched = {name: after for name, (_, after) in old.files.items()} if old else {}
            replaced = {**old.replaced, **patched, **old.overlay} if old else {}
            _keep(path, replace(manifest, complete=False, replaced=replaced))
        for folder in missing_folders(checkout, changes):
            (checkout.top / folder).mkdir()
            made.append(checkout.top / folder)
        for change in changes:
            target = checkout.top / change.path
            exists = target.exists()
            mode = target.stat().st_mode & 0o777 if exists else 0o644
            undo.append((target, target.read_bytes() if exists else None, mode))
            if change.data is None:
                target.unlink()
            else:
                if change.executable is not None:
                    mode = mode | 0o111 if change.executable else mode & ~0o111
                _write(target, change.data, mode)
        yield
        if manifest is not None:
            _keep(path, manifest)
        else:
            path.unlink(missing_ok=True)
    except BaseException as error:
        left = _roll_back(undo, made, path, old_manifest)
        if left:
            raise PatchsetError(
                f"{error}; and could not put back {', '.join(left)}: restore with git checkout"
            ) from error
        if isinstance(error, OSError):
            where = error.filename or checkout.top
            raise PatchsetError(f"cannot write {where}: {error.strerror}; the checkout is as it was") from error
        raise
    known = {path for manifest in (manifest, old) if manifest for path in {*manifest.files, *manifest.overlay_paths()}}
    for name in known:  # of a run that was killed
        _temporary(checkout.top / name).unlink(missing_ok=True)


def _keep(path: Path, manifest: Manifest) -> None:
    _write(path, (json.dumps(asdict(manifest), indent=1) + "\n").encode(), 0o644)


def _roll_back(
    undo: list[tuple[Path, bytes | None, int]], made: list[Path], path: Path, manifest: bytes | None
) -> list[str]:
    left = []
    for target, data, mode in [*reversed(undo), (path, manifest, 0o644)]:
        try:
            _temporary(target).unlink(missing_ok=True)
            if data is None:
                target.unlink(missing_ok=True)
            elif not target.exists() or target.read_bytes() != data:
                _write(target, data, mode)
        except OSError:
            left.append(str(target))
    for folder in reversed(made):
        with contextlib.suppress(OSError):
            folder.rmdir()
    return left
