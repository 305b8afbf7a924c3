"""The names of the original proposal for exchange through files and through Redis, on the stores of this package.

Values are columns (equally long lists, which become Arrow) or whatever JSON can hold; nothing is pickled. They need no
Ray. A channel is a log: each message has the next number, created where there is none, so that two that publish at
once lose nothing, and who was away reads on where it was.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from urllib.parse import quote

from .archive import checksum, opened, sealed
from .batch import Batch
from .errors import BadInput, BatchError, CrossJobError, NotStored, PayloadDamaged
from .stores import Store, open_store
from .types import check_job_id

logger = logging.getLogger(__name__)

_POLL_S = 0.1
_ARROW, _JSON = b"A", b"J"


class FileSystemCommunicator:
    """Values by (job id, key) in a folder that both jobs reach."""

    def __init__(self, base_path: str):
        self._store = open_store(f"file://{quote(str(base_path))}")

    def write_data(self, job_id: str, key: str, data: Any) -> None:
        """Keep a value, in the place of an older one; when this returns, it is durable. Raises BadInput, StoreFull."""
        self._store.put(f"{check_job_id(job_id)}/data/{key}", _packed(data))

    def read_data(self, job_id: str, key: str) -> Any:
        """The value, equal to what was written. Raises NotStored, PayloadDamaged."""
        return _unpacked(self._store.get(f"{check_job_id(job_id)}/data/{key}"))

    def list_available_data(self, job_id: str) -> list[str]:
        """Keys of this job, in order."""
        prefix = f"{check_job_id(job_id)}/data"
        return [found.removeprefix(f"{prefix}/") for found in self._store.keys(prefix)]


class Channel:
    """A log of messages in a store, numbered from 0."""

    def __init__(self, store: Store, name: str):
        self._store, self._name = store, check_job_id(name)
        self._next = 0

    def publish(self, data: Any) -> int:
        """Append a message; its number."""
        packed = _packed(data)
        number = self._next
        while not self._store.create(self._key(number), packed):
            number += 1
        self._next = max(self._next, number + 1)
        return number

    def read(self, number: int) -> Any:
        """Raises NotStored, PayloadDamaged."""
        return _unpacked(self._store.get(self._key(number)))

    def follow(self, start: int = 0, over: threading.Event | None = None) -> Iterator[tuple[int, Any]]:
        """(number, message) from `start` on, each as soon as it is there, until `over` is set."""
        number, ends = start, over or threading.Event()
        while not ends.is_set():
            try:
                message = self.read(number)
            except NotStored:
                ends.wait(_POLL_S)
                continue
            yield number, message
            number += 1

    def _key(self, number: int) -> str:
        return f"channels/{self._name}/{number:016d}"


class RayJobCommunicator:
    """Messages through a Redis, between any two processes."""

    def __init__(self, redis_host: str, redis_port: int = 6379, db: int = 0, password: str | None = None):
        access = f":{quote(password, safe='')}@" if password else ""
        self._store = open_store(f"redis://{access}{redis_host}:{redis_port}/{db}")
        self._channels: dict[str, Channel] = {}
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []

    def publish_data(self, channel: str, data: Any) -> str:
        """Append a message to a channel; its id, for `get_data`. It stays, whether or not anybody listens."""
        return f"{channel}:{self._channel(channel).publish(data)}"

    def get_data(self, message_id: str) -> Any:
        """The message with this id. Raises NotStored, BadInput."""
        channel, _, number = message_id.rpartition(":")
        if not channel or not number.isdigit():
            raise BadInput(f"{message_id!r} is no id of a message: publish_data returns it, CHANNEL:NUMBER")
        return self._channel(channel).read(int(number))

    def subscribe_data(self, channel: str, callback: Callable[[str, Any], None], start: int = 0) -> None:
        """Call `callback(message id, message)` for every message from number `start` on, in order, in a thread, until
        `close`. An exception of the callback is logged, and the next message comes."""

        def listen() -> None:
            number = start
            while not self._over.is_set():
                try:
                    for found, message in self._channel(channel).follow(number, self._over):
                        number = found + 1
                        try:
                            callback(f"{channel}:{found}", message)
                        except Exception:
                            logger.exception("the callback for message %s:%d", channel, found)
                    return
                except PayloadDamaged as error:
                    logger.error("message %s:%d is skipped: %s", channel, number, error)
                    number += 1
                except CrossJobError as error:
                    logger.warning("channel %s cannot be read, trying again: %s", channel, error)
                    time.sleep(1)

        self._threads.append(threading.Thread(target=listen, name=f"channel-{channel}", daemon=True))
        self._threads[-1].start()

    def close(self) -> None:
        """End all subscriptions."""
        self._over.set()
        for thread in self._threads:
            thread.join(5)
        self._store.close()

    def _channel(self, name: str) -> Channel:
        return self._channels.setdefault(name, Channel(self._store, name))


def _packed(data: Any) -> list[Any]:
    """A letter for the kind, and the value with its checksum."""
    batch = data if isinstance(data, Batch) else _columns(data)
    if batch is None:
        whole = sealed({"value": data})
        if opened(whole)["value"] != data:  # tuples, keys that are no texts
            raise BadInput("JSON gives this back as something else: use lists, and dicts whose keys are texts")
        return [_JSON, whole]
    return [_ARROW, checksum(batch.ipc).encode(), batch.ipc]


def _columns(data: Any) -> Batch | None:
    """Equally long, non-empty lists by name, as a batch; None: it is something else, or no batch holds it."""
    if not isinstance(data, Mapping) or not data or not all(isinstance(v, list) and v for v in data.values()):
        return None
    try:
        return Batch.pack(data)
    except BatchError:
        return None


def _unpacked(stored: Any) -> Any:
    kind = bytes(memoryview(stored)[:1])
    if kind == _JSON:
        return opened(stored.slice(1))["value"]
    if kind != _ARROW or stored.size < 33:
        raise PayloadDamaged("this was not written by write_data or publish_data")
    seal, ipc = bytes(memoryview(stored)[1:33]).decode(errors="replace"), stored.slice(33)
    if checksum(ipc) != seal:
        raise PayloadDamaged("it has another checksum than when it was written")
    try:
        return Batch.from_ipc(ipc).to_pydict()
    except BatchError as error:
        raise PayloadDamaged(str(error)) from None
