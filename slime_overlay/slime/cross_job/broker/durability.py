"""The broker's part in durable stores: the journal of each job that has one, who keeps it, and what may be freed.

A journal has one owner: a broker, which gives signs of life in the store. Where the owner is silent, as after its
cluster was lost, the broker of another cluster goes on from the journal; the clients of before count as dead. While
the owner is alive, the other broker refuses the job. An owner falls silent by itself once no client works on the job,
and the store has all of it. An owner that was replaced while it slept finds its next entry written by another broker
(wal.py), and lets the job go: its clients are fenced.
"""

import asyncio
import logging
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import replace
from typing import Any, TypeVar
from weakref import WeakValueDictionary

from ..errors import CrossJobError, Fenced, Forgotten, Refused, StoreFull, StoreUnreachable, Unreachable
from ..ledger import Ledger
from ..ledger.snapshot import rebuild
from ..ledger.state import DEAD, Client, Job
from ..ledger.verdicts import who
from ..redaction import without_password
from ..storage import Store, open_store
from ..storage.calls import Calls
from ..storage.payloads import Archive, marked, sealed
from ..storage.recording import is_recording
from ..storage.wal import OWNER, Entry, Journal, Outdated, Torn, owner_of
from ..types import Located, LocatedValue, ids_text, source_name

logger = logging.getLogger(__name__)

T = TypeVar("T")
H = TypeVar("H", bound=Hashable)

BEAT_S = 2.0
COLLECT_S = 600.0
SILENT_S = 7.0  # after which the owner of a journal is over
_OPEN_S = 10.0
_AWAY_S = 10.0  # that a store may be away before who waits for it is told
_ORPHAN_S = 600.0  # between two collections that find what nobody knows of, after which it is freed
_LEFTOVER_S = 3600.0  # the same, of what is not whole
_ORPHANS_AT_ONCE = 500
_ATTACHES = "a client attaches there"
REPLACED = "its cluster was lost, or its broker was replaced"
"""Why a client is dead that a journal knew, and that worked with the broker of before."""
_WRITTEN = ("payload", "quarantine", "journal", "mark.json", OWNER, "mail")  # in a store, below the id of a job


class Durability:
    """See the module.

    Args:
        me: names this broker, the same after it was restarted.
    """

    def __init__(self, ledger: Ledger, me: str):
        self._ledger, self.me = ledger, me
        self._let_go_of: set[str] = set()  # ids of jobs that another broker keeps now
        self.left: dict[str, str] = {}  # forgotten jobs whose store failed to delete what they stored -> URI
        self._stores: dict[str, Store] = {}
        self._journals: dict[str, Journal] = {}
        self._uris: dict[str, str] = {}  # by job id
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # by job id, while in use
        self._given_up: dict[str, list[str]] = defaultdict(list)  # job id -> names, of which no entry is written yet
        self._drops: dict[str, list[str]] = defaultdict(list)  # job id -> names that may be deleted
        self._calls: dict[str, Calls] = {}  # by URI: a store that hangs holds up no other
        self._beating: dict[str, asyncio.Task[None]] = {}  # job id -> its sign of life that is under way
        self._beats = 0
        self.marks: dict[str, str] = {}  # by job id: what says that a store is that of the broker, see payloads.py
        self._found_empty: set[str] = set()  # ids of jobs whose store has lost what it had
        # those that were looked into -> what vaults hold of that
        self._emptied: dict[str, list[Located | LocatedValue]] = defaultdict(list)
        self._seen: dict[tuple[str, str], dict[Any, float]] = {}  # (job id, kind) -> what nobody knows of, since when

    def is_open(self, job_id: str) -> bool:
        return job_id in self._journals

    async def open(self, job_id: str, uri: str) -> None:
        """Keep the journal of this job, in this store; go on with what it says, where the ledger knows less.

        Raises:
            Fenced: another broker keeps it, and is alive; a job of this name that is known here is let go.
            Refused: the job has another store, or a recording has its name.
            StoreUnreachable, StoreRefused.
        """
        async with self._lock(job_id):
            if job_id in self._journals:
                if self._uris[job_id] != uri:
                    raise Refused(
                        f"job {job_id} is kept in {self._stores[self._uris[job_id]].shown}: give the same "
                        "--cross-job-store, or another --job-id"
                    )
                if await self._still_ours(job_id):  # else another broker's sign of life would be written over
                    await self._beat(job_id, _ATTACHES)
                    return
            if self.left.get(job_id) == uri:  # or the new run would go on as the forgotten one
                await self._delete(job_id, uri)
            store = await self._store(uri)
            if await self._call(uri, job_id, is_recording, store, job_id):
                raise Refused(
                    f"{store.shown} has a recording of this name, {job_id}, which a job would free: choose another "
                    "--job-id or --cross-job-store"
                )
            journal = Journal(store, job_id, self.me, lambda: self._found_empty.add(job_id))
            owner = await self._call(uri, job_id, owner_of, store, job_id)
            await self._wait_for_silence(store, job_id, uri, owner)
            known = self._ledger.jobs.get(job_id)
            is_known = known is not None and known.store == uri and known.revision > 0
            found = None
            self._found_empty.discard(job_id)
            try:
                found = await self._call(uri, job_id, journal.load, turn="write")
            except Torn as error:
                if known is None or not is_known or known.revision < error.revision:
                    raise
                logger.critical("%s. Its broker remembers it: the journal is written anew", error)
            if found is None and is_known:
                journal.begin_anew()
            known = self._ledger.jobs.get(job_id)
            if found is not None and known is not None and not known.complete and known.store != uri:
                if not found[0].complete:
                    raise self._began_without(store, job_id)
                known.revision = max(known.revision, found[0].revision)  # that run is over, and its name begins anew
            foreign = known is None or (known.complete and known.store != uri)
            if found is not None and (foreign or known is None or known.revision < found[0].revision):
                self._go_on(*found, uri, was_ours=self.me == (journal.written_by or (owner or {}).get("broker")))
            mark = known.mark if known is not None else ""
            self.marks[job_id] = await self._call(uri, job_id, marked, store, job_id, mark)
            self._uris[job_id], self._journals[job_id] = uri, journal
            self._let_go_of.discard(job_id)
            await self._beat(job_id, _ATTACHES)

    def entry(self, job_id: str) -> Entry | None:
        """The job as it is now, to be written; None: it has no journal, or was forgotten."""
        for dropped, name in self._ledger.garbage.take_store_drops():
            self._given_up[dropped].append(name)
        journal, job = self._journals.get(job_id), self._ledger.jobs.get(job_id)
        if journal is None or job is None:
            return None
        self._ledger.history.age(job)
        entry = journal.entry(job, self._ledger.registry.clients_of(job_id))
        entry.drops = self._given_up.pop(job_id, [])
        return entry

    async def write(self, entry: Entry | None) -> None:
        """Make an entry durable.

        Raises:
            Fenced: another broker keeps the job; here it is let go.
            Forgotten: the job was forgotten, or let go, since this entry was made.
            StoreUnreachable: for now it cannot be written.
        """
        if entry is None:
            return
        deadline = asyncio.get_running_loop().time() + _AWAY_S
        while True:
            if self._journals.get(entry.job_id) is not entry.journal:
                raise Forgotten(f"job {entry.job_id} was forgotten, or let go, while its state was being written")
            try:
                await self._in_store(entry.job_id, entry.write, turn="write")
                self._drops[entry.job_id] += entry.drops  # what it gives up may go, now that this cannot be forgotten
                return
            except Outdated:
                self._given_up[entry.job_id] += entry.drops
                await self._if_emptied(entry.job_id)
                entry = self.entry(entry.job_id)
                if entry is None:
                    return
                continue
            except Fenced as error:
                logger.critical("%s", error)
                self._let_go(entry.job_id)
                raise
            except (StoreFull, StoreUnreachable) as error:
                if asyncio.get_running_loop().time() > deadline:
                    self._given_up[entry.job_id] += entry.drops
                    raise StoreUnreachable(f"the broker cannot keep how job {entry.job_id} stands: {error}") from None
            await asyncio.sleep(0.5)

    async def close(self, job_id: str) -> None:
        """A job that is complete, and that nobody works on, leaves its store alone: one small entry stays, and what is
        in quarantine. Nothing else may write of the job meanwhile.

        Raises:
            StoreUnreachable, StoreFull: it may be tried again, after `open`.
        """
        async with self._lock(job_id):
            if not await self._still_ours(job_id):
                return
            job, journal, archive = self._ledger.jobs[job_id], self._journals[job_id], self._archive(job_id)
            damaged = await self._in_store(job_id, archive.quarantined)
            names = [name for name in await self._in_store(job_id, archive.names) if name not in damaged]
            await self._in_store(job_id, archive.delete, names, turn="delete")
            left = await self._in_store(job_id, archive.leftovers)
            await self._in_store(job_id, archive.delete_leftovers, left, turn="delete")
            clients = self._ledger.registry.clients_of(job_id)
            if self._ledger.jobs.get(job_id) is not job or any(client.attached for client in clients):
                return  # its name was taken meanwhile
            job.revision += 1
            self._ledger.history.age(job)
            entry = journal.last_entry(replace(job, closed=True), clients)
            try:
                await self._in_store(job_id, entry.write, turn="write")
                await self._in_store(job_id, journal.delete_before, entry, turn="delete")
            except Outdated as error:
                raise StoreUnreachable(f"the journal of job {job_id} cannot be closed yet: {error}") from None
            uri, beating = self._uris[job_id], self._beating.get(job_id)
            self._close(job_id)
            if beating is not None:
                await asyncio.wait([beating])
            await self._call(uri, job_id, self._stores[uri].delete, [f"{job_id}/{OWNER}"], turn="delete")
            job.closed = True

    async def forget(self, job_id: str, uri: str | None = None) -> None:
        """All that was written for this job goes, also where it was closed, in the store of `uri`. A new job of this
        name opens its journal afterwards.

        Raises:
            Unreachable: what it stored is left, see `left`. To ask again would find no such job.
        """
        async with self._lock(job_id):
            uri = self._uris.get(job_id, uri)
            if uri is None:
                return
            beating = self._beating.get(job_id)
            self._close(job_id)
            if beating is not None:
                await asyncio.wait([beating])
            try:
                await self._delete(job_id, uri)
            except CrossJobError as error:
                self.left[job_id] = uri
                raise Unreachable(
                    f"job {job_id} is forgotten, but what it stored is left in {without_password(uri)}: {error}. This "
                    f"broker deletes it once the store answers; after a restart of the broker, delete {job_id} there"
                ) from None

    async def delete_left(self, job_id: str) -> None:
        """Try again to delete what a forgotten job has left in its store."""
        async with self._lock(job_id):
            if job_id not in self.left:
                return
            try:
                await self._delete(job_id, self.left[job_id])
                logger.info("job %s: what it had stored is deleted now", job_id)
            except CrossJobError as error:
                logger.info("job %s is forgotten, and what it stored is left: %s", job_id, error)

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
                await self._in_store(job_id, self._archive(job_id).delete, names, turn="delete")
            except CrossJobError as error:
                logger.info("job %s: %d payloads are freed later: %s", job_id, len(names), error)
                self._drops[job_id] += names

    async def beat(self) -> None:
        """Begin to look at the journal of each job, where that is not under way: let the job go if another broker has
        it, else give a sign of life, if the job is needed here. To be called every BEAT_S seconds.

        It waits for none: a store that is away holds up no other.
        """
        for job_id in self._journals.keys() - self._beating.keys():
            self._beating[job_id] = asyncio.create_task(self._beat_if_ours(job_id))

    def take_let_go(self) -> set[str]:
        """Jobs that another broker keeps now, each told once: vaults need not remember them."""
        let_go, self._let_go_of = self._let_go_of, set()
        return let_go

    def take_emptied(self) -> dict[str, list[Located | LocatedValue]]:
        """Jobs whose store was found emptied, each told once, and what vaults hold of what it had: they are to be
        kept, and that is to be stored again."""
        emptied, self._emptied = self._emptied, defaultdict(list)
        return emptied

    async def collect(self) -> int:
        """Free what nobody knows of: what was written by somebody who died before he could say so. How much it was.

        That is what two collections have found, so far apart by the clock of this process: no other clock counts. One
        job whose store is away holds up no other; then, at last, its error is raised.
        """
        found = await asyncio.gather(*map(self._collect, [*self._journals]), return_exceptions=True)
        for error in found:
            if isinstance(error, BaseException) and not isinstance(error, Forgotten):
                raise error
        return sum(freed for freed in found if isinstance(freed, int))

    # ------------------------------------------------------------------ inside

    def _lock(self, job_id: str) -> asyncio.Lock:
        """Held while the journal of this job is opened, closed or deleted."""
        return self._locks.setdefault(job_id, asyncio.Lock())

    async def _store(self, uri: str) -> Store:
        """The store of this URI. Raises StoreUnreachable, StoreRefused, BadInput."""
        if uri not in self._stores:
            self._stores[uri] = await self._call(uri, "", open_store, uri, _OPEN_S)
        return self._stores[uri]

    async def _in_store(self, job_id: str, act: Callable[..., T], *args: Any, turn: str = "") -> T:
        """A blocking call of the store of this job; see Calls.call. Raises StoreUnreachable, Forgotten."""
        return await self._call(self._uri_of(job_id), job_id, act, *args, turn=turn)

    async def _call(self, uri: str, job_id: str, act: Callable[..., T], *args: Any, turn: str = "") -> T:
        if uri not in self._calls:
            self._calls[uri] = Calls(without_password(uri))
        return await self._calls[uri].call(job_id, act, *args, turn=turn)

    async def _delete(self, job_id: str, uri: str) -> None:
        """Delete all that was written for a forgotten job in this store. Its lock is held."""
        store = await self._store(uri)
        owner = await self._call(uri, job_id, owner_of, store, job_id)
        if owner is None or owner.get("broker") == self.me:  # else another broker has a job of this name
            # an entry on its way into the store comes first, and goes, too
            await self._call(uri, job_id, _delete_all, store, job_id, turn="write")
        self.left.pop(job_id, None)

    def _go_on(self, job: Job, clients: list[Client], uri: str, was_ours: bool) -> None:
        """The journal knows more than the ledger: the job is what it says. Unless this broker wrote it, in an earlier
        life, the clients that it names are over."""
        job.store = uri
        here = {c.info.client_id for c in self._ledger.clients.values() if c.attached and c.info.job_id == job.job_id}
        missing = rebuild(self._ledger, job, clients)
        for client in clients:
            if client.attached and client.info.client_id not in here and not was_ours:
                self._ledger.membership.end(client.info.client_id, DEAD, REPLACED)
        logger.warning(
            "job %s goes on as its journal says: revision %d, %d rollouts are there, lost: %s",
            *(job.job_id, job.revision, len(job.rollouts), ids_text(missing)),
        )

    async def _still_ours(self, job_id: str) -> bool:
        """Whether no other broker has gone on with the job, while this one slept; else it is let go."""
        journal = self._journals.get(job_id)
        if journal is not None and await self._in_store(job_id, journal.is_ours, turn="look"):
            await self._if_emptied(job_id)
            return True
        if journal is not None:
            logger.critical("job %s is kept by another broker now", job_id)
            self._let_go(job_id)
        return False

    async def _collect(self, job_id: str) -> int:
        if not await self._still_ours(job_id):
            return 0
        archive = self._archive(job_id)
        names = await self._in_store(job_id, archive.names)
        kept = await self._in_store(job_id, archive.quarantined)

        def unknown(found: list[str]) -> list[str]:
            job = self._ledger.jobs.get(job_id)
            known = _alive(job) if job is not None else set()
            return [name for name in found if name not in known and name not in kept]

        orphans = self._seen_for(_ORPHAN_S, job_id, "orphans", unknown(names))
        if orphans:
            logger.info("job %s: %d stored payloads that nobody knows of are freed", job_id, len(orphans))
        for at in range(0, len(orphans), _ORPHANS_AT_ONCE):  # one may be recorded while others are deleted
            page = unknown(orphans[at : at + _ORPHANS_AT_ONCE])
            await self._in_store(job_id, archive.delete, page, turn="delete")
        left = self._seen_for(_LEFTOVER_S, job_id, "parts", await self._in_store(job_id, archive.leftovers))
        await self._in_store(job_id, archive.delete_leftovers, left, turn="delete")
        found = (await self._in_store(job_id, archive.store.drafts, job_id)).items()
        drafts = [name for name, _ in self._seen_for(_LEFTOVER_S, job_id, "drafts", found)]
        await self._in_store(job_id, archive.store.delete_drafts, drafts, turn="delete")
        return len(orphans) + len(left) + len(drafts)

    def _seen_for(self, least_s: float, job_id: str, kind: str, found: Iterable[H]) -> list[H]:
        """Those of what is found now that were found in every collection for so long."""
        now, before = asyncio.get_running_loop().time(), self._seen.get((job_id, kind), {})
        seen = {one: before.get(one, now) for one in found}
        self._seen[job_id, kind] = seen
        return [one for one, since in seen.items() if now - since >= least_s]

    async def _if_emptied(self, job_id: str) -> None:
        """If the store has lost what it had of this job: find out what that was, and say it. Its journal is written
        whole with the next entry."""
        if job_id not in self._found_empty or job_id not in self._journals:
            return
        if job_id not in self._ledger.jobs:  # it was forgotten, and its journal goes next
            return
        self._found_empty.discard(job_id)
        known, archive, store = _alive(self._ledger.jobs[job_id]), self._archive(job_id), self._archive(job_id).store
        try:
            await self._in_store(job_id, marked, store, job_id, self.marks[job_id])
            gone = known.difference(await self._in_store(job_id, archive.names))
        except CrossJobError:
            self._found_empty.add(job_id)
            raise
        if job_id not in self._journals:
            return
        lost, held = self._ledger.rollouts.not_stored(job_id, gone)
        self._emptied[job_id] += held
        words = ", ".join(lost[:20]) + (", ..." if len(lost) > 20 else "")
        text = (
            f"{store.shown} lost what it had of this job: was it emptied? The broker writes down again how the job "
            f"stands. {len(held)} payloads are stored again by their vaults; lost: {words or 'none'}"
        )
        logger.critical("job %s: %s", job_id, text)
        self._ledger.history.note_event(job_id, "store emptied", text)

    @staticmethod
    def _began_without(store: Store, job_id: str) -> Refused:
        return Refused(
            f"job {job_id} has begun here without {store.shown}, which holds one of that name: stop the jobs that are "
            "here, and give all of them the same --cross-job-store, or choose another --job-id"
        )

    def _let_go(self, job_id: str) -> None:
        """Another broker keeps the job: nothing is known of it here any more. A client that asks for it names its
        store (`Broker.recall`), and learns there why."""
        self._close(job_id)
        for client in self._ledger.registry.clients_of(job_id):
            del self._ledger.clients[client.info.client_id]
        self._ledger.jobs.pop(job_id, None)
        self._ledger.history.spans.pop(job_id, None)
        self._let_go_of.add(job_id)

    def _close(self, job_id: str) -> None:
        for held in (self._journals, self._uris, self._drops, self._given_up, self.marks, self._emptied):
            held.pop(job_id, None)
        self._found_empty.discard(job_id)
        self._seen = {key: seen for key, seen in self._seen.items() if key[0] != job_id}

    def _archive(self, job_id: str) -> Archive:
        return Archive(self._stores[self._uri_of(job_id)], job_id)

    def _uri_of(self, job_id: str) -> str:
        if job_id not in self._uris:  # it was forgotten, or let go, while its store was waited for
            raise Forgotten(f"job {job_id} has no journal here any more")
        return self._uris[job_id]

    async def _beat_if_ours(self, job_id: str) -> None:
        try:
            if await self._still_ours(job_id) and (why := self._why_kept(job_id)):
                await self._beat(job_id, why)
        except CrossJobError as error:
            logger.warning("job %s: no sign of life in its durable store: %s", job_id, error)
        finally:
            self._beating.pop(job_id, None)

    def _why_kept(self, job_id: str) -> str:
        """Why no other broker may have this job, in words: a client works on it here, or only vaults have some of it.
        Empty: nothing is against it."""
        job = self._ledger.jobs.get(job_id)
        if job is None:
            return ""
        clients = self._ledger.registry.clients_of(job_id)
        if attached := next((who(client) for client in clients if client.attached), ""):
            return f"the {attached} is attached there"
        newest: list[Located | LocatedValue] = [
            *(versions[-1] for versions in job.rollouts.values()),
            *job.values.values(),
        ]
        unstored = sum(not one.payload.stored for one in newest)
        return f"{unstored} payloads are in memory there, and not in the store" if unstored else ""

    async def _beat(self, job_id: str, why: str) -> None:
        self._beats += 1
        body = sealed({"broker": self.me, "beat": self._beats, "why": why})
        store = self._stores[self._uri_of(job_id)]
        await self._in_store(job_id, store.put, f"{job_id}/{OWNER}", body, turn="beat")

    async def _wait_for_silence(self, store: Store, job_id: str, uri: str, first: dict[str, Any] | None) -> None:
        """Return once the owner of before, whose last sign of life was `first`, is over. Its clock does not matter,
        only that nothing changes. Raises Fenced."""
        if first is None or first["broker"] == self.me:
            return
        deadline = asyncio.get_running_loop().time() + SILENT_S
        while (now := await self._call(uri, job_id, owner_of, store, job_id)) == first:
            if asyncio.get_running_loop().time() >= deadline:
                return
            await asyncio.sleep(0.5)
        if now is None:  # it has closed its journal
            return
        mine = self._ledger.jobs.get(job_id)
        if mine is not None and not mine.complete and mine.store != uri:
            raise self._began_without(store, job_id)
        if mine is not None:  # what vaults remember of it is older
            self._let_go(job_id)
        raise Fenced(
            f"job {job_id} is kept in {store.shown} by the broker of another cluster or namespace ({now['broker']}), "
            f"which is alive: {now.get('why', 'nobody knows why')}. Stop its jobs there, or choose another --job-id"
        )


def _delete_all(store: Store, job_id: str) -> None:
    """What brokers and vaults wrote of this job; not what others keep under its name (communicators.py)."""
    store.delete([key for key in store.keys(job_id) if key.split("/")[1] in _WRITTEN])


def _alive(job: Job) -> set[str]:
    """Names of what the ledger still needs in the store."""
    sources = [source.stored for source in job.sources.values() if source.stored]
    return {record.payload.stored for record in job.records.values()} | {
        name for stored in sources for name in (stored, source_name(stored))
    }
