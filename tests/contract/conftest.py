"""Every store, as the contract suite sees it: where it lies, how it is opened again, and how it is stopped in between
any two of its system calls or commands."""

import contextlib
import random
import subprocess
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from slime.cross_job.storage import Store, open_store
from slime.cross_job.storage import redis as redis_module
from slime.cross_job.storage.file import Disk, FileStore
from tests.support import object_stores
from tests.support.object_stores import ObjectStore
from tests.support.redis_server import RedisServer
from tests.support.tls_proxy import Authority, TlsProxy

KINDS = ("memory", "file", "s3", "gcs", "redis", "rediss")
OBJECT_STORES = ("s3", "gcs")


class Crash(BaseException):
    """The process dies here: nothing of it runs any more."""


class Death(contextlib.AbstractContextManager["Death"]):
    """Whether what is done in the block died of a Crash, which is not raised any further."""

    died = False

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        self.died = kind is Crash
        return self.died


def deaths() -> Iterator[tuple[int, Death]]:
    """(after how many calls to die, the block that dies) until that comes to its end."""
    for after in range(200):
        death = Death()
        yield after, death
        if not death.died:
            assert after, "nothing died: nothing was tested"
            return
    pytest.fail("it never came to its end")


class CrashingDisk(Disk):
    """Dies before its n-th call, or in the middle of it where that writes: what was not synced is torn."""

    def __init__(self, after: int):
        self._left = after

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if name.startswith("_"):
            return found

        def call(*args: Any) -> Any:
            if self._left <= 0:
                if self._left == 0 and name == "write":
                    self._left -= 1
                    path, data = args
                    whole = b"".join(data)
                    path.write_bytes(whole[: len(whole) // 2])
                raise Crash
            self._left -= 1
            return found(*args)

        return call


@dataclass
class Place:
    """A store's place. `open()` again and again: the same store, as another process sees it."""

    kind: str
    uri: str
    server: RedisServer | None = None

    def open(self) -> Store:
        return open_store(self.uri, timeout_s=20.0)

    def open_crashing(self, after: int) -> Store:
        """A store whose process dies before its system call or command number `after`."""
        if self.kind == "file":
            made = FileStore(self.uri)
            made._disk = CrashingDisk(after)
            return made
        store: Any = open_store(self.uri)
        command = store._command
        left = [after]

        def crashing(*words: Any) -> Any:
            if left[0] <= 0:
                raise Crash
            left[0] -= 1
            return command(*words)

        store._command = crashing
        return store


@pytest.fixture(scope="session")
def redis_server(new_redis: Callable[..., RedisServer]) -> RedisServer:
    """One for all: nobody may kill it."""
    return new_redis(durable=True)


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="session")
def tls_redis(redis_server: RedisServer, authority: Authority) -> Iterator[str]:
    """URI of the same server, behind TLS."""
    proxy = TlsProxy(redis_server.port, authority)
    yield f"rediss://127.0.0.1:{proxy.port}/0?ssl_ca_certs={authority.ca}"
    proxy.stop()


@pytest.fixture(scope="session")
def s3() -> Iterator[ObjectStore]:
    yield from _running("s3")


@pytest.fixture(scope="session")
def gcs() -> Iterator[ObjectStore]:
    yield from _running("gcs")


def _running(kind: str) -> Iterator[ObjectStore]:
    if reason := object_stores.missing(kind):
        pytest.skip(reason)
    server = ObjectStore(kind)
    yield server
    server.stop()


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a value of some kilobytes lies in several."""
    monkeypatch.setattr(redis_module, "_PIECE_BYTES", 1000)
    monkeypatch.setattr(redis_module, "_INLINE_BYTES", 500)


def value(seed: int, nbytes: int) -> bytes:
    return random.Random(seed).randbytes(nbytes)


@pytest.fixture(params=KINDS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param in ("redis", "rediss"):
        server = request.getfixturevalue("redis_server")
        uri = server.uri if request.param == "redis" else request.getfixturevalue("tls_redis")
        open_store(uri)._redis.flushall()  # type: ignore[attr-defined]
        return Place(request.param, uri, server)
    if request.param in OBJECT_STORES:
        running = request.getfixturevalue(request.param)
        return Place(request.param, running.uri(uuid.uuid4().hex))
    if request.param == "memory":
        return Place("memory", f"memory://{uuid.uuid4().hex}")
    return Place(request.param, f"file://{tmp_path}/store")


@pytest.fixture
def store(place: Place) -> Iterator[Store]:
    opened = place.open()
    yield opened
    opened.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """small_disk("size=1m"): a filesystem in memory, mounted with these options."""
    mounted: list[Path] = []

    def mount(options: str) -> Path:
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True, check=False
        )
        if done.returncode:
            pytest.skip(f"no filesystem can be mounted here: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", folder], check=True)
