"""A slime checkout, the manifest of what was applied to it, and changes to it that happen all or not at all.

The manifest lies in git's own folder, so that no tree hash sees it. It is written before the first file is changed
(`complete` is false then) and again at the end: after a kill -9 in the middle, the next apply completes the work and
--reverse undoes it. An error in the middle, an interrupt included, puts every file back as it was.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import shutil
import signal
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath

from .git import Git, PatchsetError, blob_id
from .series import File

Changes = dict[str, File | None]
"""What each path is to hold; None: nothing."""


@dataclass(frozen=True)
class Manifest:
    """What was applied: per patched file its blob before and after, per overlay file its SHA-256."""

    pin: str
    head: str
    files: dict[str, list[str]]
    overlay: dict[str, str]
    complete: bool = True
    replaced: dict[str, str] = field(default_factory=dict)  # while incomplete: digests that may still lie at a path
    format: int = 1

    def digests(self, path: str) -> set[str]:
        """The digests under which apply may have left this path."""
        found = (*self.files.get(path, ())[1:], self.overlay.get(path, ""), *self.replaced.get(path, "").split())
        return {*found} - {""}

    def paths(self) -> set[str]:
        """Every path where a file of ours may lie."""
        return {*self.files, *self.overlay, *self.replaced}


def digests(file: File | None) -> set[str]:
    """A file's digests of both kinds that manifests have: a blob's name, and SHA-256."""
    return {blob_id(file.data), hashlib.sha256(file.data).hexdigest()} if file else set()


class Checkout:
    """A slime checkout: its top folder, its git, and commit, tree and files (blob by path) of HEAD."""

    def __init__(self, folder: str) -> None:
        self.top = Path(folder).resolve()
        self.git = Git(self.top)
        try:
            actual = self.git.text("rev-parse", "--show-toplevel")
            if Path(actual).resolve() != self.top:
                raise PatchsetError(f"it lies inside the repository {actual}")
            if self.git.attempt("rev-parse", "--verify", "HEAD").returncode:
                raise PatchsetError("it has no commit checked out")
        except PatchsetError as error:
            hint = "not the top folder of a git checkout of slime (see scripts/fetch_slime.sh)"
            raise PatchsetError(f"{folder} is {hint}: {error}") from error
        self.head, self.tree = self.git.text("rev-parse", "HEAD", "HEAD^{tree}").split()
        lines = [line.partition("\t") for line in self.git.text("ls-tree", "-r", "-z", "HEAD").split("\0")[:-1]]
        self.files: Mapping[str, str] = {path: about.split()[2] for about, _, path in lines}
        self._manifest = str(self.git.path("slime-cross-job.json").resolve())

    def read(self, path: str) -> File | None:
        """A file by its path from the top folder, None if there is none; PatchsetError if something else is there."""
        target = self.top / path
        if target.resolve() != target:
            raise PatchsetError(f"{path} is in the way: it is a link, or leads through one; move that away")
        try:
            return File(target.read_bytes(), target.stat().st_mode & 0o777)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise PatchsetError(f"{path} is in the way: {error.strerror}; move that away") from error

    def changed(self) -> list[str]:
        """The tracked files that differ on disk from those of HEAD."""
        with self.git.scratch() as scratch:
            return scratch.changed()

    def manifest(self) -> Manifest | None:
        """What was applied to this checkout, None if nothing was."""
        if not (file := self.read(self._manifest)):
            return None
        try:
            found = json.loads(file.data)
            if found.get("format") != 1:
                raise ValueError(f"format {found.get('format')} is of another version of slime cross-job")
            return Manifest(**{name: found[name] for name in found.keys() & Manifest.__dataclass_fields__.keys()})
        except (ValueError, TypeError, AttributeError) as error:
            raise PatchsetError(f"{self._manifest} is damaged ({error}): restore with git, and remove it") from error

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """One apply or reverse at a time on a checkout; the second is refused."""
        with self.git.path("slime-cross-job.lock").open("w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise PatchsetError(f"another apply works on {self.top}: wait until it is done") from error
            yield

    def change(self, changes: Changes, during: Manifest | None, end: Manifest | None) -> None:
        """Make the changes, or on any error leave all as it was.

        `during` is the manifest from before the first change to after the last, `end` the one that replaces it (None:
        no manifest). Folders of `during` in which nothing is left are removed, with Python's caches.
        """
        before = {path: self.read(path) for path in (*changes, self._manifest)}
        paths = during.paths() if during else set()
        try:
            if during and changes:
                self._put(self._manifest, _as_file(during))
            for path, after in changes.items():
                self._put(path, after)
            for path in paths:
                self._temporary(path).unlink(missing_ok=True)  # of a run that was killed
            self._prune(paths)
            self._put(self._manifest, _as_file(end) if end else None)
        except BaseException as error:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)
            try:
                for path, was in before.items():
                    if self.read(path) != was:
                        self._put(path, was)
                self._prune(changes)
            except OSError as second:
                raise PatchsetError(
                    f"{type(error).__name__}: {error}; not all is put back: {second}; run again, or --reverse"
                ) from error
            if isinstance(error, OSError):
                raise PatchsetError(f"cannot write: {error}; the checkout is as it was") from error
            raise

    def _prune(self, paths: Iterable[str]) -> None:
        """Remove the folders above these paths that hold nothing but Python's caches, the innermost first."""
        for folder in sorted({parent for path in paths for parent in PurePosixPath(path).parents}, reverse=True):
            found = self.top / folder
            if found.is_dir() and all(child.name == "__pycache__" for child in found.iterdir()):
                shutil.rmtree(found, ignore_errors=True)

    def _temporary(self, path: str) -> Path:
        target = self.top / path
        return target.with_name(
            f".{target.name}.slime-cross-job.tmp"
        )  # a fixed name: a later run replaces a left-over

    def _put(self, path: str, file: File | None) -> None:
        """Write or remove a file in one step."""
        target, temporary = self.top / path, self._temporary(path)
        if file is None:
            return target.unlink(missing_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        replaced = target.stat().st_mode if target.exists() else 0o644
        try:
            temporary.write_bytes(file.data)
            temporary.chmod(replaced if file.mode is None else file.mode)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)


def _as_file(manifest: Manifest) -> File:
    return File((json.dumps(asdict(manifest), indent=1) + "\n").encode())
