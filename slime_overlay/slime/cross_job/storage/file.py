"""A store in a folder of a filesystem that several nodes may share (local disk, NFS, Lustre ...): a file a key.

Durable: a value is written to a temporary name, synced, and renamed; then its folder is synced. Of two that create the
same key one wins, because a hard link to an existing name fails. Values are read by mapping the file, so that only
what is looked at is read, and the page cache of a node is shared by all of its processes.

A crash leaves at most temporary files (names that begin with a dot): `drafts`.
"""

import contextlib
import os
import stat
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

import pyarrow as pa

from ..errors import BadInput, StoreFull, StoreRefused, StoreUnreachable
from .base import Data, Store, check_key, explained, pieces
from .calls import progress

T = TypeVar("T")

_TEMPORARY = ".part-"
_RESERVE_BYTES = 64 << 20


class Disk:
    """The system calls that change something, one a method, so that tests can stop between any two of them."""

    def make_folder(self, path: Path) -> bool:
        """False: it was there."""
        try:
            path.mkdir()
            return True
        except FileExistsError:
            return False

    def write(self, path: Path, data: list[memoryview]) -> None:
        """A new file with this content, durable."""
        with path.open("xb", buffering=0) as file:
            for piece in data:
                while piece:
                    piece = piece[file.write(piece) :]
            os.fsync(file.fileno())

    def rename(self, old: Path, new: Path) -> None:
        old.rename(new)

    def link(self, old: Path, new: Path) -> None:
        os.link(old, new)

    def remove(self, path: Path) -> None:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError):
            path.unlink()

    def sync_folder(self, path: Path) -> None:
        """Which names the folder has is durable."""
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


class FileStore(Store):
    """See the module. `file:///path`; the folder is made if its parent is there (`make`: else StoreUnreachable)."""

    def __init__(self, uri: str, disk: Disk | None = None, make: bool = True):
        super().__init__(uri)
        parts = urlsplit(uri)
        if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
            raise BadInput(f"{self.shown!r} names no folder: write file:///an/absolute/path")
        self._root = Path(unquote(parts.path))
        self._disk = disk or Disk()
        if not self._root.parent.is_dir():
            raise BadInput(
                f"{self._root.parent} is no folder here: it must be a shared folder, at this path on every node"
            )
        if make:
            self._do("the store", self._make_folders, self._root)
        elif not self._root.is_dir():
            raise StoreUnreachable(f"{self.shown} is no folder here: was it removed, or is its disk not mounted?")
        self._devices = self._root.stat().st_dev, self._root.parent.stat().st_dev

    def put(self, key: str, data: Data) -> None:
        path = self._path(key)

        def put() -> None:
            with self._written(path, data) as draft:
                self._disk.rename(draft, path)
            self._disk.sync_folder(path.parent)

        self._do(key, put)

    def create(self, key: str, data: Data) -> bool:
        path = self._path(key)

        def create() -> bool:
            if path.is_file():
                return False
            with self._written(path, data) as draft:
                try:
                    self._disk.link(draft, path)
                except FileExistsError:
                    return False
            self._disk.sync_folder(path.parent)
            return True

        return self._do(key, create)

    def get(self, key: str) -> pa.Buffer:
        path = self._path(key)

        def read() -> pa.Buffer:
            if not path.is_file():
                raise FileNotFoundError
            if not path.stat().st_size:
                return pa.py_buffer(b"")
            with pa.memory_map(str(path)) as file:
                return file.read_buffer()

        return self._do(key, read)

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            progress()
            self._do(key, self._disk.remove, self._path(key))

    def keys(self, prefix: str) -> list[str]:
        found = self._do(prefix, lambda: [*self._files(prefix)])
        return sorted(key for key, path in found if not path.name.startswith("."))

    def exists(self, key: str) -> bool:
        return self._path(key).is_file()

    def check_room(self, nbytes: int) -> None:
        self._do("its folder", self._check_root)
        self._do("its folder", self._make_folders, self._root)  # somebody may have deleted it
        disk = self._do("the disk", os.statvfs, self._root)
        total, free = disk.f_blocks * disk.f_frsize, disk.f_bavail * disk.f_frsize
        if free < nbytes + min(_RESERVE_BYTES, total // 20):
            raise StoreFull(
                f"no room for {nbytes} bytes in {self.shown}: {free} of {total} are free; make room, or keep less"
            )

    def drafts(self, prefix: str) -> dict[str, str]:
        found = {}
        for name, path in self._do(prefix, lambda: [*self._files(prefix)]):
            if path.name.startswith(_TEMPORARY):
                with contextlib.suppress(FileNotFoundError):
                    about = path.stat()
                    found[name] = f"{about.st_size} {about.st_mtime_ns}"
        return found

    def delete_drafts(self, names: Iterable[str]) -> None:
        for name in names:
            progress()
            self._do(name, self._disk.remove, self._root / name)

    # ------------------------------------------------------------------ inside

    def _path(self, key: str) -> Path:
        """Where a key lies, or would. Raises StoreRefused where a symbolic link would lead out of the store."""
        path = self._root / check_key(key)
        self._do("its folder", self._check_root)
        self._do(key, self._check_links, path)
        return path

    def _check_root(self) -> None:
        """The file system that was there when the store was opened is mounted: else all would look as if freed."""
        try:
            at, place = 0, self._root.stat()
        except FileNotFoundError:
            at, place = 1, _stat_of_mounted(self._root.parent, self.shown)
        if place.st_dev == self._devices[at]:
            return
        if at == 0 and any(self._root.iterdir()):  # mounted anew
            self._devices = place.st_dev, self._root.parent.stat().st_dev
            return
        raise StoreUnreachable(
            f"{self.shown} is empty, and on another file system than when it was opened: mount the one that it was on"
        )

    def _check_links(self, path: Path) -> None:
        at = self._root
        for name in path.relative_to(self._root).parts:
            at /= name
            try:
                if stat.S_ISLNK(at.lstat().st_mode):
                    raise StoreRefused(
                        f"{at} is a symbolic link: a store has none, because it would lead out of its folder. Put the "
                        "folder itself there, or make the whole store a link"
                    )
            except (FileNotFoundError, NotADirectoryError):
                return

    def _files(self, prefix: str) -> Iterator[tuple[str, Path]]:
        for folder, _, names in os.walk(self._path(prefix), onerror=_unless_absent):
            progress()
            for name in names:
                path = Path(folder) / name
                yield path.relative_to(self._root).as_posix(), path

    @contextlib.contextmanager
    def _written(self, path: Path, data: Data) -> Iterator[Path]:
        """A durable file with this content beside `path`, under a name that nobody sees."""
        self._make_folders(path.parent)
        if path.is_dir():  # keys below it were deleted, or are there
            for folder, _, _ in os.walk(path, topdown=False):
                Path(folder).rmdir()
        draft = path.parent / f"{_TEMPORARY}{uuid.uuid4().hex}"
        try:
            self._disk.write(draft, pieces(data))
            yield draft
        finally:
            if draft.exists():
                self._disk.remove(draft)

    def _make_folders(self, folder: Path) -> None:
        if folder.is_dir():
            return
        self._make_folders(folder.parent)
        if self._disk.make_folder(folder):
            self._disk.sync_folder(folder.parent)

    def _do(self, what: str, act: Callable[..., T], *args: Any) -> T:
        try:
            return act(*args)
        except OSError as error:
            raise explained(self, what, error) from None


def _stat_of_mounted(folder: Path, shown: str) -> os.stat_result:
    try:
        return folder.stat()
    except FileNotFoundError:
        raise StoreUnreachable(f"{folder}, in which {shown} was, is not there any more: is it not mounted?") from None


def _unless_absent(error: OSError) -> None:
    """A folder that cannot be read must not look empty."""
    if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
        raise error
