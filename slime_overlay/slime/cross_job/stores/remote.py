"""A store on any filesystem that `pyarrow.fs` reaches by URI: S3, GCS, Azure, HDFS.

Object stores show an object once it is whole; elsewhere a value is written under a temporary name and moved. There is
no compare-and-set in pyarrow's filesystems: `create` looks first, which leaves a gap between two writers. So two
clusters must not work on one such store at the same time; archive.py finds it out and says so.
"""

import uuid
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import pyarrow as pa
from pyarrow import fs

from ..errors import BadInput
from .base import Data, Store, check_key, explained, pieces, without_password

T = TypeVar("T")

_WHOLE_AT_ONCE = ("s3", "gcs", "abfs")
_TEMPORARY = ".part-"


class RemoteStore(Store):
    """See the module."""

    compare_and_set = False
    look_every_s = 1.0

    def __init__(self, uri: str, filesystem: fs.FileSystem, root: str):
        super().__init__(uri)
        self._fs, self._root = filesystem, root.rstrip("/")

    @classmethod
    def of(cls, uri: str) -> "RemoteStore":
        try:
            return cls(uri, *fs.FileSystem.from_uri(uri))
        except (pa.ArrowException, ValueError, OSError) as error:
            said = str(error).replace(uri, without_password(uri))
            raise BadInput(f"pyarrow does not open {without_password(uri)!r}: {said}") from None

    def put(self, key: str, data: Data) -> None:
        path = self._path(key)

        def put() -> None:
            whole_at_once = self._fs.type_name in _WHOLE_AT_ONCE
            folder = path.rpartition("/")[0]
            draft = path if whole_at_once else f"{folder}/{_TEMPORARY}{uuid.uuid4().hex}"
            self._fs.create_dir(folder, recursive=True)
            try:
                with self._fs.open_output_stream(draft, compression=None) as stream:
                    for piece in pieces(data):
                        stream.write(piece)
                if draft != path:
                    self._fs.move(draft, path)
            except BaseException:
                if draft != path and self._fs.get_file_info(draft).type == fs.FileType.File:
                    self._fs.delete_file(draft)
                raise

        self._do(key, put)

    def create(self, key: str, data: Data) -> bool:
        if self.exists(key):
            return False
        self.put(key, data)
        return True

    def get(self, key: str) -> pa.Buffer:
        def read() -> pa.Buffer:
            with self._fs.open_input_file(self._path(key)) as file:
                return file.read_buffer()

        return self._do(key, read)

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            if self.exists(key):
                self._do(key, self._fs.delete_file, self._path(key))

    def keys(self, prefix: str) -> list[str]:
        selector = fs.FileSelector(self._path(prefix), allow_not_found=True, recursive=True)
        found = self._do(prefix, self._fs.get_file_info, selector)
        files = [info.path for info in found if info.type == fs.FileType.File]
        return sorted(
            path.removeprefix(self._root + "/") for path in files if not path.rpartition("/")[2].startswith(".")
        )

    def exists(self, key: str) -> bool:
        found = self._do(key, self._fs.get_file_info, self._path(key))
        return bool(found.type == fs.FileType.File)

    def _path(self, key: str) -> str:
        return f"{self._root}/{check_key(key)}"

    def _do(self, what: str, act: Callable[..., T], *args: Any) -> T:
        try:
            return act(*args)
        except OSError as error:
            raise explained(self, what, error) from None
