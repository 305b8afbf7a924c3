"""Durable stores behind one contract (base.py), chosen by URI."""

from ..errors import BadInput
from .base import REDIS, Store, parts_of, without_password


def open_store(uri: str, timeout_s: float = 60.0) -> Store:
    """The store of a URI: `memory://NAME` (this process only), `redis://`, `rediss://`, `unix://` (a Redis), or what
    `pyarrow.fs` reaches (`file:///path`, `s3://bucket/path`, `gs://`, `hdfs://` ...).

    Args:
        timeout_s: how long an operation rides out a store that does not answer.

    Raises:
        BadInput: no such kind of URI. Refused: it does not let us in. StoreUnreachable: it does not answer.
    """
    scheme = parts_of(uri).scheme
    if scheme == "memory":
        from .memory import MemoryStore

        return MemoryStore.of(uri)
    if scheme in REDIS:
        from .redis import RedisStore

        return RedisStore(uri, timeout_s)
    if scheme == "file":
        from .filesystem import FileStore

        return FileStore(uri)
    if scheme:
        from .remote import RemoteStore

        return RemoteStore.of(uri, timeout_s)
    raise BadInput(
        f"{without_password(uri)!r} is no store: give file:///a/shared/folder, redis://HOST:PORT/DB, or a URI that "
        "pyarrow.fs knows"
    )


__all__ = ["Store", "open_store"]
