"""The broker's memory: the newest snapshot of each job, kept in vaults; see snapshot.py."""

import asyncio
import collections
import contextlib
import logging
import os
from dataclasses import dataclass, field
from typing import Any

import ray

from .books import Books
from .errors import CrossJobError, Fenced, StoreUnreachable
from .ledger import Ledger
from .records import TABLES, Job
from .snapshot import restore, snapshot
from .tables import Mark
from .types import VAULT_NAME

logger = logging.getLogger(__name__)

_COPIES = 2  # vaults that keep a snapshot
_ANSWER_S = 20.0
_INVENTORY_S = 25.0  # clients wait 30 s for a broker; a vault that is silent for so long counts as lost
_SECOND_COPY_S = 0.5
_STORES_S = 5.0  # that a broker which begins waits for stores
_AVOIDED_S = 10.0  # after an error
_UNANSWERED = 50  # words that a vault that does not answer is told all the same


@dataclass(frozen=True, slots=True)
class _Told:
    """What a vault has of a job."""

    order: tuple[int, int]  # of its snapshot
    marks: dict[str, Mark]  # how far its tables go


@dataclass
class _Kept:
    """How far one job is kept: writers that come while one is at it share the next."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    asked: int = 0
    kept: int = 0
    told: dict[str, _Told] = field(default_factory=dict)  # by vault


class Keeper:
    """See the module."""

    def __init__(self, namespace: str, ledger: Ledger, books: Books | None = None):
        self._namespace = namespace
        self._ledger = ledger
        self.books = books or Books(ledger, "")
        self._vaults: dict[str, Any] = {}
        self._avoided: dict[str, float] = {}  # vaults that do not answer -> until when others are asked instead
        self._asked: set[asyncio.Task[bool]] = set()  # the loop itself holds tasks weakly
        self._tasks: set[asyncio.Task[None]] = set()
        self._jobs: dict[str, _Kept] = {}
        self._broker = 1  # n-th of the namespace
        self._serial = 0

    async def restore(self) -> dict[str, list[int]]:
        """Fill the ledger with what vaults remember. Returns job id -> rollouts that no vault holds any more."""
        named = await asyncio.to_thread(ray.util.list_named_actors, True)
        nodes = await alive_nodes()
        mine = [a["name"] for a in named if a["namespace"] == self._namespace and a["name"].startswith(VAULT_NAME)]
        mine = [name for name in mine if name.rpartition("_")[2] in nodes]  # the others never answer
        snapshots, records = [], []
        for name, found in zip(mine, await asyncio.gather(*map(self._inventory, mine)), strict=True):
            if found is not None:
                self._vaults[name] = found[0]
                self._broker = max(self._broker, found[1])
                records += found[2]
                snapshots += found[3]
        missing = restore(self._ledger, snapshots, records)
        if snapshots or records:
            logger.warning(
                "broker %d goes on with %d jobs and %d payloads that %d vaults remember",
                *(self._broker, len(self._ledger.jobs), len(records), len(self._vaults)),
            )
        keeping = {asyncio.create_task(self._keep_again(job_id)) for job_id in self._ledger.jobs}
        if keeping:  # a job whose store is away goes on by itself: the others do not wait for it
            self._tasks |= keeping
            for task in keeping:
                task.add_done_callback(self._tasks.discard)
            await asyncio.wait(keeping, timeout=_STORES_S)
        return missing

    async def _keep_again(self, job_id: str) -> None:
        try:
            await self.keep(job_id)
        except CrossJobError as error:  # its clients are told the same
            logger.error("job %s: %s", job_id, error)

    async def keep(self, job_id: str) -> None:
        """Let vaults remember how the job stands, and its journal, if it has one. Where no vault answers, nobody does,
        which is logged.

        Raises:
            StoreUnreachable: the journal cannot be written, for now. Fenced: another broker writes it.
        """
        if job_id not in self._ledger.jobs:
            return
        job = self._jobs.setdefault(job_id, _Kept())
        job.asked += 1
        mine = job.asked
        async with job.lock:
            if job.kept >= mine or job_id not in self._ledger.jobs:
                return
            record = self._ledger.jobs[job_id]
            if record.store is not None and not self.books.is_open(job_id):
                await self.books.open(job_id, record.store)
                if self._ledger.jobs.get(job_id) is not record:
                    raise StoreUnreachable(f"the journal of job {job_id} knew more than this broker: ask it again")
            before, job.kept = job.kept, job.asked
            try:
                await self._keep(job_id, record)
            except BaseException:
                job.kept = before  # who comes next tries again
                raise

    async def _keep(self, job_id: str, record: Job) -> None:
        self._serial += 1
        record.revision += 1
        entry = self.books.entry(job_id)
        chosen, waited_for = self._choose()
        sent = {name: self._send(name, job_id) for name in chosen}
        asked = {asyncio.create_task(self._ask(name, job_id, what), name=name) for name, what in sent.items()}
        self._asked |= asked
        for task in asked:
            task.add_done_callback(self._asked.discard)
        kept = False
        while asked and not kept:
            done, asked = await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
            kept = any(task.result() for task in done)
        asked = {task for task in asked if task.get_name() in waited_for}
        if asked:  # one copy is enough to answer, where the other takes long
            _, asked = await asyncio.wait(asked, timeout=_SECOND_COPY_S)
        for task in asked:
            self._avoided[task.get_name()] = asyncio.get_running_loop().time() + _ANSWER_S
        await self.books.write(entry)

    def _choose(self) -> tuple[list[str], list[str]]:
        """(the vaults to ask, those that are waited for): those that answer, always the same as long as they do.

        Where too few answer, others are asked, too, and not waited for: they have what they are told when they wake
        up, or nobody would be left that knows what the only quick one was told last.
        """
        now = asyncio.get_running_loop().time()
        quick = [name for name in sorted(self._vaults) if self._avoided.get(name, now) <= now]
        waiting = collections.Counter(task.get_name() for task in self._asked)
        slow = [name for name in sorted(self._vaults) if name not in quick and waiting[name] < _UNANSWERED]
        return [*quick, *slow][:_COPIES], quick[:_COPIES]

    def _send(self, name: str, job_id: str) -> tuple[Any, _Told]:
        """Send a vault the job as it is now, and of its tables what changed since it was last told; (ref, what it has
        if it says yes). Serialised here and now: nothing happens between the snapshot and the call."""
        state = snapshot(self._ledger, job_id, self._broker, self._serial)
        tables = {table: getattr(self._ledger.jobs[job_id], table) for table in TABLES}
        told = self._told(job_id).get(name)
        changes = {table: tables[table].since(told.marks[table] if told else None) for table in TABLES}
        ref = self._vaults[name].remember.remote(state, changes, told.order if told else None)
        return ref, _Told(state.order, {table: tables[table].mark() for table in TABLES})

    async def _ask(self, name: str, job_id: str, sent: tuple[Any, _Told]) -> bool:
        """Whether this vault has it."""
        handle = self._vaults[name]
        try:
            while not await answer_of(sent[0]):  # it was restarted: the tables must go whole
                if job_id not in self._ledger.jobs or name not in self._vaults:
                    return False
                self._told(job_id).pop(name, None)
                self._serial += 1
                sent = self._send(name, job_id)
        except Fenced as error:
            logger.critical("another broker took the place of this one: %s", error)
            os._exit(1)
        except (ray.exceptions.RayError, asyncio.TimeoutError) as error:
            if self._vaults.get(name) is not handle:  # it is another one by now, of which this says nothing
                return False
            if isinstance(error, ray.exceptions.ActorDiedError):
                self.vault_gone(name)
                return False
            if name not in self._avoided:
                logger.warning("vault %s does not keep the state of a job: %r", name, error)
            self._avoided[name] = asyncio.get_running_loop().time() + _AVOIDED_S
            return False
        self._avoided.pop(name, None)
        self._told(job_id)[name] = sent[1]
        return True

    def _told(self, job_id: str) -> dict[str, _Told]:
        """What each vault has of a job."""
        return self._jobs[job_id].told if job_id in self._jobs else {}

    async def forget(self, job_id: str) -> None:
        """The job is forgotten; so is its snapshot."""
        await self.books.forget(job_id)
        await self.let_go(job_id)

    async def let_go(self, job_id: str) -> None:
        """Another broker keeps the job: what vaults have of it lies in its store, too."""
        self._jobs.pop(job_id, None)
        asked = [vault.forget.remote(job_id) for vault in self._vaults.values()]
        await asyncio.gather(*map(answer_of, asked), return_exceptions=True)

    async def know(self, name: str) -> None:
        """This vault may keep snapshots, if there is one of this name."""
        if name not in self._vaults:
            with contextlib.suppress(ValueError, ray.exceptions.RayError):
                await self.vault_here(name)

    async def vault_here(self, name: str) -> None:
        """This vault may keep snapshots."""
        self._vaults[name] = await asyncio.to_thread(ray.get_actor, name, namespace=self._namespace)
        self.vault_gone(name, but_it_is_back=True)

    def vault_gone(self, name: str, but_it_is_back: bool = False) -> None:
        """This vault is dead, or a new one with nothing in it."""
        self._avoided.pop(name, None)
        for job in self._jobs.values():
            job.told.pop(name, None)
        if not but_it_is_back:
            self._vaults.pop(name, None)

    async def _inventory(self, name: str) -> tuple[Any, int, list[Any], list[Any]] | None:
        deadline = asyncio.get_running_loop().time() + _INVENTORY_S
        while (left := deadline - asyncio.get_running_loop().time()) > 0:
            try:
                handle = await asyncio.to_thread(ray.get_actor, name, namespace=self._namespace)
                return (handle, *await answer_of(handle.inventory.remote(), min(left, _INVENTORY_S / 2)))
            except (ValueError, ray.exceptions.ActorDiedError):
                return None
            except (ray.exceptions.RayError, asyncio.TimeoutError) as error:
                logger.warning("vault %s does not say what it holds: %r", name, error)
                await asyncio.sleep(0.5)
        return None


async def alive_nodes() -> set[str]:
    """Ids of the nodes that Ray counts as alive; a vault ends its name with that of its own."""
    return {node["NodeID"] for node in await asyncio.to_thread(ray.nodes) if node["Alive"]}


async def answer_of(ref: Any, within_s: float = _ANSWER_S) -> Any:
    async def answer() -> Any:
        return await ref

    return await asyncio.wait_for(answer(), within_s)
