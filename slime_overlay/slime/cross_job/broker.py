"""The broker: a thin Ray shell around the ledger. Detached, named, one per namespace; it never sees a payload.

It adds to the ledger what needs a running process: waiting (long polls that end when something changed), the watch
over silent clients (it asks Ray whether their job, actor or node is gone), telling vaults what they may free.
Undecorated, so that it can be tested without Ray; `link.py` makes the actor.
"""

import asyncio
import contextlib
import logging
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import ray

from .errors import JobIdTaken
from .ledger import Ledger
from .liveness import over_reason
from .records import DEAD, Client
from .types import PROTOCOL, ClientInfo

logger = logging.getLogger(__name__)

_WATCH_EVERY_S = 1.0
_ASK_RAY_AFTER_S = 3.0  # silence after which Ray is asked about a client
_OPERATIONS = frozenset(
    [
        "heartbeat",
        "end",
        "publish",
        "next_demand",
        "resume_point",
        "announce",
        "facts",
        "demand",
        "begin_update",
        "end_update",
        "break_update",
        "loaded",
        "unloaded",
        "claim",
        "ack",
        "release",
        "get",
        "catalog",
        "versions",
        "put_value",
        "get_value",
        "forget",
        "peer_verdict",
        "status",
    ]
)


class Broker:
    """See the module. Every method is a coroutine on one event loop, so that the ledger needs no lock."""

    def __init__(self, namespace: str, protocol: int = PROTOCOL):
        self._namespace = namespace
        self._protocol = protocol
        self._ledger = Ledger()
        self._changed = asyncio.Event()
        self._drops: dict[str, list[str]] = defaultdict(list)
        self._telling: set[asyncio.Task[None]] = set()
        self._watch: asyncio.Task[None] | None = None

    async def hello(self) -> dict[str, Any]:
        """Who is here: {"protocol", "namespace", "actor_id"}. Starts the watch."""
        if self._watch is None:
            self._watch = asyncio.get_running_loop().create_task(self._watch_forever())
        actor_id = ray.get_runtime_context().get_actor_id()
        return {"protocol": self._protocol, "namespace": self._namespace, "actor_id": actor_id}

    async def attach(self, info: ClientInfo, settings: dict[str, Any]) -> dict[str, Any]:
        """Ledger.attach; a producer that stands in the way is first checked with Ray, not only by its heartbeat."""
        try:
            granted = self._ledger.attach(info, **settings)
        except JobIdTaken:
            holder = self._ledger.jobs[info.job_id].producer
            if holder is None or not await self._is_over(holder):
                raise
            granted = self._ledger.attach(info, **settings)
        logger.info(
            "job %s: %s attached, epoch %d (Ray job %s)", info.job_id, info.role, granted["epoch"], info.ray_job_id
        )
        self._wake()
        return granted

    async def call(self, operation: str, *args: Any, **kwargs: Any) -> Any:
        """Carry out a ledger operation by name."""
        result = self._operation(operation)(*args, **kwargs)
        if operation != "heartbeat":
            self._wake()
        return result

    async def wait(self, wait_s: float, operation: str, *args: Any, **kwargs: Any) -> Any:
        """Like `call`, asked again at every change until it finds something; None after `wait_s` seconds."""
        ask, loop = self._operation(operation), asyncio.get_running_loop()
        deadline = loop.time() + wait_s
        while (found := ask(*args, **kwargs)) is None:
            left = deadline - loop.time()
            if left <= 0:
                return None
            with contextlib.suppress(asyncio.TimeoutError):  # a second at most: some answers change with time alone
                await asyncio.wait_for(self._changed.wait(), min(left, 1.0))
        return found

    def _operation(self, name: str) -> Callable[..., Any]:
        if name not in _OPERATIONS:
            raise AttributeError(f"the broker has no operation {name!r}")
        return getattr(self._ledger, name)

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
        for vault, token in self._ledger.take_drops():
            self._drops[vault].append(token)
        if self._drops:
            task = asyncio.get_running_loop().create_task(self._tell_vaults())
            self._telling.add(task)  # the loop itself holds tasks weakly
            task.add_done_callback(self._telling.discard)

    async def _tell_vaults(self) -> None:
        drops, self._drops = self._drops, defaultdict(list)
        for vault, tokens in drops.items():
            try:
                handle = await asyncio.to_thread(ray.get_actor, vault, namespace=self._namespace)
                await asyncio.wait_for(_answer(handle.drop.remote(tokens)), 30)
            except (ValueError, ray.exceptions.ActorDiedError):
                logger.info("vault %s is gone, and %d payloads that were to be freed with it", vault, len(tokens))
            except (ray.exceptions.RayError, asyncio.TimeoutError) as error:
                logger.warning("vault %s does not answer (%s): %d payloads are freed later", vault, error, len(tokens))
                self._drops[vault].extend(tokens)

    async def _is_over(self, client: Client) -> bool:
        reason = await asyncio.to_thread(over_reason, client.info)
        if reason is not None and client.live:
            self._ledger.end(client.info.client_id, DEAD, reason)
            logger.warning("job %s: %s is dead: %s", client.info.job_id, client.info.role, reason)
        return not client.live

    async def _watch_forever(self) -> None:
        while True:
            await asyncio.sleep(_WATCH_EVERY_S)
            try:
                gone = self._ledger.tick()
                gone += [c for c in self._ledger.silent(_ASK_RAY_AFTER_S) if await self._is_over(c)]
                if gone or self._drops:
                    self._wake()
            except Exception:  # the watch must outlive whatever Ray answers; the next round tries again
                logger.exception("watch over clients")


async def _answer(ref: Any) -> Any:
    return await ref
