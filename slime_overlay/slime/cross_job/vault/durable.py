"""A vault's hand in durable stores: what it owns is written there, and read from there when its owner is gone.

A store that is full or away is waited for, and the producer sees what it waits for. What is read becomes an object of
this vault, for all readers of its node; a few are kept, because readers hold what they read themselves.
"""

import asyncio
import logging
import math
import socket
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray

from ..batch import Batch
from ..errors import BadInput, CrossJobError, NotStored, StoreFull, StoreRefused, StoreUnreachable
from ..metrics import Latencies
from ..redaction import without_password
from ..storage import Store, open_store
from ..storage.calls import Calls
from ..storage.payloads import Archive, mark_of, new_name
from ..types import source_name
from .protocol import Durably

logger = logging.getLogger(__name__)

_COPIES = 4
_AWAY_S = 10.0  # that a store may be away before it is said
_UNMARKED_S = 30.0  # that a mark may be missing: a network file system may show it late
_LOAD_S = 600.0  # that it may take to read a payload; large ones come from far
_AGAIN_S = 1.0
_REFUSED_AGAIN_S = 60.0


class StoreAccess:
    """See the module. For one event loop; blocking calls go to threads."""

    def __init__(self) -> None:
        self.troubles: dict[str, str] = {}  # token -> what its writing waits for
        self._latencies = Latencies()
        self._archives: dict[tuple[str, str, str], Archive] = {}
        self._calls: dict[str, Calls] = {}  # by URI
        self._marked: set[tuple[str, str, str]] = set()  # stores that are those of the broker
        self._unmarked: dict[tuple[str, str, str], float] = {}  # those that are not, since when
        self._copies: OrderedDict[str, asyncio.Future[list[Any]]] = OrderedDict()

    async def save(
        self,
        how: Durably,
        token: str,
        refs: Sequence[Any],
        source: Any,
        about: Mapping[str, Any],
        observed: bool = False,
        wanted: Callable[[], bool] = lambda: True,
    ) -> str:
        """Write a payload, and the batch that tells where its source of prompts stood, if there is one; its name.

        Written behind, it is tried again whatever the store says, because that may be mended (a password, access
        rights), for as long as the payload is `wanted`; empty: it is not, any more.

        `observed`: how long that takes, waiting for the store included, goes into the job's figures.

        Raises:
            StoreFull, StoreUnreachable: that lasted longer than `patience_s`. StoreRefused: also where this node sees
            another folder than the broker. BadInput: no batches.
        """
        parts = [_batch(await ref) for ref in refs]
        apart = None if source is None else _batch(await source)

        name = new_name(token)  # the same in every try, each of which has ended: nothing is left of those before

        def write() -> None:
            archive = self._archive(how.uri, how.job_id, how.compression)
            self._check_mark(archive.store, how)
            archive.save(name, parts, about)
            if apart is not None:
                archive.save(source_name(name), [apart], {})

        def waits(why: str) -> None:
            self.troubles[token] = why

        began = time.monotonic()
        deadline = began + (math.inf if how.behind else how.patience_s)
        pause_s = _AGAIN_S
        try:
            while wanted():
                try:
                    await self._calls_of(how.uri).wait(how.job_id, write, every_s=_AWAY_S, late=waits)
                    if observed:
                        self._latencies.observe("store_seconds", how.job_id, time.monotonic() - began, "write")
                    return name
                except (StoreFull, StoreUnreachable, StoreRefused) as error:
                    is_refused = isinstance(error, StoreRefused)
                    if time.monotonic() > deadline or (is_refused and not how.behind):
                        raise
                    if self.troubles.get(token) != str(error):
                        logger.warning("job %s: a payload waits for its durable store: %s", how.job_id, error)
                    self.troubles[token] = str(error)
                    pause_s = min(2 * pause_s, _REFUSED_AGAIN_S) if is_refused else _AGAIN_S
                await asyncio.sleep(pause_s)
            return ""
        finally:
            self.troubles.pop(token, None)

    async def delete(self, how: Durably, names: Sequence[str]) -> None:
        """Delete payloads that were saved, and that nobody knows of; what fails is left, and logged."""
        try:
            await self._calls_of(how.uri).call(
                how.job_id, lambda: self._archive(how.uri, how.job_id, how.compression).delete(names)
            )
        except CrossJobError as error:
            logger.warning(
                "job %s: %s, freed meanwhile, are left in its durable store: %s", how.job_id, ", ".join(names), error
            )

    async def load(self, uri: str, job_id: str, name: str, observed: bool = False) -> list[Any]:
        """Refs to the parts of a payload, read from the store, verified, and owned by this process; `observed` as in
        `save`.

        Raises:
            PayloadDamaged, NotStored, StoreUnreachable, StoreRefused.
        """
        key = f"{job_id}/{name}"
        if key not in self._copies:
            self._copies[key] = asyncio.ensure_future(self._read(uri, job_id, name, observed))
            for old in [*self._copies][:-_COPIES]:
                if self._copies[old].done():
                    del self._copies[old]
        self._copies.move_to_end(key)
        reading = self._copies[key]
        try:
            return await asyncio.shield(reading)
        except Exception:
            self._copies.pop(key, None)
            raise

    def forget(self, job_id: str) -> None:
        """Let go of what was read of a job, and of its store."""
        for key in [key for key in self._copies if key.startswith(f"{job_id}/")]:
            del self._copies[key]
        for archive in [known for known in self._archives if known[1] == job_id]:
            del self._archives[archive]

    async def _read(self, uri: str, job_id: str, name: str, observed: bool) -> list[Any]:
        began = time.monotonic()
        parts = await self._calls_of(uri).call(job_id, self._parts_of, uri, job_id, name, silent_s=_LOAD_S)
        if observed:
            self._latencies.observe("store_seconds", job_id, time.monotonic() - began, "read")
        return [await asyncio.to_thread(ray.put, part) for part in parts]

    def _check_mark(self, store: Store, how: Durably) -> None:
        """Before the first payload of a job is written: this node sees the store that the broker sees."""
        key = (how.uri, how.job_id, how.mark)
        if key in self._marked:
            return
        found = mark_of(store, how.job_id)
        if found and how.mark in ("", found):
            self._marked.add(key)
            return
        since = self._unmarked.setdefault(key, time.monotonic())
        kind = StoreRefused if found or time.monotonic() - since > _UNMARKED_S else StoreUnreachable
        raise kind(_unshared(store, how.job_id))

    def _parts_of(self, uri: str, job_id: str, name: str) -> list[Batch]:
        archive = self._archive(uri, job_id, "none")
        try:
            return archive.load(name)
        except NotStored:
            if mark_of(archive.store, job_id):
                raise
            raise StoreUnreachable(_unshared(archive.store, job_id)) from None

    def _calls_of(self, uri: str) -> Calls:
        return self._calls.setdefault(uri, Calls(without_password(uri)))

    def _archive(self, uri: str, job_id: str, compression: str) -> Archive:
        key = (uri, job_id, compression)
        if key not in self._archives:
            self._archives[key] = Archive(open_store(uri, _AWAY_S), job_id, compression)
        return self._archives[key]


def _unshared(store: Store, job_id: str) -> str:
    return (
        f"node {socket.gethostname()} does not find in {store.shown} the mark that the broker left there for job "
        f"{job_id}: it sees another folder than the broker's node. Mount one file system at this path on every node, "
        "or give a --cross-job-store that every node reaches"
    )


def _batch(value: Any) -> Batch:
    if isinstance(value, Batch):
        return value
    if isinstance(value, Mapping):
        return Batch.pack(value)
    raise BadInput(
        f"a {type(value).__name__} cannot be kept in a durable store, which takes no pickle: publish columns"
    )
