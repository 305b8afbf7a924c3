"""The broker's memory: the newest snapshot of each job, kept in vaults; see snapshot.py.

A broker that begins reads what every vault holds that Ray calls alive. It waits for a silent one as long as it takes,
or until its operator gives it up by name. Its number is higher than any that a vault ever obeyed, and a vault obeys it
from the first page that it reads there: no earlier broker can change anything behind its back. It tells a vault
nothing before it has read it; one that was given up and answers again is read then.
"""

import asyncio
import collections
import contextlib
import logging
import os
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ray

from ..errors import BadInput, CrossJobError, Fenced, NotKept, ProtocolMismatch, StoreUnreachable
from ..ledger import Ledger
from ..ledger.changes import Marks, changes
from ..ledger.snapshot import Snapshot, Tables, gathered, restore, snapshot
from ..ledger.state import TABLES, Job
from ..types import PROTOCOL, VAULT_NAME, Located, LocatedValue
from .durability import Durability

logger = logging.getLogger(__name__)

_COPIES = 2  # vaults that keep a snapshot
_ANSWER_S = 20.0
_LOOK_S = 5.0  # how often Ray is asked whether the node of a silent vault is alive
_SECOND_COPY_S = 0.5
_STORES_S = 5.0  # that a broker which begins waits for stores
_AVOIDED_S = 10.0  # after an error
_UNANSWERED = 50  # words that a vault that does not answer is told all the same


class _Gone(Exception):
    """This vault died, or was given up."""


@dataclass(frozen=True, slots=True)
class _Told:
    """What a vault has of a job."""

    order: tuple[int, int]  # of its snapshot
    marks: Marks  # how far its tables go


@dataclass
class _Kept:
    """How far one job is kept: writers that come while one is at it share the next."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    asked: int = 0
    kept: int = 0
    told: dict[str, _Told] = field(default_factory=dict)  # by vault


@dataclass(frozen=True, slots=True)
class _Found:
    """What a vault holds."""

    handle: Any
    snapshots: list[tuple[Snapshot, Tables]]
    records: list[Located | LocatedValue]


class Replicas:
    """See the module.

    Args:
        given_up: names of vaults that are not waited for; shared with whoever gives them up.
    """

    def __init__(
        self, namespace: str, ledger: Ledger, durability: Durability | None = None, given_up: set[str] | None = None
    ):
        self._namespace = namespace
        self._ledger = ledger
        self.durability = durability or Durability(ledger, "")
        self.given_up: set[str] = set() if given_up is None else given_up
        self._vaults: dict[str, Any] = {}
        self._had_vaults = False
        self._were_given_up: set[str] = set()  # by the operator of an earlier broker, as vaults say
        self._leaving: set[str] = set()  # vaults that are to end: they keep nothing new
        self._avoided: dict[str, float] = {}  # vaults that do not answer -> until when others are asked instead
        self._asked: set[asyncio.Task[bool]] = set()  # the loop itself holds tasks weakly
        self._tasks: set[asyncio.Task[None]] = set()
        self._jobs: dict[str, _Kept] = {}
        self._forgotten: set[str] = set()  # ids of jobs
        self._to_forget: set[tuple[str, str]] = set()  # (vault, job id) of those that have not answered
        self._entering: dict[str, asyncio.Lock] = collections.defaultdict(asyncio.Lock)
        self._waits: dict[str, float] = {}  # vaults that `restore` asks -> when they were last heard
        self._reading: dict[str, asyncio.Task[Any]] = {}
        self._broker = 1  # n-th of the namespace
        self._process = uuid.uuid4().hex
        self._serial = 0

    async def restore(self) -> dict[str, list[int]]:
        """Fill the ledger with what vaults remember, all that Ray calls alive. Returns job id -> rollouts that none of
        them holds any more."""
        named = await asyncio.to_thread(ray.util.list_named_actors, True)
        nodes = await alive_nodes()
        mine = [a["name"] for a in named if a["namespace"] == self._namespace and a["name"].startswith(VAULT_NAME)]
        mine = [name for name in mine if node_of(name) in nodes]  # the others never answer
        numbers = await asyncio.gather(*(self._unless_given_up(name, self._number) for name in mine))
        self._broker = 1 + max((n for n in numbers if n is not None), default=0)
        if self.given_up:  # what they obeyed is not known: milliseconds grow faster than brokers follow each other
            self._broker = max(self._broker, int(time.time() * 1000))
        mine = [name for name, number in zip(mine, numbers, strict=True) if number is not None]
        found = await asyncio.gather(*(self._unless_given_up(name, self._inventory) for name in mine))
        holding = {name: one for name, one in zip(mine, found, strict=True) if one is not None}
        self._vaults = {name: one.handle for name, one in holding.items()}
        self._had_vaults = bool(holding)
        records = [record for one in holding.values() for record in one.records]
        missing = restore(self._ledger, [pair for one in holding.values() for pair in one.snapshots], records)
        self._note_what_they_have(holding)
        self._tell_who_is_given_up()
        if self._ledger.jobs:
            logger.warning(
                "broker %d goes on with %d jobs and %d payloads that %d vaults keep",
                *(self._broker, len(self._ledger.jobs), len(records), len(self._vaults)),
            )
        keeping = {asyncio.create_task(self._keep_again(job_id)) for job_id in self._ledger.jobs}
        if keeping:  # a job whose store is away goes on by itself: the others do not wait for it
            self._tasks |= keeping
            for task in keeping:
                task.add_done_callback(self._tasks.discard)
            await asyncio.wait(keeping, timeout=_STORES_S)
        return missing

    async def stop(self) -> None:
        """End all that is under way, before another one of this process begins: it would be fenced by what a vault
        hears of this one afterwards."""
        under_way = {*self._reading.values(), *self._tasks, *self._asked}
        for task in under_way:
            task.cancel()
        if under_way:
            await asyncio.wait(under_way)

    def waits_for(self) -> list[dict[str, Any]]:
        """Vaults that `restore` asks, and that have not answered yet: [{"vault", "node_id", "silent_s"}]."""
        now = asyncio.get_running_loop().time()
        return [{"vault": v, "node_id": node_of(v), "silent_s": now - heard} for v, heard in self._waits.items()]

    def give_up(self, name: str) -> None:
        """Begin without this vault. Raises BadInput: `restore` does not wait for it."""
        if name not in self._waits:
            waited_for = ", ".join(self._waits) or "no vault"
            raise BadInput(f"the broker does not wait for {name}: it waits for {waited_for}")
        logger.critical("vault %s is given up: the broker begins without what it holds", name)
        self.given_up.add(name)
        self._reading[name].cancel()

    async def answers_again(self, name: str) -> bool:
        """Wait until a vault that was given up answers, and take it back: what it holds is had again where it is
        still needed, else freed there. False: it died instead."""
        with contextlib.suppress(_Gone):
            await self._number(name)
            await self.vault_here(name)
            logger.warning("vault %s, which was given up, answers again", name)
            return True
        self.given_up.discard(name)
        self._tell_who_is_given_up()
        return False

    def unanswered(self) -> list[str]:
        """Names of vaults that were told a change and have not answered yet."""
        return sorted({task.get_name() for task in self._asked})

    async def keep(self, job_id: str) -> None:
        """Let vaults remember how the job stands, and its journal, if it has one: two vaults, where two answer in
        time, else one; none is needed where the journal has it, or where the broker has never known a vault.

        Raises:
            NotKept: no vault has it. StoreUnreachable: the journal cannot be written. Both for now: the change stands,
                and is kept with the next one. Fenced: another broker writes the journal.
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
            if record.store is not None and not record.closed and not self.durability.is_open(job_id):
                await self.durability.open(job_id, record.store)
                if self._ledger.jobs.get(job_id) is not record:
                    raise StoreUnreachable(f"the journal of job {job_id} held more than this broker knew: call again")
            before, job.kept = job.kept, job.asked
            try:
                await self._keep(job_id, record)
            except BaseException:
                job.kept = before  # who comes next tries again
                raise

    async def _keep(self, job_id: str, record: Job) -> None:
        self._serial += 1
        if record.store is None or self.durability.is_open(
            job_id
        ):  # of one that is closed, its journal has the newest
            record.revision += 1
        entry = self.durability.entry(job_id)
        chosen, waited_for = self._choose()
        sent = {name: self._send(name, job_id) for name in chosen}
        asked = {
            asyncio.create_task(self._ask(name, self._vaults[name], job_id, what), name=name)
            for name, what in sent.items()
        }
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
        await self.durability.write(entry)
        if not kept and entry is None and self._had_vaults:
            silent = ", ".join(f"{name} on node {node_of(name)}" for name in sorted(self._vaults))
            raise NotKept(
                f"no vault keeps how job {job_id} stands, so that nothing is done for now: "
                + (f"silent, though Ray calls it alive: {silent}" if silent else "every vault died, none is there yet")
            )

    def _choose(self) -> tuple[list[str], list[str]]:
        """(the vaults to ask, those that are waited for): those that answer, always the same as long as they do.

        Where too few answer, others are asked, too, and not waited for: they have what they are told when they wake
        up, or nobody would be left that knows what the only quick one was told last.
        """
        now = asyncio.get_running_loop().time()
        stay = [name for name in sorted(self._vaults) if name not in self._leaving]
        quick = [name for name in stay if self._avoided.get(name, now) <= now]
        waiting = collections.Counter(task.get_name() for task in self._asked)
        slow = [name for name in stay if name not in quick and waiting[name] < _UNANSWERED]
        return [*quick, *slow][:_COPIES], quick[:_COPIES]

    def _send(self, name: str, job_id: str) -> tuple[Any, _Told]:
        """Send a vault the job as it is now, and of its tables what changed since it was last told; (ref, what it has
        if it says yes). Serialised here and now: nothing happens between the snapshot and the call."""
        state = snapshot(self._ledger, job_id, self._broker, self._serial, self._process)
        told = self._told(job_id).get(name)
        tables, marks = changes(self._ledger.jobs[job_id], told.marks if told else None)
        ref = self._vaults[name].remember.remote(state, tables, told.order if told else None)
        return ref, _Told(state.order, marks)

    async def _ask(self, name: str, handle: Any, job_id: str, sent: tuple[Any, _Told]) -> bool:
        """Whether this vault, to whose handle it was sent, has it."""
        try:
            while not await answer_of(sent[0]):  # it was restarted: the tables must go whole
                if job_id not in self._ledger.jobs or name not in self._vaults:
                    return False
                self._told(job_id).pop(name, None)
                self._serial += 1
                sent = self._send(name, job_id)
        except Fenced as error:
            _end_as_replaced(error)
        except (ray.exceptions.RayError, asyncio.TimeoutError) as error:
            if self._vaults.get(name) is not handle:  # it is another one by now, of which this says nothing
                return False
            if isinstance(error, ray.exceptions.ActorDiedError):
                self.vault_gone(name)
                return False
            if name not in self._avoided:
                logger.warning("vault %s is silent, and does not keep the state of a job: %s", name, in_a_line(error))
            self._avoided[name] = asyncio.get_running_loop().time() + _AVOIDED_S
            return False
        self._avoided.pop(name, None)
        self._told(job_id)[name] = sent[1]
        return True

    def _told(self, job_id: str) -> dict[str, _Told]:
        """What each vault has of a job."""
        return self._jobs[job_id].told if job_id in self._jobs else {}

    async def close(self, job_id: str) -> None:
        """A job that is complete, and that nobody works on, leaves its store alone; see Durability.close."""
        async with self._jobs.setdefault(job_id, _Kept()).lock:
            record = self._ledger.jobs.get(job_id)
            if record is None or record.store is None or job_id not in self._ledger.lifetime.through():
                return
            if not self.durability.is_open(job_id):
                await self.durability.open(job_id, record.store)
            await self.durability.close(job_id)
        await self.keep(job_id)

    async def forget(self, job_id: str, uri: str | None = None) -> None:
        """The job is forgotten; so is its snapshot, whatever its store (`uri`) says. Raises Unreachable."""
        self._forgotten.add(job_id)
        asked = self._tell_to_forget(job_id)  # at once: what vaults are told of a new job of this name comes later
        try:
            await self.durability.forget(job_id, uri)
        finally:
            await self._are_forgotten(job_id, asked)

    async def let_go(self, job_id: str) -> None:
        """Another broker keeps the job: what vaults have of it lies in its store, too. It may be open again by now."""
        if job_id in self._ledger.jobs:
            return
        await self._are_forgotten(job_id, self._tell_to_forget(job_id))

    async def forget_again(self) -> None:
        """Tell vaults again that have not answered which jobs are forgotten, or a later broker would go on with
        those; unless there is a new job of that name, whose state takes the place of the old one."""
        pending, self._to_forget = self._to_forget, set()
        asked: dict[str, dict[str, Any]] = collections.defaultdict(dict)  # all at once: no new job comes in between
        for name, job_id in pending:
            if name in self._vaults and job_id not in self._ledger.jobs:
                asked[job_id][name] = self._vaults[name].forget.remote(job_id)
        await asyncio.gather(*(self._are_forgotten(job_id, by_vault) for job_id, by_vault in asked.items()))

    def vaults(self) -> list[str]:
        """Names of the vaults that may keep snapshots."""
        return sorted(self._vaults)

    async def is_idle(self, name: str, idle_s: float) -> bool:
        """Whether this vault is there, holds no payload and has had nothing to do for `idle_s` seconds."""
        vault = self._vaults.get(name)
        return vault is not None and bool(await answer_of(vault.retire.remote(idle_s, False)))

    async def retire(self, name: str, idle_s: float, is_needed: Callable[[], bool]) -> bool:
        """End a vault that holds no payload and has had nothing to do for `idle_s` seconds. What it keeps of jobs is
        in other vaults first: in two, where there are two.

        Args:
            is_needed: asked last, before the vault is.

        Returns whether it has ended.
        """
        handle: Any = self._vaults.get(name)
        others = [other for other in self._vaults if other != name]
        if handle is None or not others:
            return False
        self._leaving.add(name)
        try:
            for job_id in [*self._ledger.jobs]:
                before = self._serial
                await self.keep(job_id)
                told = self._told(job_id)
                kept = [other for other in others if other in told and told[other].order[1] > before]
                if len(kept) < min(_COPIES, len(others)):
                    return False  # some do not answer: later
            now: Any = self._vaults.get(name)
            if is_needed() or now is not handle:
                return False
            if not await answer_of(handle.retire.remote(idle_s, True)):
                return False
            await asyncio.to_thread(ray.kill, handle)
            self.vault_gone(name)
            return True
        finally:
            self._leaving.discard(name)

    async def know(self, name: str) -> None:
        """This vault may keep snapshots, if there is one of this name, and it answers."""
        if name not in self._vaults:
            with contextlib.suppress(_Gone, ray.exceptions.RayError, asyncio.TimeoutError):
                await asyncio.wait_for(self.vault_here(name), _ANSWER_S)

    async def vault_here(self, name: str) -> None:
        """This vault may keep snapshots. What it holds is had again where it is still needed, else freed there."""
        async with self._entering[name]:  # of two readings at once, none would come to its end
            found = await self._inventory(name)
        self.vault_gone(name, but_it_is_back=True)
        self._vaults[name], self._had_vaults = found.handle, True
        if name in self.given_up:
            self.given_up.discard(name)
            self._tell_who_is_given_up()
        for job_id in {state.job.job_id for state, _ in found.snapshots} & self._forgotten:
            if job_id not in self._ledger.jobs:  # it was silent, or given up, when this was forgotten; it is told soon
                self._to_forget.add((name, job_id))
        known = {*self._ledger.jobs, *self._forgotten}
        unknown = [pair for pair in found.snapshots if pair[0].job.job_id not in known]
        again = {pair[0].job.job_id for pair in unknown}
        restore(self._ledger, unknown, [record for record in found.records if record.job_id in again])
        for job_id in again:
            logger.warning("job %s: it goes on from what only vault %s kept", job_id, name)
        others = [record for record in found.records if record.job_id not in again]
        over = [record for record in others if not self._ledger.rollouts.take_back(record)]
        over = [r for r in over if r.job_id in known or not r.payload.stored]  # else its store has it
        if over:
            logger.warning("vault %s holds %d payloads that nobody needs: they are freed", name, len(over))
            sources = (job.sources.values() for job in self._ledger.jobs.values())
            needed = {f"{source.token}.source" for some in sources for source in some}
            tokens = [token for r in over for token in (r.payload.token, f"{r.payload.token}.source")]
            found.handle.drop.remote([token for token in tokens if token not in needed])

    def vault_gone(self, name: str, but_it_is_back: bool = False) -> None:
        """This vault is dead, or a new one with nothing in it."""
        self._avoided.pop(name, None)
        for job in self._jobs.values():
            job.told.pop(name, None)
        if not but_it_is_back:
            self._vaults.pop(name, None)

    def _tell_who_is_given_up(self) -> None:
        for vault in self._vaults.values():
            vault.note_given_up.remote(sorted(self.given_up))

    def _note_what_they_have(self, holding: dict[str, _Found]) -> None:
        """Whose snapshot the ledger was made of need not be told all of it again."""
        orders: dict[str, tuple[int, int]] = {}
        for state, _ in (pair for one in holding.values() for pair in one.snapshots):
            orders[state.job.job_id] = max(state.order, orders.get(state.job.job_id, (0, 0)))
        for name, one in holding.items():
            for state, _ in one.snapshots:
                job = self._ledger.jobs[state.job.job_id]
                if state.order == orders[job.job_id]:
                    marks = {table: getattr(job, table).beginning() for table in TABLES}
                    self._jobs.setdefault(job.job_id, _Kept()).told[name] = _Told(state.order, marks)

    def _tell_to_forget(self, job_id: str) -> dict[str, Any]:
        """Vaults, and the refs of what they answer."""
        self._jobs.pop(job_id, None)
        return {name: vault.forget.remote(job_id) for name, vault in self._vaults.items()}

    async def _are_forgotten(self, job_id: str, asked: dict[str, Any]) -> None:
        """Wait for what vaults answer; those that do not are told again."""
        answers = await asyncio.gather(*map(answer_of, asked.values()), return_exceptions=True)
        for name, answer in zip(asked, answers, strict=True):
            if isinstance(answer, Exception) and not isinstance(answer, ray.exceptions.ActorDiedError):
                logger.warning("vault %s has not heard that job %s is forgotten: %s", name, job_id, in_a_line(answer))
                self._to_forget.add((name, job_id))

    async def _keep_again(self, job_id: str) -> None:
        try:
            await self.keep(job_id)
        except CrossJobError as error:  # its clients are told the same
            logger.error("job %s: %s", job_id, error)

    async def _unless_given_up(self, name: str, ask: Callable[[str], Any]) -> Any:
        """What comes of it; None: this vault died, or was given up."""
        if name in self.given_up:
            return None
        self._waits[name] = asyncio.get_running_loop().time()
        task = self._reading[name] = asyncio.ensure_future(ask(name))
        try:
            return await task
        except asyncio.CancelledError:
            if name not in self.given_up:
                raise
            return None
        except _Gone:
            return None
        finally:
            del self._reading[name], self._waits[name]

    async def _number(self, name: str) -> int:
        """Of the last broker that this vault obeyed."""
        handle = await self._handle(name)
        hello = await self._answer(name, lambda: handle.hello.remote())
        if hello["protocol"] != PROTOCOL:
            raise ProtocolMismatch(
                f"vault {name} speaks protocol {hello['protocol']}, this broker {PROTOCOL}: use another "
                "--cross-job-namespace for this version"
            )
        self._were_given_up.update(hello["given_up"])
        return int(hello["broker"])

    async def _inventory(self, name: str) -> _Found:
        """All that a vault holds; it obeys this broker from now on. Raises _Gone."""
        handle = await self._handle(name)
        while True:
            reading, items, incarnation = uuid.uuid4().hex, list[Any](), ""
            while True:
                page = await self._answer(name, self._page(handle, reading, len(items)))
                if page is None or incarnation not in ("", page.incarnation):  # it was restarted between two pages
                    break
                incarnation = page.incarnation
                items += page.items
                if not page.left:
                    return _Found(handle, *gathered(items))

    async def _handle(self, name: str) -> Any:
        try:
            return await asyncio.to_thread(ray.get_actor, name, namespace=self._namespace)
        except ValueError:
            raise _Gone from None

    def _page(self, handle: Any, reading: str, first: int) -> Callable[[], Any]:
        return lambda: handle.inventory.remote(self._broker, self._process, reading, first)

    async def _answer(self, name: str, ask: Callable[[], Any]) -> Any:
        """What this vault answers, as long as it takes while Ray calls it and its node alive. Raises _Gone."""
        while True:
            task = asyncio.ensure_future(answer_of(ask(), None))
            try:
                while not (await asyncio.wait([task], timeout=_LOOK_S))[0]:
                    if name in self._waits and name in self._were_given_up:
                        self.give_up(name)
                    if await _is_node_gone(name):
                        raise _Gone
                answer = task.result()
                if name in self._waits:
                    self._waits[name] = asyncio.get_running_loop().time()
                return answer
            except ray.exceptions.ActorDiedError:
                raise _Gone from None
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, Fenced):
                    _end_as_replaced(error.cause)
                raise error.cause from None
            except ray.exceptions.RayError as error:
                logger.warning("vault %s does not say what it holds, and is asked again: %s", name, in_a_line(error))
                await asyncio.sleep(0.5)
                if await _is_node_gone(name):
                    raise _Gone from None
            finally:
                task.cancel()


def node_of(name: str) -> str:
    """Id of the node of a vault, which ends its name."""
    return name.partition("/")[0].rpartition("_")[2]


async def _is_node_gone(name: str) -> bool:
    """Whether Ray counts the node of this vault as dead; False where Ray cannot be asked."""
    try:
        return node_of(name) not in await alive_nodes()
    except ray.exceptions.RayError:
        return False


def _end_as_replaced(error: Exception) -> None:
    """Ray restarts this broker, if it is the one that has the name, and it reads again what vaults hold."""
    logger.critical("another broker took the place of this one, which ends: %s", error)
    os._exit(1)


async def alive_nodes() -> set[str]:
    """Ids of the nodes that Ray counts as alive."""
    return {node["NodeID"] for node in await asyncio.to_thread(ray.nodes) if node["Alive"]}


def in_a_line(error: Exception) -> str:
    """What an error says, or its name where it says nothing, as a timeout does; without Ray's traceback."""
    found = getattr(error, "cause", None) if isinstance(error, ray.exceptions.RayTaskError) else None
    return " ".join(str(found or error).split()) or type(error).__name__


async def answer_of(ref: Any, within_s: float | None = _ANSWER_S) -> Any:
    """The answer of an actor, within so many seconds; None: whenever it comes."""

    async def answer() -> Any:
        return await ref

    return await asyncio.wait_for(answer(), within_s)
