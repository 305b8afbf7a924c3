"""A store in S3, GCS or Azure, or in what speaks their protocol, through the package obstore.

An object appears whole or not at all, and an answer holds the bytes of one version of it. `create` is a conditional
request (put if absent), so that of two writers one wins here as in a folder. Each object that is created carries a
token of its writer: one whose answer got lost finds out by it that the object is its own.

Passing trouble is ridden out for `timeout_s`. What does not pass (no access, a bucket that is not there, a certificate
that is not trusted) is raised at once. A writer that dies in the middle of a large upload leaves parts that nobody
sees and that cost storage, until a lifecycle rule of the bucket removes them.
"""

import contextlib
import uuid
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qsl, unquote, urlsplit

import pyarrow as pa

from ..deadline import Deadline
from ..errors import BadInput, NotStored, StoreRefused, StoreUnreachable
from ..redaction import without_secrets
from .base import Data, Store, check_key, pieces
from .calls import progress

try:
    import obstore
    from obstore import exceptions
    from obstore.store import AzureStore, GCSStore, S3Store
except ImportError:
    raise BadInput("a store in S3, GCS or Azure needs the package obstore: pip install obstore") from None

T = TypeVar("T")

_KINDS: dict[str, Any] = {"s3": S3Store, "gs": GCSStore, "az": AzureStore, "abfs": AzureStore, "abfss": AzureStore}
_PART_BYTES, _PARTS_AT_ONCE = 8 << 20, 4  # of a larger value, which is uploaded in parts
_MOST_PATH_BYTES = 1024  # of the name of an object
_PAGE = 1000  # keys of a listing, or that are deleted at once
_CONNECT_S, _REQUEST_S, _SILENT_S = 5.0, 3600.0, 30.0
_SMALL_BYTES = 1 << 18  # that any store takes in no time
_UPLOAD_S = _PARTS_AT_ONCE * _PART_BYTES / 500_000  # for what is on its way at once: obstore hears nothing meanwhile
_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 1.0
_WRITER = "writer"
_HOPELESS = {
    "InvalidCertificate(": "its certificate is not trusted: name its authority by tls_ca_file_path=FILE in the URI",
    "builder error": "is its endpoint one of http://? Name it in the URI: endpoint=http://HOST:PORT",
    "BareRedirect": "its bucket is in another region: name that by region=NAME in the URI",
}
"""Errors that no waiting helps, by the name of their type in obstore, where Python gets that of any trouble."""
_REFUSED = (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError)


class ObjectStore(Store):
    """See the module. `s3://[KEY:SECRET@]BUCKET/PATH`, `gs://BUCKET/PATH`, `az://CONTAINER/PATH?account_name=NAME`,
    `abfss://CONTAINER@ACCOUNT.dfs.core.windows.net/PATH`; and behind a question mark what obstore knows (S3Config,
    GCSConfig, AzureConfig, ClientConfig: `region`, `endpoint`, `skip_signature` ...) and `tls_ca_file_path=FILE`, an
    authority besides the system's. Keys that the URI does not name come from the environment, or from the machine.
    """

    def __init__(self, uri: str, timeout_s: float = 60.0):
        super().__init__(uri)
        self._timeout_s = timeout_s
        self._conditional = False  # until the store has refused to create what was there
        parts = urlsplit(uri)
        options = dict(parse_qsl(parts.query, keep_blank_values=True))
        user, _, bucket = parts.netloc.rpartition("@")
        self._root = unquote(parts.path).strip("/")
        if parts.scheme.startswith("abfs"):
            user, bucket, options["account_name"] = "", user, bucket.partition(".")[0]
        elif parts.scheme == "s3" and user:
            options["access_key_id"], options["secret_access_key"] = map(unquote, user.partition(":")[::2])
            user = ""
        names = {*self._root.split("/")} if self._root else set()
        if user or not bucket or names & {"", ".", ".."} or not self._root.isprintable():
            raise BadInput(f"{self.shown!r} names no bucket, or no path in it: write {parts.scheme}://BUCKET/PATH")
        silent_s = max(0.5, min(_SILENT_S, timeout_s / 2))
        client = {"connect_timeout": _ms(min(_CONNECT_S, silent_s)), "timeout": _ms(_REQUEST_S)}
        if any(given.startswith("http://") for given in options.values()):
            client["allow_http"] = "true"  # else the environment may say so
        pauses = {"init_backoff": timedelta(seconds=_PAUSE_S), "max_backoff": timedelta(seconds=_LONGEST_PAUSE_S)}
        again = {"max_retries": 2, "retry_timeout": timedelta(seconds=timeout_s / 2), "backoff": {**pauses, "base": 2}}
        try:
            authority = options.pop("tls_ca_file_path", None)
            trust = {"root_certificate": Path(authority).read_bytes()} if authority else None
            self._store, self._uploads = (
                _KINDS[parts.scheme](
                    bucket,
                    config={**client, "read_timeout": _ms(waits_s), **options},
                    client_options=trust,
                    retry_config=again,
                )
                for waits_s in (silent_s, silent_s + _UPLOAD_S)
            )
        except (exceptions.BaseError, OSError, ValueError) as error:
            raise BadInput(
                f"obstore does not open {self.shown!r}: {self._said(error)} (options are those of its configuration, "
                "as endpoint=https://HOST:PORT, and tls_ca_file_path=FILE, a file that is on every node)"
            ) from None

    def put(self, key: str, data: Data) -> None:
        path, given = self._path(key), pieces(data)
        nbytes = sum(map(len, given))
        value, store = b"".join(given) if nbytes <= _PART_BYTES else given, self._for(nbytes)
        put = partial(obstore.put, store, path, value, chunk_size=_PART_BYTES, max_concurrency=_PARTS_AT_ONCE)
        self._do(key, put, writes=True)

    def create(self, key: str, data: Data) -> bool:
        path, value, me = self._path(key), b"".join(pieces(data)), uuid.uuid4().hex
        store = self._for(len(value))

        def create() -> bool:
            try:
                obstore.put(store, path, value, mode="create", attributes={_WRITER: me})
                if self._conditional:
                    return True
                obstore.put(store, path, value, mode="create", attributes={_WRITER: me})
            except exceptions.AlreadyExistsError as error:
                with contextlib.suppress(FileNotFoundError):  # if it was deleted meanwhile
                    found = obstore.get(self._store, path, options={"head": True})
                    self._conditional = True
                    return bool(found.attributes.get(_WRITER) == me)
                raise error
            raise StoreRefused(
                f"{self.shown} ignores the condition of a request (put if absent), so that two brokers could keep one "
                "job: use another store, or a newer version of this one"
            )

        return self._do(key, create, writes=True)

    def get(self, key: str) -> pa.Buffer:
        path = self._path(key)

        def read() -> bytes:
            return b"".join(_heard(obstore.get(self._store, path).stream(min_chunk_size=_PART_BYTES)))

        return pa.py_buffer(self._do(key, read))

    def delete(self, keys: Iterable[str]) -> None:
        paths = [self._path(key) for key in keys]
        for at in range(0, len(paths), _PAGE):
            progress()
            self._do("what is to be deleted", partial(self._delete, paths[at : at + _PAGE]))

    def keys(self, prefix: str) -> list[str]:
        path = self._path(prefix)

        def listed() -> list[str]:
            try:
                pages = _heard(obstore.list(self._store, path, chunk_size=_PAGE))
                return [about["path"] for page in pages for about in page]
            except exceptions.GenericError:  # which is all that obstore says of a listing
                self._check_access()
                raise

        return sorted(found[len(path) - len(prefix) :] for found in self._do(prefix, listed, writes=True))

    def exists(self, key: str) -> bool:
        path = self._path(key)
        with contextlib.suppress(NotStored):
            self._do(key, lambda: obstore.head(self._store, path))
            return True
        return False

    # ------------------------------------------------------------------ inside

    def _for(self, nbytes: int) -> Any:
        """Where so much is written: silence while a large value is sent is none of the store's."""
        return self._store if nbytes <= _SMALL_BYTES else self._uploads

    def _path(self, key: str) -> str:
        path = f"{self._root}/{check_key(key)}".lstrip("/")
        if len(path.encode()) > _MOST_PATH_BYTES:
            raise BadInput(f"{key[:80]!r}... is too long for {self.shown}: {_MOST_PATH_BYTES} bytes with its path")
        return path

    def _delete(self, paths: list[str]) -> None:
        try:
            obstore.delete(self._store, paths)
        except FileNotFoundError:  # of one of them, perhaps before the others were deleted; S3 does not say so
            for path in paths:
                progress()
                with contextlib.suppress(FileNotFoundError):
                    obstore.delete(self._store, path)

    def _check_access(self) -> None:
        """Raises what says by its type that the bucket is not there, or does not let us in."""
        if isinstance(self._store, S3Store):  # which wants for HEAD of a bucket the rights that a listing needs
            obstore.head(self._store, "")
        else:
            with contextlib.suppress(FileNotFoundError):
                obstore.head(self._store, self._path("any"))

    def _do(self, what: str, act: Callable[[], T], writes: bool = False) -> T:
        """Carry it out, again while it is in passing trouble, until the deadline. `writes`: it needs no object that is
        there, so that what is not there is the bucket."""
        deadline = Deadline(self._timeout_s)
        while True:
            try:
                return act()
            except FileNotFoundError as error:
                if writes:
                    raise StoreRefused(f"{self.shown} does not exist ({what}): {self._said(error)}") from None
                raise NotStored(f"{self.shown} has no {what}") from None
            except _REFUSED as error:
                said = self._said(error)
                raise StoreRefused(f"{self.shown} does not let us write or read {what}: {said}") from None
            except exceptions.BaseError as error:
                said = f"{self.shown} fails at {what}: {self._said(error)}"
                if why := next((why for name, why in _HOPELESS.items() if name in str(error)), ""):
                    raise StoreRefused(f"{said}; {why}") from None
                if not deadline:
                    raise StoreUnreachable(said) from None
            deadline.pause(_PAUSE_S, _LONGEST_PAUSE_S)

    def _said(self, error: Exception) -> str:
        return without_secrets(str(error).partition("\n\nDebug source")[0], self.uri)


def _ms(seconds: float) -> str:
    """A duration as obstore reads it."""
    return f"{int(1000 * seconds)}ms"


def _heard(chunks: Iterable[T]) -> Iterator[T]:
    """The same, each a sign of progress."""
    for chunk in chunks:
        progress()
        yield chunk
