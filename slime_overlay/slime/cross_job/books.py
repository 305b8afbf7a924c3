"""The broker's part in durable stores: the journal of each job that has one, who keeps it, and what may be freed.

A journal has one keeper, the broker of some cluster, which gives a sign of life in the store. A broker that finds the
journal of a job that it does not know goes on from there, once the keeper of before is silent; its clients are over,
as their cluster is. Who keeps a journal wrongly finds its next entry written by another (journal.py), and lets the job
go.
"""

import asyncio
import logging
from collections import defaultdict
from typing import Any

from .archive import Archive, is_older, opened, sealed
from .errors import CrossJobError, Fenced, NotStored, PayloadDamaged, Refused, StoreFull, StoreUnreachable
from .journal import Entry, Journal, Outdated
from .ledger import Ledger
from .recording import is_recording
from .records import DEAD, Client, Job
from .snapshot import take_job
from .stores import Store, open_store
from .types import source_name

logger = logging.getLogger(__name__)

BEAT_S = 2.0
COLLECT_S = 600.0
SILENT_S = 7.0  # after which the keeper of a journal is over
_KEEPER = "keeper.json"
_OPEN_S = 10.0
_AWAY_S = 10.0  # that a store may be away before who waits for it is told
_ORPHAN_S = 600.0  # after which what nobody knows of is freed
_LEFTOVER_S = 3600.0


class Books:
    """See the module.

    Args:
        me: names this broker, the same after it was restarted.
    """

    def __init__(self, ledger: Ledger, me: str):
        self._ledger, self._me = ledger, me
        self._stores: dict[str, Store] = {}
        self._journals: dict[str, Journal] = {}
        self._uris: dict[str, str] = {}  # by job id
        self._locks: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._given_up: dict[str, list[str]] = defaultdict(list)  # job id -> names, of which no entry is written yet
        self._drops: dict[str, list[str]] = defaultdict(list)  # job id -> names that may be deleted
        self._beats = 0

    def is_open(self, job_id: str) -> bool:
        return job_id in self._journals

    async def open(self, job_id: str, uri: str) -> None:
        """Keep the journal of this job, in this store; go on with what it says, where the ledger knows less.

        Raises:
            Refused: the job has another store, a recording has its name, or a broker of another cluster keeps it.
            StoreUnreachable, StoreRefused.
        """
        async with self._locks[job_id]:
            if job_id in self._journals:
                if self._uris[job_id] != uri:
                    raise Refused(
                        f"job {job_id} is kept in {self._stores[self._uris[job_id]].shown}: give the same "
                        "--cross-job-store, or another --job-id"
                    )
                return
            if uri not in self._stores:
                self._stores[uri] = await asyncio.to_thread(open_store, uri, _OPEN_S)
            store, journal = self._stores[uri], Journal(self._stores[uri], job_id)
            if await asyncio.to_thread(is_recording, store, job_id):
                raise Refused(
                    f"{store.shown} has a recording of this name, {job_id}, which a job would free: choose another "
                    "--job-id or --cross-job-store"
                )
            await self._wait_for_silence(store, job_id)
            found = await asyncio.to_thread(journal.load)
            known = self._ledger.jobs.get(job_id)
            if found is not None and known is not None and not known.complete and known.store != uri:
                raise Refused(
                    f"job {job_id} has begun here without {store.shown}, which holds one of that name: stop the jobs "
                    "that are here, and give all of them the same --cross-job-store, or choose another --job-id"
                )
            if found is not None and (known is None or known.complete or known.revision < found[0].revision):
                self._go_on(*found, uri)
            self._uris[job_id], self._journals[job_id] = uri, journal
            await self._beat(job_id)

    def entry(self, job_id: str) -> Entry | None:
        """The job as it is now, to be written; None: it has no journal."""
        for dropped, name in self._ledger.take_store_drops():
            self._given_up[dropped].append(name)
        journal, job = self._journals.get(job_id), self._ledger.jobs[job_id]
        if journal is None:
            return None
        entry = journal.entry(job, [c for c in self._ledger.clients.values() if c.info.job_id == job_id])
        entry.drops = self._given_up.pop(job_id, [])
        return entry

    async def write(self, entry: Entry | None) -> None:
        """Make an entry durable.

        Raises:
            Fenced: another broker keeps the job; here it is let go. StoreUnreachable: for now it cannot be written.
        """
        if entry is None:
            return
        deadline = asyncio.get_running_loop().time() + _AWAY_S
        while True:
            try:
                await asyncio.to_thread(entry.write)
                self._drops[entry.job_id] += entry.drops  # what it gives up may go, now that this cannot be forgotten
                return
            except Outdated:
                drops, entry = entry.drops, self.entry(entry.job_id)
                if entry is None:
                    return
                entry.drops += drops
                continue
            except Fenced as error:
                logger.critical("%s", error)
                self._let_go(entry.job_id, str(error))
                raise
            except (StoreFull, StoreUnreachable) as error:
                if asyncio.get_running_loop().time() > deadline:
                    self._given_up[entry.job_id] += entry.drops
                    raise StoreUnreachable(f"the broker cannot keep how job {entry.job_id} stands: {error}") from None
            await asyncio.sleep(0.5)

    async def forget(self, job_id: str) -> None:
        """Everything of this job goes."""
        if job_id in self._journals:
            store = self._stores[self._uris[job_id]]
            self._close(job_id)
            await asyncio.to_thread(lambda: store.delete(store.keys(job_id)))

    @property
    def may_free(self) -> bool:
        """Whether there is anything for `free` to do."""
        return any(self._drops.values())

    async def free(self) -> None:
        """Delete what the ledger has given up, and the journal knows of."""
        for job_id in [job_id for job_id, names in self._drops.items() if names and job_id in self._journals]:
            names = self._drops.pop(job_id)
            try:
                if not await self._still_ours(job_id):
                    continue
                await asyncio.to_thread(self._archive(job_id).delete, names)
            except CrossJobError as error:
                logger.info("job %s: %d payloads are freed later: %s", job_id, len(names), error)
                self._drops[job_id] += names

    async def beat(self) -> None:
        """Give a sign of life in every store; to be called every BEAT_S seconds."""
        for job_id in [*self._journals]:
            try:
                if await self._still_ours(job_id):
                    await self._beat(job_id)
            except CrossJobError as error:
                logger.warning("job %s: no sign of life in its durable store: %s", job_id, error)

    async def collect(self) -> int:
        """Free what nobody knows of: what was written by somebody who died before he could say so. How much it was."""
        freed = 0
        for job_id in [*self._journals]:
            if not await self._still_ours(job_id):
                continue
            job, archive = self._ledger.jobs.get(job_id), self._archive(job_id)
            names = await asyncio.to_thread(archive.names)
            needed = {*(_alive(job) if job is not None else ()), *await asyncio.to_thread(archive.quarantined)}
            orphans = [name for name in names if name not in needed and is_older(name, _ORPHAN_S)]
            if orphans:
                logger.info("job %s: %d stored payloads that nobody knows of are freed", job_id, len(orphans))
            await asyncio.to_thread(archive.delete, orphans)
            freed += len(orphans) + await asyncio.to_thread(archive.sweep, _LEFTOVER_S)
        return freed

    # ------------------------------------------------------------------ inside

    def _go_on(self, job: Job, clients: list[Client], uri: str) -> None:
        """The journal knows more than the ledger: the job is what it says."""
        job.store = uri
        here = {c.info.client_id for c in self._ledger.clients.values() if c.live and c.info.job_id == job.job_id}
        missing = take_job(self._ledger, job, clients)
        for client in clients:
            if client.live and client.info.client_id not in here:
                self._ledger.end(client.info.client_id, DEAD, "its cluster was lost")
        logger.warning(
            "job %s goes on as its journal says: revision %d, %d rollouts are there, lost are %s",
            *(job.job_id, job.revision, len(job.rollouts), missing or "none"),
        )

    async def _still_ours(self, job_id: str) -> bool:
        """Whether no other broker has gone on with the job, while this one slept; else it is let go."""
        journal = self._journals.get(job_id)
        if journal is not None and await asyncio.to_thread(journal.is_ours):
            return True
        if journal is not None:
            logger.critical("job %s is kept by another broker now", job_id)
            self._let_go(job_id, "another broker keeps its job now")
        return False

    def _let_go(self, job_id: str, why: str) -> None:
        self._close(job_id)
        for client in [c for c in self._ledger.clients.values() if c.info.job_id == job_id]:
            self._ledger.end(client.info.client_id, DEAD, why)
        self._ledger.jobs.pop(job_id, None)

    def _close(self, job_id: str) -> None:
        for held in (self._journals, self._uris, self._drops, self._given_up):
            held.pop(job_id, None)

    def _archive(self, job_id: str) -> Archive:
        return Archive(self._stores[self._uris[job_id]], job_id)

    async def _beat(self, job_id: str) -> None:
        self._beats += 1
        body = sealed({"broker": self._me, "beat": self._beats})
        await asyncio.to_thread(self._stores[self._uris[job_id]].put, f"{job_id}/{_KEEPER}", body)

    async def _wait_for_silence(self, store: Store, job_id: str) -> None:
        """Return once the keeper of before is over. Its clock does not matter, only that nothing changes."""
        first = await asyncio.to_thread(_keeper, store, job_id)
        if first is None or first["broker"] == self._me:
            return
        deadline = asyncio.get_running_loop().time() + SILENT_S
        while asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.5)
            if await asyncio.to_thread(_keeper, store, job_id) != first:
                raise Refused(
                    f"job {job_id} is kept in {store.shown} by the broker of another cluster or namespace, which is "
                    "alive: stop its jobs there, or choose another --job-id"
                )


def _keeper(store: Store, job_id: str) -> dict[str, Any] | None:
    """The last sign of life of who keeps a journal."""
    try:
        return dict(opened(store.get(f"{job_id}/{_KEEPER}")))
    except (NotStored, PayloadDamaged):
        return None


def _alive(job: Job) -> set[str]:
    """Names of what the ledger still needs in the store."""
    sources = [source.stored for source in job.sources.values() if source.stored]
    return {record.payload.stored for record in job.records.values()} | {
        name for stored in sources for name in (stored, source_name(stored))
    }
