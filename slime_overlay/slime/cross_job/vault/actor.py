"""The vault: a detached actor, one per node, that OWNS the payloads published on its node.

Ray gives an object to whoever called the method that returned it, and loses the object when that owner dies. So a
vault calls the producer's method itself (one copy, straight into shared memory), or copies a value that a driver has
put (two copies). A payload is recorded with the broker only once the vault owns it, and the producer is told last:
what was called published survives `kill -9` of the producer, of its driver, and the end of its Ray job.

It does not survive the vault's own death; that is what durable stores are for. A vault that comes back says so, with a
new incarnation, and what the old one held is known to be lost.

Besides it keeps what a broker that restarts must know: the record of each payload, the newest snapshot of each job.
"""

import asyncio
import copy
import logging
import sys
import threading
import time
import uuid
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray import cloudpickle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ..batch import Batch
from ..errors import (
    ActorLost,
    BadInput,
    BrokerLost,
    CrossJobError,
    Fenced,
    Forgotten,
    MethodFailed,
    NotStored,
    PayloadDamaged,
    PayloadLost,
    StoreFull,
    StoreUnreachable,
    Unreachable,
)
from ..ledger.snapshot import Item, Page, Snapshot, Tables, listing
from ..ledger.state import TABLES
from ..ledger.tables import Change
from ..metrics import Latencies
from ..storage.payloads import sealed
from ..types import BROKER_NAME, PROTOCOL, Located, LocatedValue, Payload, check_payload, source_name
from .durable import StoreAccess
from .preview import preview
from .protocol import HEADER, PATIENCE_S, Durably, FromMethod, FromRefs, Target

logger = logging.getLogger(__name__)

_HEARD_S = 5.0
_REMEMBERED_CALLS = 256
_PAGE = 1000  # items of an inventory
_SAY_EVERY_S = 1.0
_RETIRES_S = 5.0  # within which the broker ends a vault that agreed to it
_BEHIND = 8  # payloads of a job that may be published and not yet stored (write-behind); then it waits for one
_FULL = (ray.exceptions.OutOfDiskError, ray.exceptions.ObjectStoreFullError)


@dataclass(frozen=True, slots=True)
class _Failure:
    """What a hand-over came to that failed: its error without the frames that it passed through, whose variables would
    keep the payload alive as long as it is remembered."""

    error: Exception

    @classmethod
    def of(cls, error: Exception) -> "_Failure":
        bare = _anew(error)
        links: list[BaseException | None] = [error]
        while links:
            link = links.pop()
            if link is not None and link.__traceback__ is not None:
                link.__traceback__ = None
                links += [link.__context__, link.__cause__, getattr(link, "cause", None)]
        return cls(bare)


class Vault:
    """See the module. Undecorated, so that it can be tested without Ray; `connection.py` makes the actor."""

    def __init__(self, name: str, namespace: str, own_process: bool = False):
        self._name = name
        self._namespace = namespace
        self._incarnation = uuid.uuid4().hex[:8]
        self._broker_handle: Any = None
        self._held: dict[str, list[Any]] = {}
        self._nbytes: dict[str, int] = {}
        self._records: dict[str, Located | LocatedValue] = {}
        self._snapshots: dict[str, tuple[Snapshot, Tables]] = {}
        self._since: dict[str, float] = {}  # job id -> when its newest snapshot came, monotonic
        self._broker = (0, "")  # the one that this vault obeys: n-th of the namespace, its process
        self._given_up: list[str] = []  # vaults that the operator of a broker gave up
        self._listed: tuple[str, list[Item]] = ("", [])  # what a broker reads page by page: name of its reading, all
        self._under_way: dict[str, asyncio.Task[Any]] = {}
        self._stores = StoreAccess()
        self._used_at = time.monotonic()  # when somebody last had something of it
        self._retires_until = 0.0  # monotonic: until then the broker ends it, and nothing new begins here
        self._damaged: set[str] = set()  # names of what was found damaged in a durable store
        self._latencies = Latencies()
        # payloads being stored that nobody waits for, by token; with the job that waits where they are many
        self._behind: dict[str, tuple[str, asyncio.Task[Any]]] = {}
        if own_process:
            _load_nothing_of_slime()
            threading.Thread(target=lambda: asyncio.run(self._introduce()), daemon=True).start()

    async def hello(self) -> dict[str, Any]:
        """Who is here, and on which node; "broker": the number of the last one that it obeyed (0: none yet);
        "given_up": see `note_given_up`."""
        self._used_at = time.monotonic()
        return {
            "protocol": PROTOCOL,
            "name": self._name,
            "node_id": ray.get_runtime_context().get_node_id(),
            "incarnation": self._incarnation,
            "broker": self._broker[0],
            "given_up": self._given_up,
        }

    async def hand_over(self, target: Target, source: FromRefs | FromMethod | None, wait_s: float) -> Any:
        """Own the payload, record it, return what the broker recorded; if that takes longer than `wait_s`, in a text
        what it waits for (empty: for the payload).

        Calling again with the same token joins what is under way, or returns what it came to. `source` None: only
        that; raises PayloadLost where nothing was begun.
        """
        await self._is_used()
        task = self._under_way.get(target.token)
        if task is None:
            if source is None:
                raise PayloadLost(
                    f"vault {self._name} knows nothing of {target.token}: it died meanwhile; publish again"
                )
            task = asyncio.get_running_loop().create_task(self._outcome_of(target, source))
            self._under_way[target.token] = task
        done, _ = await asyncio.wait([task], timeout=wait_s)
        self._forget_old_calls()
        if not done:
            return self._stores.troubles.get(target.token, "")
        outcome = task.result()
        if isinstance(outcome, _Failure):
            raise _anew(outcome.error)
        return outcome

    async def _is_used(self) -> None:
        """Before something is kept here: not while the broker ends this vault, and it is not idle then."""
        if (left_s := self._retires_until - time.monotonic()) > 0:
            await asyncio.sleep(left_s)  # unless it is ended meanwhile
        self._used_at = time.monotonic()

    async def keep_source(self, token: str, source: FromRefs) -> str:
        """Own where a source of prompts stands, of a consumer that resumes from a checkpoint; this vault as a Payload
        names it. The broker has it dropped."""
        await self._is_used()
        try:
            self._held[f"{token}.source"] = [await _copy(ref) for ref in source.refs]
        except _FULL as error:
            raise StoreFull(
                f"no room in the object store for the position of the source of prompts: {error}"
            ) from None
        return f"{self._name}/{self._incarnation}"

    async def load(self, uri: str, job_id: str, name: str, observed: bool = False) -> list[Any]:
        """Refs to the parts of a payload that lies in a durable store, whoever owned it before; see StoreAccess.load.
        What is damaged there is told to the broker, for people."""
        try:
            self._used_at = time.monotonic()
            return await self._stores.load(uri, job_id, name, observed)
        except PayloadDamaged as error:
            if name not in self._damaged:
                self._damaged.add(name)
                await self._tell("note_event", job_id, "quarantined", str(error))
            raise

    async def store_again(self, durably: Durably, lost: list[Located | LocatedValue]) -> None:
        """The durable store has lost these payloads: those that this vault holds are written again, soon."""
        for record in lost:
            token = record.payload.token
            if token in self._held and token not in self._behind:
                named = (
                    {"rollout_id": record.rollout_id}
                    if isinstance(record, Located)
                    else {"key": record.key, "version": record.version}
                )
                target = Target(token, "", durably=durably, **named)
                apart = self._held.get(f"{token}.source", [None])[0]
                work = self._store(target, _about(target, record.payload), record, self._held[token], apart)
                self._soon(token, "", work)

    async def open(self, token: str) -> list[Any]:
        """Refs to the parts of a payload. Raises PayloadLost when this vault does not hold it."""
        if token not in self._held:
            raise PayloadLost(f"vault {self._name} holds no payload {token}: it was freed, or the vault was restarted")
        self._used_at = time.monotonic()
        return self._held[token]

    async def preview(self, token: str, first: int, count: int, numbers: int, characters: int) -> dict[str, Any]:
        """Some samples of a payload, for people; see preview.py. What is large stays here. Raises PayloadLost."""
        parts = [await ref for ref in await self.open(token)]
        return await asyncio.to_thread(preview, parts, first, count, numbers, characters)

    async def check(self, token: str) -> None:
        """Raises PayloadLost unless every part of this payload can be read here."""
        for ref in await self.open(token):
            try:
                await ref
            except ray.exceptions.ObjectLostError as error:
                raise PayloadLost(f"vault {self._name} lost payload {token}: {error}") from None

    async def drop(self, tokens: list[str]) -> None:
        """Forget payloads; Ray frees each as soon as its last reader lets go."""
        self._used_at = time.monotonic()  # somebody may be reading it still
        for token in tokens:
            for held in (self._held, self._nbytes, self._records):
                held.pop(token, None)

    async def remember(
        self, snapshot: Snapshot, changes: dict[str, Change[Any]], since: tuple[int, int] | None
    ) -> bool:
        """Keep the newest snapshot of a job, and what changed in its tables since the one with the order `since`
        (None: they are whole). False: that one is not here, and nothing was kept. The same snapshot again, or one
        that is older than what this broker left here since, is kept already.

        Raises:
            Fenced: by a broker that was replaced, or that has not read what this vault holds (`inventory`). Nothing
                was kept.
        """
        by = (snapshot.broker, snapshot.process)
        if by != self._broker and self._broker[0]:
            raise Fenced(self._obeys(snapshot.broker))
        self._broker = by
        job_id = snapshot.job.job_id
        nothing: Tables = {name: {} for name in TABLES}
        old, tables = self._snapshots.get(job_id, (None, nothing))
        if since is not None and (old is None or old.order < since):
            return False
        if old is None or snapshot.order > old.order:
            for name, change in changes.items():
                change.apply(tables[name])
            self._snapshots[job_id] = (snapshot, tables)
            self._since[job_id] = time.monotonic()
        return True

    async def forget(self, job_id: str) -> None:
        """The job is forgotten: so is its snapshot, and what is left of it."""
        self._snapshots.pop(job_id, None)
        self._since.pop(job_id, None)
        self._stores.forget(job_id)
        await self.drop([token for token, record in self._records.items() if record.job_id == job_id])

    async def inventory(self, broker: int, process: str, reading: str, first: int) -> Page | None:
        """What this vault holds, from item `first` on, as it was when the first page was asked for under the name
        `reading`; None: no such reading is under way, it must begin again. From its first page on, the vault obeys
        this broker and no other.

        Raises:
            Fenced: a broker with a number as high, or higher, was here.
        """
        if (broker, process) != self._broker and broker <= self._broker[0]:
            raise Fenced(self._obeys(broker))
        self._broker = (broker, process)
        if self._listed[0] != reading:
            if first:
                return None
            snapshots = [(self._as_of_now(found), tables) for found, tables in self._snapshots.values()]
            self._listed = (reading, listing([*self._records.values()], snapshots))
        items = self._listed[1]
        page = items[first : first + _PAGE]
        left = len(items) - first - len(page)
        if not left:
            self._listed = ("", [])
        return Page(self._incarnation, page, left)

    async def note_given_up(self, names: list[str]) -> None:
        """Remember which vaults an operator gave up: the next broker does not wait for them again."""
        self._given_up = names

    async def retire(self, idle_s: float, ends: bool) -> bool:
        """Whether it holds no payload, and has had nothing to do for `idle_s` seconds. `ends`: the broker that asks
        then ends it at once; what is handed over meanwhile begins when it does not."""
        now = time.monotonic()
        busy = self._held or self._behind or any(not task.done() for task in self._under_way.values())
        if busy or now - self._used_at < idle_s:
            return False
        self._retires_until = now + _RETIRES_S if ends else 0.0
        return True

    async def stats(self) -> dict[str, int]:
        """{"payloads", "nbytes"} that this vault owns; "behind": those that are still to be stored durably."""
        return {"payloads": len(self._held), "nbytes": sum(self._nbytes.values()), "behind": len(self._behind)}

    def _as_of_now(self, found: Snapshot) -> Snapshot:
        """The snapshot, as much older as it has lain here: a job ages while its broker is down."""
        now = time.monotonic()
        lain_s = now - self._since.get(found.job.job_id, now)
        return replace(found, job=replace(found.job, aged_s=found.job.aged_s + lain_s))

    def _obeys(self, broker: int) -> str:
        return f"broker {broker} was replaced by broker {self._broker[0]}, says vault {self._name}: it must end"

    def _forget_old_calls(self) -> None:
        for token in [t for t, task in self._under_way.items() if task.done()][:-_REMEMBERED_CALLS]:
            del self._under_way[token]

    async def _outcome_of(self, target: Target, source: FromRefs | FromMethod) -> Any:
        try:
            return await self._hand_over(target, source)
        except Exception as error:
            return _Failure.of(error)

    async def _hand_over(self, target: Target, source: FromRefs | FromMethod) -> Any:
        apart, began = None, time.monotonic()
        try:
            if isinstance(source, FromMethod):
                header, refs, apart = await self._call(source)
                began = time.monotonic()  # it was generated until now
            else:
                header, refs = source.header, [await _copy(ref) for ref in source.refs]
                if header["num_samples"] < 0:  # whoever handed in a ref cannot know how large it is
                    header = {**header, "nbytes": _nbytes(refs)}
        except _FULL as error:
            raise StoreFull(f"the object store and its spill disk are full, nothing was published: {error}") from None
        token = target.token
        payload = check_payload(self._payload(target, header, len(refs), apart is not None))
        self._held[token], self._nbytes[token] = refs, payload.nbytes
        if apart is not None:
            self._held[f"{token}.source"] = [apart]
        durably, about = target.durably, _about(target, payload)
        try:
            if durably is not None:
                sealed(about)  # what no store can hold is refused before it is published
            if durably is not None and not durably.behind:
                name = await self._stores.save(durably, token, refs, apart, about, bool(target.observed))
                payload = replace(payload, stored=name)
            elif durably is not None:
                await self._until_few_are_behind(durably.job_id, token)
            obeyed = self._broker
            recorded = await self._record(target, payload, refs)
            while obeyed != self._broker:  # the broker was replaced, and the next one may not know what it answered
                obeyed = self._broker
                recorded = await self._record(target, payload, refs)
            if target.observed:
                self._latencies.observe("publish_seconds", target.observed, time.monotonic() - began)
        except BaseException:
            await self.drop([token, f"{token}.source"])
            raise
        taken = not isinstance(recorded, Located) or recorded.version > 0
        if recorded.payload.token == token and taken and recorded.payload.vault:
            self._records[token] = recorded
            if durably is not None and durably.behind:
                self._soon(token, durably.job_id, self._store(target, about, recorded, refs, apart))
        else:  # the same content as the version that is there, or not taken, or it lies in the store alone
            await self.drop([token, f"{token}.source"])
        return recorded

    async def _until_few_are_behind(self, job_id: str, token: str) -> None:
        """Wait, before this payload is recorded, until fewer than _BEHIND of its job have still to be stored; say for
        what. Those of other jobs may have a store that fails, and those that are stored again hold up nobody."""
        troubles = self._stores.troubles
        try:
            while True:
                behind = {other: task for other, (whose, task) in self._behind.items() if whose == job_id}
                if len(behind) < _BEHIND:
                    return
                why = next((troubles[other] for other in behind if other in troubles), "")
                troubles[token] = f"{len(behind)} payloads have to be stored first: {why}" if why else ""
                await asyncio.wait(behind.values(), timeout=_SAY_EVERY_S, return_when=asyncio.FIRST_COMPLETED)
        finally:
            troubles.pop(token, None)

    def _soon(self, token: str, job_id: str, work: Coroutine[Any, Any, None]) -> None:
        """Carry it out; this job waits where there are many of it (empty: none does)."""
        task = asyncio.ensure_future(work)
        self._behind[token] = (job_id, task)
        task.add_done_callback(lambda _: self._behind.pop(token, None))

    async def _store(
        self, target: Target, about: dict[str, Any], recorded: Located | LocatedValue, refs: list[Any], apart: Any
    ) -> None:
        """Write-behind: what is recorded is stored, too, as long as it is not freed."""
        how, token = target.durably, recorded.payload.token
        assert how is not None

        def wanted() -> bool:
            return token in self._held

        told = False
        try:
            name = await self._stores.save(how, token, refs, apart, about, bool(target.observed), wanted)
            while name and wanted():
                told = True
                try:
                    await self._tell("stored", how.job_id, recorded.serial, token, name)
                    break
                except Unreachable as error:  # it is in the store, and the broker will be there again
                    logger.warning("job %s: the broker does not hear that a payload is stored: %s", how.job_id, error)
            if name and token in self._records:
                self._records[token] = replace(recorded, payload=replace(recorded.payload, stored=name))
            if name and not told:  # it was freed while it was written: nobody else knows this name
                await self._stores.delete(how, [name, *([source_name(name)] if apart is not None else [])])
        except CrossJobError as error:
            logger.error("job %s: a payload is published, but not in the durable store: %s", how.job_id, error)

    async def _call(self, source: FromMethod) -> tuple[dict[str, Any], list[Any], Any]:
        what = f"{source.method}()"
        must = f"{what} must return slime.utils.cross_job_utils.returned(...): a header and {source.parts} part(s)"
        try:
            method = getattr(source.actor, source.method)
            refs = method.options(num_returns=2 + source.parts).remote(*source.args, **source.kwargs)
        except (AttributeError, TypeError, ValueError) as error:
            raise BadInput(f"{what} cannot be called with these arguments: {error}") from None
        try:
            header = await refs[0]
            if not isinstance(header, dict) or HEADER not in header:
                raise BadInput(f"{must}; its first value is a {type(header).__name__}")
            if header[HEADER] != PROTOCOL:
                raise BadInput(f"{must} of protocol {PROTOCOL}; what it returned is of {header[HEADER]!r:.50}")
            apart = bool(header.get("source_apart"))
            for number, ref in enumerate(refs[1:]):  # "ready" may mean an error; reading a batch copies nothing
                kind = type(await ref)
                if not issubclass(kind, Batch if number < source.parts or apart else type(None)):
                    raise BadInput(f"{must}; value {number + 1} after the header is a {kind.__name__}")
        except _FULL:
            raise
        except ray.exceptions.RayTaskError as error:
            raise _raised_by(what, must, error) from None
        except ray.exceptions.RayActorError as error:
            raise ActorLost(f"the actor died in {what}: {error}. Nothing of this call was published") from None
        except (ray.exceptions.RayError, RuntimeError) as error:  # it cannot be read here; or it is StopIteration
            said = error if isinstance(error, ray.exceptions.RayError) else error.__cause__
            if not isinstance(said, ray.exceptions.RayError):
                raise
            raise MethodFailed(f"{what} raised an exception that cannot be carried here: {said}") from None
        return header, refs[1:-1], refs[-1] if apart else None

    def _payload(self, target: Target, header: dict[str, Any], parts: int, source_apart: bool) -> Payload:
        return Payload(
            token=target.token,
            vault=f"{self._name}/{self._incarnation}",
            nbytes=header.get("nbytes", 0),
            parts=parts,
            num_samples=header.get("num_samples", -1),
            weight_version=header.get("weight_version"),
            meta=header.get("meta") or {},
            made_at=time.time(),
            columns=header.get("columns") or (),
            source=header.get("source"),
            source_apart=source_apart,
        )

    async def _record(self, target: Target, payload: Payload, refs: list[Any]) -> Any:
        if target.key is not None:
            value = ("put_value", target.client_id, target.key, payload, target.version)
            return await self._tell(*value, patience_s=target.patience_s)
        call = ("publish", target.client_id, target.rollout_id, payload)
        within_s = target.patience_s
        recorded, located = await self._tell(*call, compare=payload.num_samples >= 0, patience_s=within_s)
        if not recorded and not await self._equal(located.payload, refs, target.durably):
            recorded, located = await self._tell(*call, compare=False, patience_s=within_s)
        return located

    async def _equal(self, old: Payload, refs: list[Any], durably: Durably | None) -> bool:
        """Whether the bytes of an earlier version equal these; only asked where all else is the same."""
        try:
            old_refs = await self._refs_of(old, durably)
            pairs = [(await old_ref, await ref) for old_ref, ref in zip(old_refs, refs, strict=True)]
            return await asyncio.to_thread(lambda: all(_same_bytes(*pair) for pair in pairs))
        except (PayloadLost, StoreUnreachable, NotStored, ValueError, ray.exceptions.RayError):
            return False

    async def _refs_of(self, old: Payload, durably: Durably | None) -> list[Any]:
        """Where it lies now: in a vault, or in the durable store alone."""
        if not old.vault and durably is not None:
            return await self._stores.load(durably.uri, durably.job_id, old.stored)
        name = old.vault.partition("/")[0]
        if name == self._name:
            return await self.open(old.token)
        handle: Any = await asyncio.to_thread(ray.get_actor, name, namespace=self._namespace)
        refs: list[Any] = await handle.open.remote(old.token)
        return refs

    async def _tell(self, operation: str, *args: Any, patience_s: float = PATIENCE_S, **kwargs: Any) -> Any:
        """Call the broker until it answers: every call carries its token, so that asking twice does no harm. One that
        is silent and alive is waited for as long as the client waits; one that is gone for `patience_s`."""
        began = asyncio.get_running_loop().time()
        while True:
            try:
                if self._broker_handle is None:
                    self._broker_handle = await asyncio.to_thread(
                        ray.get_actor, BROKER_NAME, namespace=self._namespace
                    )
                return await self._broker_handle.call.remote(operation, *args, **kwargs)
            except ray.exceptions.RayTaskError as error:  # what the broker itself raised, freed from Ray's wrapping
                # where its journal's store is away, it knows what it was told, and cannot keep it for now; one that
                # begins without its memory hears of its clients with their next sign of life
                bears_s = 0.0
                if isinstance(error.cause, Forgotten):
                    bears_s = _HEARD_S
                elif isinstance(error.cause, (StoreUnreachable, BrokerLost)):
                    bears_s = patience_s
                if asyncio.get_running_loop().time() >= began + bears_s:
                    raise error.cause from None
            except (ValueError, ray.exceptions.RayActorError) as error:
                self._broker_handle = None
                if asyncio.get_running_loop().time() > began + patience_s:
                    raise Unreachable(
                        f"the broker did not answer vault {self._name} for {patience_s:.0f} s, nothing was published: "
                        f"{error}"
                    ) from None
            await asyncio.sleep(0.5)

    async def _introduce(self) -> None:
        """Tell the broker, if there is one already, that this vault is here, and holds nothing of before."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            try:
                broker = ray.get_actor(BROKER_NAME, namespace=self._namespace)
                await broker.vault_here.remote(self._name, self._incarnation)
                return
            except (ValueError, ray.exceptions.RayError) as error:
                logger.info("vault %s cannot reach the broker yet: %s", self._name, error)
            await asyncio.sleep(0.5)


def vault_actor(name: str, namespace: str, node_id: str) -> Any:
    """Handle of the vault of a node, which is made where there is none."""
    vault: Any = ray.remote(Vault)
    place = NodeAffinitySchedulingStrategy(node_id=node_id, soft=False)
    options = {"lifetime": "detached", "get_if_exists": True, "num_cpus": 0, "max_restarts": -1}
    return vault.options(
        name=name, namespace=namespace, max_concurrency=1000, scheduling_strategy=place, **options
    ).remote(name, namespace, own_process=True)


def _raised_by(what: str, must: str, error: ray.exceptions.RayTaskError) -> Exception:
    """What the caller is told of an exception of the producer's method: that exception, if it can be carried there."""
    cause, text = error.cause, str(error)
    if isinstance(cause, CrossJobError):
        return cause
    if '  File "' not in text:  # no line of the method raised it: Ray did, when it counted what was returned
        return BadInput(f"{must}; Ray says: {text.strip().splitlines()[-1]}")
    with suppress(Exception):  # whatever its class does when it is pickled
        if not isinstance(cause, (ray.exceptions.RayError, StopIteration, StopAsyncIteration)):
            found = cloudpickle.loads(cloudpickle.dumps(cause))
            if isinstance(found, Exception):
                vars(found)["__notes__"] = [text.strip()]  # its traceback, which Python shows from 3.11 on
                return found
    return MethodFailed(f"{what} raised an exception that cannot be carried here: {text}")


def _load_nothing_of_slime() -> None:
    """Ray loads an actor's class, and what that imports, when its handle arrives; where it cannot, it makes do.

    A vault calls slime's actors without knowing them: it must not take seconds and gigabytes to load SGLang, nor care
    which slime they come from.
    """
    for package in ("ray", "utils", "rollout", "backends"):
        sys.modules.setdefault(f"slime.{package}", None)  # type: ignore[arg-type]


def _anew(error: Exception) -> Exception:
    """The same error without the frames that it passed through."""
    try:
        return copy.copy(error)
    except Exception:  # of a class whose arguments its copy does not know; Ray could not carry it, either
        return RuntimeError(f"{type(error).__name__}: {error}")


def _about(target: Target, payload: Payload) -> dict[str, Any]:
    """What is said of a payload to whoever looks into the store."""
    facts = {name: getattr(payload, name) for name in ("num_samples", "weight_version", "meta", "columns", "source")}
    named = {"rollout_id": target.rollout_id} if target.key is None else {"key": target.key, "version": target.version}
    return {**named, **facts, "columns": [*payload.columns]}


async def _copy(ref: Any) -> Any:
    value = await ref  # zero-copy for a batch
    return await asyncio.to_thread(ray.put, value)  # copies in a thread: hundreds of megabytes take a while


def _nbytes(refs: list[Any]) -> int:
    """Bytes of objects that this process owns; asks nobody."""
    found = ray.experimental.get_local_object_locations(refs)
    return sum(place["object_size"] or 0 for place in found.values())


def _same_bytes(old: Any, new: Any) -> bool:
    return isinstance(old, Batch) and isinstance(new, Batch) and old.ipc.equals(new.ipc)
