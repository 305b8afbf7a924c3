"""What a store promises: bytes by key, whole or not at all, still there after whatever dies.

    put      when it returns, the value is durable; readers see the old value or the new one, never a part of either
    create   the same, but only where the key is new: of any number of writers one gets True (compare-and-set)
    get      the value as it was put, byte for byte; damage is for the caller to find (payloads.py has checksums)
    keys     those below a prefix, in order; a key that is being written is not among them

A key has at most 1000 characters, and 255 between two '/'; in an object store, 1024 bytes with the path of its URI. A
folder cannot hold both `a/b` and `a/b/c`: who lets others choose keys refuses that for all stores (communicators.py).

A store knows nothing of jobs and rollouts. Absent is an error, never None. Methods block; they may be called from any
thread. A value may be given in pieces, which are stored one behind the other.
"""

import errno
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any
from urllib.parse import SplitResult, urlsplit

import pyarrow as pa

from ..errors import BadInput, CrossJobError, NotStored, StoreFull, StoreRefused, StoreUnreachable
from ..redaction import without_password, without_secrets

_KEY = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*")


REDIS = ("redis", "rediss", "unix")
OBJECTS = ("s3", "gs", "az", "abfs", "abfss")
_QUOTE = "write / ? # @ : % [ ] in a user or a password as %2F %3F %23 %40 %3A %25 %5B %5D"

_MOST_KEY, _MOST_NAME = 1000, 255
_FULL = (errno.ENOSPC, errno.EDQUOT)
_NO_PLACE = (errno.ENOTDIR, errno.EISDIR, errno.ENOTEMPTY, errno.EEXIST)

Data = Any | Sequence[Any]
"""A buffer (bytes, pa.Buffer ...) or a list of buffers."""


class Store(ABC):
    """See the module. `uri` is how it was named, `shown` the same without passwords."""

    def __init__(self, uri: str):
        self.uri = uri
        self.shown = without_password(uri)

    @abstractmethod
    def put(self, key: str, data: Data) -> None:
        """Keep `data` under `key`, in the place of what was there.

        Raises:
            StoreFull, StoreRefused, StoreUnreachable: nothing of it is seen.
        """

    @abstractmethod
    def create(self, key: str, data: Data) -> bool:
        """Like `put`, where there is no such key; False: there is, and nothing was changed."""

    @abstractmethod
    def get(self, key: str) -> pa.Buffer:
        """The value. Raises NotStored."""

    @abstractmethod
    def delete(self, keys: Iterable[str]) -> None:
        """Forget these keys; that one is not there is no error."""

    @abstractmethod
    def keys(self, prefix: str) -> list[str]:
        """Every key that begins with `prefix/`, in order."""

    def exists(self, key: str) -> bool:
        """Whether there is such a key. Stores that can say so without reading the value do."""
        return check_key(key) in self.keys(key.rpartition("/")[0])

    def check_room(self, nbytes: int) -> None:  # noqa: B027  most cannot tell
        """Before a large value is put: there is room for it, and some is left, so that small values (what the broker
        keeps) can be written although large ones do not fit any more. Raises StoreFull."""

    def drafts(self, prefix: str) -> dict[str, str]:
        """What is being written below `prefix`, or was left by a writer that died, where the store does not remove
        that by itself: name -> a text that changes while it is written."""
        return {}

    def delete_drafts(self, names: Iterable[str]) -> None:  # noqa: B027  most have none
        """Delete these drafts."""

    def close(self) -> None:  # noqa: B027  most have nothing to let go of
        """Let go of connections; what was put stays."""


def explained(store: Store, what: str, error: OSError) -> CrossJobError:
    """An error of a filesystem, as ours."""
    said = without_secrets(str(error), store.uri)
    if isinstance(error, FileNotFoundError):
        return NotStored(f"{store.shown} has no {what}")
    if error.errno in _NO_PLACE:
        return BadInput(f"{what} clashes with another key of {store.shown}: no folder holds both x and x/y ({said})")
    if error.errno == errno.ENAMETOOLONG:
        return BadInput(f"{what} is too long for {store.shown} ({said})")
    if error.errno in _FULL:
        return StoreFull(f"no room for {what} in {store.shown} ({said}): make room, or keep less")
    if isinstance(error, PermissionError) or error.errno == errno.EROFS:
        return StoreRefused(f"{store.shown} does not let us write or read {what} ({said})")
    return StoreUnreachable(f"{store.shown} fails at {what}: {said}")


def pieces(data: Data) -> list[memoryview]:
    """The buffers of a value, as flat bytes."""
    given: Any = data if isinstance(data, (list, tuple)) else [data]
    return [memoryview(piece).cast("B") for piece in given]


def check_key(key: str) -> str:
    """Return `key` if every store can hold it. Raises BadInput."""
    if not isinstance(key, str) or not _KEY.fullmatch(key):
        raise BadInput(f"invalid key {key!r}: use letters, digits, '.', '_', '-' and '/'")
    if len(key) > _MOST_KEY or max(map(len, key.split("/"))) > _MOST_NAME:
        raise BadInput(
            f"invalid key {key[:80]!r}...: it has {len(key)} characters; the most is {_MOST_KEY}, and {_MOST_NAME} "
            "between two '/'"
        )
    return key


def parts_of(uri: str) -> SplitResult:
    """The parts of a store's URI. Raises BadInput, without what is secret, where it cannot be read as it was meant."""
    try:
        parts = urlsplit(uri)
        if parts.scheme not in ("file", "memory"):
            parts.port  # noqa: B018  raises what the others do
    except ValueError:
        raise BadInput(f"{without_password(uri)!r} is no URI: {_QUOTE}") from None
    beyond = uri.partition("://")[2].removeprefix(parts.netloc)
    if "@" in beyond and parts.netloc and (parts.scheme in REDIS or ":" in parts.netloc) and parts.scheme != "file":
        raise BadInput(f"{without_password(uri)!r} has an @ after the name of its host: {_QUOTE}")
    return parts
