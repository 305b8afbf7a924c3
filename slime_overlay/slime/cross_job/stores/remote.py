"""A store on any filesystem that `pyarrow.fs` reaches by URI: S3, GCS, Azure, HDFS.

Object stores show an object once it is whole; elsewhere a value is written under a temporary name and moved. A value
is read of one piece, also where it is replaced meanwhile. What an object store calls a passing trouble is ridden out
as long as `timeout_s` allows; what is no passing trouble (keys that are not let in, a certificate that nobody vouches
for, a bucket that is not there) is said at once.

There is no compare-and-set in pyarrow's filesystems: `create` looks first, which leaves a gap between two writers. So
two clusters must not work on one such store at the same time; archive.py finds it out and says so.
"""

import contextlib
import logging
import re
import time
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar
from urllib.parse import urlsplit

import pyarrow as pa
from pyarrow import fs

from ..errors import BadInput, CrossJobError, StoreRefused, StoreUnreachable
from .base import Data, Store, check_key, explained, pieces, without_password, without_secrets

logger = logging.getLogger(__name__)

T = TypeVar("T")

_WHOLE_AT_ONCE = ("s3", "gcs", "abfs")
_TEMPORARY = ".part-"
_DELETERS = 8  # at once: every name is some requests of its own
_CONNECT_S, _REQUEST_S, _RETRIES_S = 5.0, 30.0, 5
_NOT_LET_IN = re.compile(
    r"ACCESS_DENIED|INVALID_ACCESS_KEY_ID|SIGNATURE_DOES_NOT_MATCH|NO_SUCH_BUCKET|MISSING_AUTHENTICATION_TOKEN|"
    r"INVALID_CLIENT_TOKEN_ID|UNRECOGNIZED_CLIENT|EXPIRED_TOKEN|ExpiredToken|AuthorizationHeaderMalformed|"
    r"PERMISSION_DENIED|UNAUTHENTICATED|curlCode: (58|60|77)\b|CURL error \[(58|60|77)\]"
)
"""What stores and curl (58, 60, 77: certificates) say of what does not pass by waiting."""


class _Replaced(OSError):
    """The object is another one than when it was begun to be read."""


class RemoteStore(Store):
    """See the module."""

    compare_and_set = False
    look_every_s = 1.0

    def __init__(self, uri: str, filesystem: fs.FileSystem, root: str, timeout_s: float = 60.0):
        super().__init__(uri)
        self._fs, self._root, self._timeout_s = filesystem, root.rstrip("/"), timeout_s
        self._whole_at_once = filesystem.type_name in _WHOLE_AT_ONCE

    @classmethod
    def of(cls, uri: str, timeout_s: float = 60.0) -> "RemoteStore":
        try:
            filesystem, root = fs.FileSystem.from_uri(_impatient(uri))
        except (pa.ArrowException, ValueError, OSError) as error:
            said = without_secrets(str(error), uri)
            raise BadInput(f"pyarrow does not open {without_password(uri)!r}: {said}") from None
        return cls(uri, _with_deadlines(filesystem), root, timeout_s)

    def put(self, key: str, data: Data) -> None:
        path, given = self._path(key), pieces(data)

        def put() -> None:
            folder = path.rpartition("/")[0]
            draft = path if self._whole_at_once else f"{folder}/{_TEMPORARY}{uuid.uuid4().hex}"
            if not self._whole_at_once:  # which have no folders
                self._fs.create_dir(folder, recursive=True)
            try:
                with self._fs.open_output_stream(draft, compression=None) as stream:
                    for piece in given:
                        stream.write(piece)
                if draft != path:
                    self._fs.move(draft, path)
            except FileNotFoundError as error:  # of an object store: of the bucket
                raise StoreRefused(f"{self.shown} is not there, so that {key} cannot be written: {error}") from None
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
        return self._do(key, self._read, self._path(key))

    def delete(self, keys: Iterable[str]) -> None:
        paths = [(key, self._path(key)) for key in keys]
        with ThreadPoolExecutor(max(1, min(_DELETERS, len(paths)))) as pool:
            for _ in pool.map(lambda named: self._do(named[0], self._delete, named[1]), paths):
                pass

    def keys(self, prefix: str) -> list[str]:
        selector = fs.FileSelector(self._path(prefix), allow_not_found=True, recursive=True)

        def listed() -> list[Any]:
            try:
                return [*self._fs.get_file_info(selector)]
            except FileNotFoundError as error:  # of what vanished in the middle of the listing
                raise OSError(f"it changes while it is listed: {error}") from None

        files = [info.path for info in self._do(prefix, listed) if info.type == fs.FileType.File]
        return sorted(
            path.removeprefix(self._root + "/") for path in files if not path.rpartition("/")[2].startswith(".")
        )

    def exists(self, key: str) -> bool:
        found = self._do(key, self._fs.get_file_info, self._path(key))
        return bool(found.type == fs.FileType.File)

    # ------------------------------------------------------------------ inside

    def _path(self, key: str) -> str:
        return f"{self._root}/{check_key(key)}"

    def _read(self, path: str) -> pa.Buffer:
        if self._fs.type_name == "gcs":  # one request, answered with one generation of the object
            with self._fs.open_input_stream(path, compression=None) as stream:
                return pa.py_buffer(stream.read())
        with self._fs.open_input_file(path) as file:
            if not self._whole_at_once:  # what was opened stays what it is
                return file.read_buffer()
            about, data = file.metadata(), file.read_buffer()
        # as many bytes were asked for as the object had when it was opened, of whatever it was when they were read
        with self._fs.open_input_file(path) as again:
            if (again.size(), again.metadata()) != (data.size, about):
                raise _Replaced(f"{path} is replaced again and again while it is read")
        return data

    def _delete(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._fs.delete_file(path)

    def _do(self, what: str, act: Callable[..., T], *args: Any) -> T:
        """Carry it out, again while it is in passing trouble, until the deadline."""
        deadline, pause_s = time.monotonic() + self._timeout_s, 0.05
        while True:
            try:
                return act(*args)
            except (OSError, pa.ArrowException) as error:
                ours = self._explained(what, error)
                if not isinstance(ours, StoreUnreachable) or time.monotonic() > deadline:
                    raise ours from None
                if isinstance(error, _Replaced):
                    continue
            time.sleep(min(pause_s, max(0.0, deadline - time.monotonic())))
            pause_s = min(2 * pause_s, 1.0)

    def _explained(self, what: str, error: Exception) -> CrossJobError:
        said = without_secrets(str(error), self.uri)
        if _NOT_LET_IN.search(str(error)):
            return StoreRefused(f"{self.shown} does not let us write or read {what} ({said})")
        if not isinstance(error, OSError):
            return StoreUnreachable(f"{self.shown} fails at {what}: {said}")
        return explained(self, what, error)


def _impatient(uri: str) -> str:
    """GCS tries again for a quarter of an hour, if the URI does not say otherwise: that is ours to do."""
    if urlsplit(uri).scheme not in ("gs", "gcs") or "retry_limit_seconds=" in uri:
        return uri
    return f"{uri}{'&' if urlsplit(uri).query else '?'}retry_limit_seconds={_RETRIES_S}"


def _with_deadlines(filesystem: fs.FileSystem) -> fs.FileSystem:
    """S3 takes none from its URI, and tries again for some seconds what no waiting helps: the same filesystem, made
    anew from what it pickles as. A small object is then one request, too, not three."""
    if filesystem.type_name != "s3":
        return filesystem
    try:
        make, (options,) = filesystem.__reduce__()
        ours = {
            "retry_strategy": fs.AwsStandardS3RetryStrategy(max_attempts=1),
            "connect_timeout": _CONNECT_S,
            "request_timeout": _REQUEST_S,
            "allow_delayed_open": True,
        }
        return make({**options, **ours})
    except (TypeError, ValueError, AttributeError) as error:  # another pyarrow's: slower, and right all the same
        logger.warning("S3 is used with pyarrow's own deadlines: %s", error)
        return filesystem
