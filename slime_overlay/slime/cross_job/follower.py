"""A job that a broker of another cluster keeps, as the broker of this one sees it, whose clients work on it, too.

It keeps nothing: every operation of a client goes to the keeper, as a question in the job's durable store (mail.py),
and so does every sign of life. What is published here lies in that store alone, where everybody can read it. A keeper
that gives no sign of life for a while is replaced: clusters.py.
"""

import asyncio
import logging
import uuid
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from .archive import new_name
from .errors import CrossJobError, KeptElsewhere, NotStored, Refused, StoreUnreachable
from .mail import Mail
from .stores import Store
from .types import ClientInfo, Payload

logger = logging.getLogger(__name__)

_ANSWER_S = 20.0  # beyond what a question itself may wait
_NEEDS_RAY = frozenset(["announce", "facts"])


class Follower:
    """See the module.

    Args:
        uri: of the store.
    """

    def __init__(self, store: Store, uri: str, job_id: str):
        self.store, self.uri, self.job_id = store, uri, job_id
        self.clients: dict[str, ClientInfo] = {}  # of this cluster, by id
        self.heard: dict[str, float] = {}  # by client id: when it last asked anything (loop's clock)
        self.beat: Any = None  # the keeper's last sign of life
        self.beat_at = self.used_at = asyncio.get_running_loop().time()  # when that was first seen; the last question
        self.tried_at = 0.0  # to keep the job in the place of a keeper that is silent
        self._mail = Mail(store, job_id)
        self._me = uuid.uuid4().hex
        self._pending: dict[str, asyncio.Future[None]] = {}
        self._looking: asyncio.Task[None] | None = None
        self._over: KeptElsewhere | None = None

    async def ask(self, method: str, args: Sequence[Any], kwargs: dict[str, Any], wait_s: float = 0.0) -> Any:
        """What the keeper's `method` returns, or raises.

        Raises:
            StoreUnreachable: no keeper answers, for now, or the store does not. KeptElsewhere: ask anew, it has
            another keeper. Refused: it cannot be asked of another cluster.
        """
        if self._over is not None:
            raise self._over
        self._check(args)
        loop = asyncio.get_running_loop()
        self.used_at = loop.time()
        name, answered = new_name(uuid.uuid4().hex), loop.create_future()
        sent = [replace(a, vault="") if isinstance(a, Payload) else a for a in args]
        self._pending[name] = answered
        try:
            question = {"method": method, "args": sent, "kwargs": kwargs, "wait_s": wait_s}
            await asyncio.to_thread(self._mail.ask, name, self._me, question)
            if self._looking is None or self._looking.done():
                self._looking = loop.create_task(self._look())
            await asyncio.wait_for(answered, wait_s + _ANSWER_S)
            found = await asyncio.to_thread(self._mail.take, name, self._me)
        except (asyncio.TimeoutError, NotStored):
            await asyncio.to_thread(self._mail.withdraw, name)
            raise StoreUnreachable(
                f"the broker that keeps job {self.job_id}, on another cluster, does not answer in {self.store.shown} "
                f"for {wait_s + _ANSWER_S:.0f} s"
            ) from None
        finally:
            self._pending.pop(name, None)
        self._note(method, args)
        return found

    def end(self, now: KeptElsewhere) -> None:
        """It is kept by somebody else now: whoever waits for an answer asks anew."""
        self._over = now
        for waiting in self._pending.values():
            if not waiting.done():
                waiting.set_exception(now)
        if self._looking is not None:
            self._looking.cancel()

    # ------------------------------------------------------------------ inside

    def _check(self, args: Sequence[Any]) -> None:
        if args and args[0] in _NEEDS_RAY:
            raise Refused(
                f"job {self.job_id} is kept by the broker of another Ray cluster: handles of this one's actors are of "
                "no use there. Start both jobs on one cluster"
            )
        for payload in args:
            if isinstance(payload, Payload) and not payload.stored:
                raise Refused(
                    f"job {self.job_id} is kept by the broker of another Ray cluster: what is published here must be "
                    "in its durable store first: --cross-job-store-mode write-through"
                )

    def _note(self, method: str, args: Sequence[Any]) -> None:
        """Who of our clients lives."""
        now = asyncio.get_running_loop().time()
        if method == "attach":
            self.clients[args[0].client_id] = args[0]
            self.heard[args[0].client_id] = now
        elif len(args) > 1 and args[1] in self.clients:
            self.heard[args[1]] = now
            if args[0] == "end":
                self.clients.pop(args[1])
                self.heard.pop(args[1])

    async def _look(self) -> None:
        """While anybody waits: look which answers are there."""
        while self._pending:
            try:
                for name in await asyncio.to_thread(self._mail.answers, self._me):
                    waiting = self._pending.get(name)
                    if waiting is not None and not waiting.done():
                        waiting.set_result(None)
            except CrossJobError as error:  # who waits has a deadline of his own
                logger.info("job %s: cannot look for answers: %s", self.job_id, error)
            await asyncio.sleep(self.store.look_every_s)
