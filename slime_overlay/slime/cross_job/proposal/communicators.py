"""The names of the original proposal for exchange through files and through Redis, on the stores of this package.

encoding.py says which values they take, and how those come back. They need no Ray, and nothing is unpickled. A channel
is a log: each message has the next number, created where there is none, so that two that publish at once lose nothing,
and who was away reads on where it was.

What a job wrote, and what a channel holds, is kept for `ttl_s` after the last write to that job or channel (None:
until it is deleted), by the wall clocks of the nodes; where writers differ, the longest counts. Then it is not read
any more, and the next write deletes it. What older versions wrote has no end until this one writes beside it. Nothing
bounds how much there is: delete what was read.
"""

import inspect
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import quote

import pyarrow as pa

from ..errors import BadInput, CrossJobError, NotStored, PayloadDamaged
from ..storage import Store, open_store
from ..storage.payloads import opened, sealed
from ..types import check_job_id, check_seconds
from .encoding import decode, encode

logger = logging.getLogger(__name__)

TTL_S: float = 3600.0
"""Seconds for which values and messages are kept, unless it is said otherwise."""
_POLL_S = 0.1
_DELETED = pa.py_buffer(b"D")  # in the place of a message, so that who follows goes on
_now = time.time


class Lifetime:
    """Until when what lies below a prefix is kept, and the first number that counts: a small value beside it."""

    def __init__(self, store: Store, prefix: str, ttl_s: float | None):
        self._store, self._ttl_s = store, _seconds(ttl_s)
        self._key = f"_lifetimes/{prefix}"  # no id of a job begins so
        self._seen = 0.0, 0  # end (wall clock, s; 0: nobody said), first number

    def lasts(self) -> bool:
        """Whether it need not be renewed, by what was last read."""
        return self._seen[0] >= _now() + self._ttl_s

    def state(self) -> tuple[bool, int]:
        """Whether it is over, and the first number."""
        end, first = self._read()
        return 0 < end <= _now(), first

    def renew(self, first: int = 0) -> int:
        """It lasts `ttl_s` from now on, or longer if others want that; numbers begin at `first`. The first number."""
        end, known = self._read()
        wanted, first = _now() + self._ttl_s, max(first, known)
        if end < wanted or first > known:  # not at each of many writes
            self._seen = max(end, wanted + self._ttl_s / 10), first
            self._store.put(self._key, sealed({"end": self._seen[0], "first": first}))
        return first

    def _read(self) -> tuple[float, int]:
        try:
            said = opened(self._store.get(self._key))
            self._seen = float(said["end"]), int(said["first"])
        except NotStored:
            self._seen = 0.0, 0
        except (PayloadDamaged, KeyError, TypeError, ValueError) as error:
            logger.warning("%s of %s is damaged, so that it has no end: %s", self._key, self._store.shown, error)
            self._seen = 0.0, 0
        return self._seen


class Values:
    """Values of one job by key, in a store."""

    def __init__(self, store: Store, job_id: str, ttl_s: float | None = TTL_S):
        self._store, self._prefix = store, f"{check_job_id(job_id)}/data"
        self._life = Lifetime(store, self._prefix, ttl_s)

    def put(self, key: str, data: Any) -> None:
        place, packed = self._place(key), encode(data)
        if self._life.state()[0]:
            for old in self._store.keys(self._prefix):
                if self._life.state()[0]:  # else another writer is at work again
                    self._store.delete([old])
        self._check_clash(place)
        self._life.renew()
        self._store.put(place, packed)

    def get(self, key: str) -> Any:
        stored = self._store.get(self._place(key))
        if self._life.state()[0]:
            raise NotStored(f"{key!r} has expired: nobody wrote to {self._prefix} for as long as it was to be kept")
        return decode(stored)

    def keys(self) -> list[str]:
        if self._life.state()[0]:
            return []
        return [found.removeprefix(f"{self._prefix}/") for found in self._store.keys(self._prefix)]

    def delete(self, key: str) -> None:
        self._store.delete([self._place(key)])

    def _place(self, key: str) -> str:
        return f"{self._prefix}/{key}"

    def _check_clash(self, place: str) -> None:
        """In every store as in a folder, which cannot hold both `a/b` and `a/b/c`."""
        if self._store.exists(place):
            return
        slashes = [at for at, letter in enumerate(place) if letter == "/" and at > len(self._prefix)]
        above = [place[:at] for at in slashes if self._store.exists(place[:at])]
        if found := above or self._store.keys(place):
            raise BadInput(f"{place} clashes with {found[0]}: no folder holds both x and x/y; choose another key")


class FileSystemCommunicator:
    """Values by (job id, key) in a folder that both jobs reach.

    Args:
        base_path: the folder; it is made if its parent is there.
        ttl_s: seconds for which the values of a job are kept after the last write to it; None: until they are deleted.

    Raises:
        BadInput, StoreRefused, StoreUnreachable; each method, too.
    """

    def __init__(self, base_path: str = "/shared/ray_jobs", ttl_s: float | None = TTL_S):
        self._ttl_s = _seconds(ttl_s)
        self._store = open_store(f"file://{quote(str(base_path))}")

    def write_data(self, job_id: str, key: str, data: Any) -> None:
        """Keep a value, in the place of an older one; when this returns, it is durable.

        Args:
            key: names of at most 255 letters, digits, '.', '_' and '-', with '/' between them; with the job id,
                at most 990.
            data: as `encoding.encode` takes it: tensors, arrays, bytes, and what JSON holds, nested.

        Raises:
            BadInput: `data` cannot be kept, or `key` clashes with one of the job ('a/b' and 'a/b/c'). StoreFull.
        """
        self._values(job_id).put(key, data)

    def read_data(self, job_id: str, key: str) -> Any:
        """The value, as it was written. Raises NotStored: there is none, or it has expired; PayloadDamaged."""
        return self._values(job_id).get(key)

    def list_available_data(self, job_id: str) -> list[str]:
        """Keys of this job, in order."""
        return self._values(job_id).keys()

    def delete_data(self, job_id: str, key: str) -> None:
        """Delete a value; that there is none is no error."""
        self._values(job_id).delete(key)

    def _values(self, job_id: str) -> Values:
        return Values(self._store, job_id, self._ttl_s)


class Channel:
    """A log of messages in a store, numbered from 0. Numbers are taken once, also after all messages have gone."""

    def __init__(self, store: Store, name: str, ttl_s: float | None = TTL_S):
        self._store, self._name = store, check_job_id(name)
        self._life = Lifetime(store, f"channels/{name}", ttl_s)
        self._next = 0

    def publish(self, data: Any) -> int:
        """Append a message; its number."""
        packed = encode(data)
        if not self._life.lasts():
            self._begin()
        number = self._next
        while not self._store.create(self._key(number), packed):
            number += 1
        first = self._life.state()[1]
        self._next = max(self._next, number + 1, first)
        return number if number >= first else self.publish(data)  # the channel was cleared meanwhile

    def read(self, number: int) -> Any:
        """Raises NotStored, PayloadDamaged."""
        stored = self._stored(number)
        if stored.equals(_DELETED):
            raise NotStored(f"message {number} of channel {self._name} was deleted")
        return decode(stored)

    def follow(self, start: int = 0, over: threading.Event | None = None) -> Iterator[tuple[int, Any]]:
        """(number, message) from `start` on, each as soon as it is there, until `over` is set; without what was
        deleted, or has expired. Raises PayloadDamaged."""
        for number, stored in self.follow_stored(start, over):
            yield number, decode(stored)

    def follow_stored(self, start: int, over: threading.Event | None) -> Iterator[tuple[int, pa.Buffer]]:
        """`follow`, with each message as it is stored."""
        number, ends = start, over or threading.Event()
        while not ends.is_set():
            try:
                stored = self._stored(number)
            except NotStored:
                number = max(number, self._life.state()[1])
                ends.wait(_POLL_S)
                continue
            if not stored.equals(_DELETED):
                yield number, stored
            number += 1

    def delete(self, number: int) -> None:
        """Delete a message; that there is none is no error."""
        if self._store.exists(self._key(number)):
            self._store.put(self._key(number), _DELETED)

    def clear(self) -> None:
        """Delete all messages that are there; numbers go on behind them."""
        self._forget(self._messages())

    def _begin(self) -> None:
        if self._life.state()[0]:
            old = self._messages()
            if self._life.state()[0]:  # else another publisher has gone on, and `old` may hold its messages
                self._forget(old)
        self._next = max(self._next, self._life.renew())

    def _forget(self, old: list[str]) -> None:
        if old:
            self._life.renew(int(old[-1].rpartition("/")[2]) + 1)
            self._store.delete(old)

    def _messages(self) -> list[str]:
        return self._store.keys(f"channels/{self._name}")

    def _stored(self, number: int) -> pa.Buffer:
        stored = self._store.get(self._key(number))
        over, first = self._life.state()
        if over or number < first:
            raise NotStored(f"message {number} of channel {self._name} has expired, or was deleted")
        return stored

    def _key(self, number: int) -> str:
        return f"channels/{self._name}/{number:016d}"


class RayJobCommunicator:
    """Messages through a Redis, between any two processes.

    Args:
        ttl_s: seconds for which the messages of a channel are kept after the last one was published; None: until they
            are deleted.

    Raises:
        BadInput, StoreRefused, StoreUnreachable; each method, too.
    """

    def __init__(
        self,
        redis_host: str = "localhost",
        redis_port: int = 6379,
        db: int = 0,
        password: str | None = None,
        ttl_s: float | None = TTL_S,
    ):
        access = f":{quote(password, safe='')}@" if password else ""
        self._ttl_s = _seconds(ttl_s)
        self._store = open_store(f"redis://{access}{redis_host}:{redis_port}/{db}")
        self._channels: dict[str, Channel] = {}
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []

    def publish_data(self, channel: str, data: Any) -> str:
        """Append a message to a channel; its id, for `get_data`. It stays, whether or not anybody listens.

        Args:
            channel: named like a job id.
            data: as `encoding.encode` takes it: tensors, arrays, bytes, and what JSON holds, nested.

        Raises:
            BadInput: no such name, or `data` cannot be kept. StoreFull.
        """
        return f"{channel}:{self._channel(channel).publish(data)}"

    def get_data(self, message_id: str) -> Any:
        """The message with this id. Raises NotStored: there is none, or it has expired; BadInput, PayloadDamaged."""
        channel, number = self._parsed(message_id)
        return channel.read(number)

    def delete_data(self, message_id: str) -> None:
        """Delete a message; that there is none is no error."""
        channel, number = self._parsed(message_id)
        channel.delete(number)

    def delete_channel(self, channel: str) -> None:
        """Delete the messages that a channel holds. Its numbers go on, and who subscribed gets those that follow."""
        self._channel(channel).clear()

    def subscribe_data(self, channel: str, callback: Callable[..., Any], start: int = 0) -> None:
        """Call `callback(message id, message)` for every message from number `start` on, in order, in a thread, until
        `close`; a callback that takes one argument gets the message. An exception of the callback is logged, and the
        next message comes; so it is with a message that is damaged, or cannot be read here.

        Raises:
            BadInput: no such name, or a callback that takes neither.
        """
        messages, give = self._channel(channel), _of_two(callback)

        def listen() -> None:
            number = start
            while not self._over.is_set():
                try:
                    for found, stored in messages.follow_stored(number, self._over):
                        number = found + 1
                        try:
                            message = decode(stored)
                        except CrossJobError as error:
                            logger.error("message %s:%d is skipped: %s", channel, found, error)
                            continue
                        try:
                            give(f"{channel}:{found}", message)
                        except Exception:
                            logger.exception("the callback for message %s:%d", channel, found)
                    return
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
        return self._channels.setdefault(name, Channel(self._store, name, self._ttl_s))

    def _parsed(self, message_id: str) -> tuple[Channel, int]:
        channel, _, number = message_id.rpartition(":")
        if not channel or not number.isdigit():
            raise BadInput(f"{message_id!r} is no id of a message: publish_data returns it, CHANNEL:NUMBER")
        return self._channel(channel), int(number)


def _seconds(ttl_s: float | None) -> float:
    seconds = math.inf if ttl_s is None else check_seconds(ttl_s, "ttl_s")
    if not seconds:
        raise BadInput("ttl_s must be above 0 s; None keeps what is written until it is deleted")
    return seconds


def _of_two(callback: Callable[..., Any]) -> Callable[[str, Any], Any]:
    """The callback, as one that takes the id and the message."""
    try:
        signature = inspect.signature(callback)
    except (TypeError, ValueError):  # one of C that does not say
        if callable(callback):
            return callback
        raise BadInput(f"a callback is called with each message: a {type(callback).__name__} cannot be") from None
    for count in (2, 1):
        try:
            signature.bind(*range(count))
        except TypeError:
            continue
        return callback if count == 2 else lambda _, message: callback(message)
    raise BadInput(f"the callback takes neither (message id, message) nor (message): it is {signature}")
