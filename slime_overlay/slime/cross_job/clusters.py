"""The broker's part for jobs whose clients are on several Ray clusters, with a durable store between them.

One broker keeps the journal of a job (books.py) and its ledger; it answers what the others ask (mail.py), as if its
own clients had asked. The others follow (follower.py). A keeper that is silent for TAKE_OVER_S is replaced by one of
them, as compare-and-set of the journal has it; one that wakes up finds that out, and follows, and its clients go on.
Clients that exchange handles of actors with their peer (slime's two jobs) need the keeper on their own cluster: a job
that nobody works on elsewhere is handed on to it.
"""

import asyncio
import contextlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

from .books import BEAT_S, SILENT_S, Books, keeper_of
from .errors import CrossJobError, KeptElsewhere, Refused, StoreUnreachable
from .follower import Follower
from .keeper import Keeper
from .ledger import Ledger
from .mail import Mail
from .records import DEAD, WRITE_BEHIND
from .types import ClientInfo
from .verdicts import who

logger = logging.getLogger(__name__)

TAKE_OVER_S = 15.0
_MOVES = 5  # of a job from keeper to keeper, while one call is under way
_ASK_RAY_AFTER_S = 2.0
_IDLE_S = 60.0  # after which a job that is followed for nobody is forgotten
_QUIET_S = 30.0  # without a question, after which one looks for mail seldom
_SELDOM_S = 1.0


class Clusters(ABC):
    """See the module; base of the broker."""

    _ledger: Ledger
    _books: Books
    _keeper: Keeper

    def __init__(self) -> None:
        self._followers: dict[str, Follower] = {}  # by job id
        self._answering: set[str] = set()  # names of questions
        self._asked_at = 0.0

    async def follow(self, info: ClientInfo, uri: str) -> None:
        """A client of this cluster, which this broker does not know (any more), works on a job in this store."""
        await self.hello()
        if info.client_id in self._ledger.clients or self._follower_of(info.client_id) is not None:
            return
        info = self._stamped(info)
        if info.job_id not in self._followers:
            try:
                await self._books.open(info.job_id, uri)
                return
            except KeptElsewhere:
                await self._follow(info.job_id, uri)
        follower = self._followers[info.job_id]
        follower.clients[info.client_id] = info
        follower.heard[info.client_id] = asyncio.get_running_loop().time()

    # ------------------------------------------------------------------ what the broker has for it

    @abstractmethod
    async def hello(self) -> dict[str, Any]: ...

    @abstractmethod
    async def _attach(self, info: ClientInfo, settings: dict[str, Any]) -> dict[str, Any]: ...

    @abstractmethod
    async def _call(self, operation: str, *args: Any, **kwargs: Any) -> Any: ...

    @abstractmethod
    async def _wait(self, wait_s: float, operation: str, *args: Any, **kwargs: Any) -> Any: ...

    @abstractmethod
    async def _unreadable(self, client_id: str, rollout_id: int, vault: str, token: str) -> bool: ...

    @abstractmethod
    def _spawn(self, work: Any) -> None: ...

    @abstractmethod
    async def _over_reason(self, info: ClientInfo, silent_s: float = 0.0) -> str | None: ...

    # ------------------------------------------------------------------ inside: of those that are kept elsewhere

    async def _wherever(
        self,
        first: str,
        here: Callable[[], Awaitable[Any]],
        method: str,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        wait_s: float = 0.0,
    ) -> Any:
        """Carry this out here, or ask whoever keeps the job of which `first` is the name, or that of a client."""
        for _ in range(_MOVES):
            await self._follow_what_was_let_go()
            follower = self._follower_of(first)
            try:
                if follower is None:
                    return await here()
                if method == "attach" and args[0].one_cluster:
                    await self._take_on(follower)
                    continue
                return await follower.ask(method, args, kwargs, wait_s)
            except KeptElsewhere as moved:
                await self._follow(moved.job_id, moved.uri)
        raise StoreUnreachable("the job goes from keeper to keeper: ask again")

    def _follower_of(self, first: str) -> Follower | None:
        if first in self._followers:
            return self._followers[first]
        return next((f for f in self._followers.values() if first in f.clients), None)

    def _stamped(self, info: ClientInfo) -> ClientInfo:
        return replace(info, cluster=self._books.cluster)

    async def _follow(self, job_id: str, uri: str, clients: Sequence[ClientInfo] = ()) -> None:
        """Another broker keeps this job, on which these clients work here; unless it is this one by now."""
        if self._books.is_open(job_id):
            return
        store = await self._books.store(uri)
        if job_id not in self._followers:
            self._followers[job_id] = Follower(store, uri, job_id)
            logger.warning(
                "job %s is kept by the broker of another cluster, which is asked in %s", job_id, store.shown
            )
        follower, now = self._followers[job_id], asyncio.get_running_loop().time()
        for info in clients:
            follower.clients[info.client_id], follower.heard[info.client_id] = info, now

    async def _follow_what_was_let_go(self) -> None:
        while self._books.let_go:
            job_id, (uri, clients) = self._books.let_go.popitem()
            if clients:
                await self._follow(job_id, uri, clients)
            self._spawn(self._keeper.let_go(job_id))

    async def _take_on(self, follower: Follower) -> None:
        """Keep a job that another broker keeps, for clients that need it here. Raises Refused: it is needed there."""
        silent_s = asyncio.get_running_loop().time() - follower.beat_at
        if silent_s > SILENT_S:
            await self._kept_here(follower, silent_s, started_anew=True)
            return
        await follower.ask("hand_on", (follower.job_id,), {})
        await self._kept_here(follower, 0.0)

    async def _kept_here(self, follower: Follower, silent_s: float, started_anew: bool = False) -> None:
        """Keep what was followed."""
        await self._books.open(follower.job_id, follower.uri, silent_s, started_anew)
        try:
            await self._keeper.keep(follower.job_id)  # of two that try one learns here that it came too late
        finally:
            if self._books.is_open(follower.job_id):
                self._followers.pop(follower.job_id, None)
                follower.end(KeptElsewhere(f"job {follower.job_id} is kept here now", follower.job_id, follower.uri))

    async def _watch_followers(self) -> None:
        await asyncio.sleep(BEAT_S)
        await self._follow_what_was_let_go()
        for follower in [*self._followers.values()]:
            with contextlib.suppress(CrossJobError):  # the next round tries again
                await self._look_after(follower)

    async def _look_after(self, follower: Follower) -> None:
        now = asyncio.get_running_loop().time()
        if not follower.clients and now - max(follower.used_at, follower.beat_at) > _IDLE_S:
            self._followers.pop(follower.job_id, None)
            return
        beat = await asyncio.to_thread(keeper_of, follower.store, follower.job_id)
        if beat != follower.beat:
            follower.beat, follower.beat_at = beat, now
        elif (
            now - max(follower.beat_at, follower.tried_at) > TAKE_OVER_S
            and follower.clients
            and follower.store.compare_and_set
        ):
            logger.critical(
                "job %s: its keeper is silent for %.0f s: it is kept here now", follower.job_id, TAKE_OVER_S
            )
            follower.tried_at = now  # not at every beat, where that does not succeed
            try:
                await self._kept_here(follower, TAKE_OVER_S)
            except Refused as error:
                logger.error("%s", error)
            return
        for client_id, info in [*follower.clients.items()]:
            if now - follower.heard[client_id] > _ASK_RAY_AFTER_S and (reason := await self._over_reason(info)):
                logger.warning("job %s: %s is dead: %s", follower.job_id, info.role, reason)
                await follower.ask("call", ("end", client_id, DEAD, reason), {})

    # ------------------------------------------------------------------ inside: of those that are kept here

    async def _serve(self) -> None:
        """Answer what brokers of other clusters ask."""
        loop = asyncio.get_running_loop()
        quiet = loop.time() - self._asked_at > _QUIET_S
        every_s = max((self._books.look_every_s(job_id) for job_id in self._books.kept), default=_SELDOM_S)
        await asyncio.sleep(max(every_s, _SELDOM_S) if quiet else every_s)
        for job_id in self._books.kept:
            mail = self._books.mail(job_id)
            try:
                names = await self._books.in_store(job_id, mail.questions, turn="mail")
            except CrossJobError as error:
                logger.info("job %s: cannot look for questions: %s", job_id, error)
                await asyncio.sleep(_SELDOM_S)
                continue
            for name in names:
                self._asked_at = loop.time()
                if name not in self._answering:
                    self._answering.add(name)
                    self._spawn(self._answer(job_id, mail, name))

    async def _answer(self, job_id: str, mail: Mail, name: str) -> None:
        try:
            question = await asyncio.to_thread(mail.question, name)
            if question is not None:
                outcome = await self._outcome(job_id, question)
                await asyncio.to_thread(mail.answer, name, question["asker"], outcome)
        except KeptElsewhere:
            logger.info("question %s is left to whoever keeps job %s now", name, job_id)
        except CrossJobError as error:  # it is there still: it will be carried out again
            logger.warning("question %s is answered later: %s", name, error)
        finally:
            self._answering.discard(name)

    async def _outcome(self, job_id: str, question: dict[str, Any]) -> Any:
        """What comes of it: a value, or the error that the asker is to raise."""
        method, args, kwargs = question["method"], question["args"], question["kwargs"]
        if method == "wait":
            args = [question["wait_s"], *args]
        carry_out: dict[str, Callable[..., Awaitable[Any]]] = {
            "attach": self._attach_from_afar,
            "call": self._call,
            "wait": self._wait,
            "unreadable": self._unreadable,
            "hand_on": self._hand_on,
        }
        if method not in carry_out:
            return CrossJobError(f"a broker of another cluster asks for {method!r}, which this version does not know")
        try:
            return await carry_out[method](*args, **kwargs)
        except KeptElsewhere:
            raise
        except CrossJobError as error:
            return error
        except (TypeError, AttributeError, KeyError, ValueError) as error:
            logger.exception("job %s: a question from afar", job_id)
            return CrossJobError(f"{type(error).__name__}: {error}")

    async def _attach_from_afar(self, info: ClientInfo, settings: dict[str, Any]) -> dict[str, Any]:
        if info.one_cluster:
            raise Refused(
                f"the {info.role} of job {info.job_id} needs its peer on its own Ray cluster, and the job is kept on "
                "another one: start both there"
            )
        job = self._ledger.jobs.get(info.job_id)
        if WRITE_BEHIND in (settings.get("store_mode"), job.store_mode if job is not None else ""):
            raise Refused(
                f"job {info.job_id} has clients on several Ray clusters, which read from its durable store what "
                "others publish: it needs --cross-job-store-mode write-through"
            )
        return await self._attach(info, settings)

    async def _hand_on(self, job_id: str) -> bool:
        """Another broker shall keep this job. Raises Refused where it is needed here."""
        if not self._books.is_open(job_id):
            return True  # asked before, and done
        job, living = self._ledger.jobs[job_id], [c for c in self._ledger.clients.values() if c.info.job_id == job_id]
        for client in living:
            if client.attached and (client.info.one_cluster or client.info.role == "producer"):
                raise Refused(
                    f"job {job_id} is kept on another Ray cluster, where the {who(client)} is alive: start rollout "
                    "and train job on one cluster, or choose another --job-id"
                )
        records = [v[-1] for v in job.rollouts.values()] + [*job.values.values()]
        if unstored := sum(not record.payload.stored for record in records):
            raise Refused(f"{unstored} payloads of job {job_id} lie on another Ray cluster only: start its jobs there")
        await self._keeper.keep(job_id)
        await self._books.hand_on(job_id)
        logger.warning("job %s: it is kept on another cluster from now on", job_id)
        return True
