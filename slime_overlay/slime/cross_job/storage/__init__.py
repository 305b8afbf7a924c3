"""Durable stores behind one contract (base.py), chosen by URI, and what lies in them.

base.py, file.py, redis.py, objects.py, memory.py   bytes by key
payloads.py    rollouts: parts, manifests, quarantine   wal.py     a job's changes, numbered
recording.py   the rollouts of a run, kept              calls.py   calls in threads, with deadlines
"""

from ..errors import BadInput
from ..redaction import without_password
from .base import OBJECTS, REDIS, Store, parts_of


def open_store(uri: str, timeout_s: float = 60.0, make: bool = True) -> Store:
    """The store of a URI: `memory://NAME` (this process only), `file:///path`, `redis://`, `rediss://`, `unix://` (a
    Redis), `s3://bucket/path`, `gs://bucket/path`, `az://container/path`, `abfss://container@account.../path`.

    Args:
        timeout_s: how long an operation rides out a store that does not answer.
        make: make the folder of a file:// store that is not there.

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
        from .file import FileStore

        return FileStore(uri, make=make)
    if scheme in OBJECTS:
        from .objects import ObjectStore

        return ObjectStore(uri, timeout_s)
    raise BadInput(
        f"{without_password(uri)!r} is no store: give file:///a/shared/folder, redis://HOST:PORT/DB, or "
        f"NAME://BUCKET/PATH with one of {', '.join(OBJECTS)}"
    )


__all__ = ["Store", "open_store"]
