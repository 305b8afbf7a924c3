"""Calls of one store from an event loop: each runs in a thread, with a deadline for its silence.

A thread that waits for a file system that hangs cannot be ended. It is abandoned: the caller gets StoreUnreachable,
and the thread keeps one of MOST_THREADS places of its store until the store answers. Other stores, and what else runs
in threads of this process, never wait for it.
"""

import asyncio
import logging
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from ..errors import StoreUnreachable

logger = logging.getLogger(__name__)

T = TypeVar("T")

MOST_THREADS = 16
SILENT_S = 20.0
"""How long a call of a few operations may take without a sign of progress; each rides out some seconds by itself."""

_here = threading.local()


def progress() -> None:
    """Called from within a long call, between two steps: its deadline begins anew."""
    call = getattr(_here, "call", None)
    if call is not None:
        call.heard = call.clock()


class _Call:
    """A call in its thread."""

    def __init__(self, job_id: str, turn: str, done: "asyncio.Future[Any]"):
        self.job_id, self.turn, self.done = job_id, turn, done
        self.clock = done.get_loop().time
        self.began = self.heard = self.clock()
        self.abandoned = False


class Calls:
    """See the module. For one event loop.

    Args:
        shown: the store, as it may be shown.
    """

    def __init__(self, shown: str):
        self._shown = shown
        self._running: set[_Call] = set()

    async def call(
        self, job_id: str, act: Callable[..., T], *args: Any, turn: str = "", silent_s: float = SILENT_S
    ) -> T:
        """What `act(*args)` returns or raises.

        Args:
            turn: calls of one job with the same turn run one after the other, also after one that was abandoned.
            silent_s: deadline, from the beginning or from its last `progress`.

        Raises:
            StoreUnreachable: it has not returned by then, or the calls before it have not.
        """
        await self._room(job_id, turn, silent_s)
        call = self._start(job_id, turn, act, args)
        while not call.done.done():
            left = call.heard + silent_s - call.clock()
            if left <= 0:
                raise self._abandon(call)
            await asyncio.wait([call.done], timeout=left)
        found: T = call.done.result()
        return found

    async def wait(self, job_id: str, act: Callable[[], T], every_s: float, late: Callable[[str], None]) -> T:
        """Like `call`, for as long as it takes; every `every_s` seconds `late` is told in words how it stands."""
        while True:
            try:
                await self._room(job_id, "", every_s)
                break
            except StoreUnreachable as error:
                late(str(error))
            await asyncio.sleep(min(1.0, every_s))
        call = self._start(job_id, "", act, ())
        while not call.done.done():
            await asyncio.wait([call.done], timeout=every_s)
            if not call.done.done():
                late(f"{self._shown} has worked on it for {call.clock() - call.began:.0f} s")
        found: T = call.done.result()
        return found

    # ------------------------------------------------------------------ inside

    async def _room(self, job_id: str, turn: str, within_s: float) -> None:
        """Wait until it may begin."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + within_s
        while before := self._before(job_id, turn):
            left = deadline - loop.time()
            if left <= 0 or all(call.abandoned for call in before):
                longest = loop.time() - min(call.began for call in before)
                raise StoreUnreachable(
                    f"{self._shown} does not answer: {len(before)} calls before this one have not returned, the "
                    f"longest for {longest:.0f} s"
                )
            await asyncio.wait({c.done for c in before}, timeout=left, return_when=asyncio.FIRST_COMPLETED)

    def _before(self, job_id: str, turn: str) -> list[_Call]:
        """Calls of which one must return first."""
        mine = [call for call in self._running if turn and (call.job_id, call.turn) == (job_id, turn)]
        return mine or ([*self._running] if len(self._running) >= MOST_THREADS else [])

    def _start(self, job_id: str, turn: str, act: Callable[..., Any], args: tuple[Any, ...]) -> _Call:
        call = _Call(job_id, turn, asyncio.get_running_loop().create_future())
        self._running.add(call)
        call.done.add_done_callback(lambda _: self._returned(call))

        def act_here() -> Any:
            _here.call = call
            return act(*args)

        in_thread(act_here, call.done)
        return call

    def _abandon(self, call: _Call) -> StoreUnreachable:
        call.abandoned = True
        silent_s = call.clock() - call.heard
        logger.error(
            "job %s: a call of %s has not returned for %.0f s, and is abandoned", call.job_id, self._shown, silent_s
        )
        return StoreUnreachable(f"{self._shown} does not answer for {silent_s:.0f} s")

    def _returned(self, call: _Call) -> None:
        self._running.discard(call)
        call.done.exception()  # where nobody hears of it any more, that is no error
        if call.abandoned:
            took_s = call.clock() - call.began
            logger.warning("job %s: the call of %s returned after %.0f s", call.job_id, self._shown, took_s)


def in_thread(act: Callable[[], Any], done: "asyncio.Future[Any]") -> None:
    """Carry it out in a thread of its own, which the end of the process does not wait for; `done` is what comes of
    it."""
    loop = done.get_loop()

    def set_result(result: Any, error: BaseException | None) -> None:
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(result)

    def run() -> None:
        result, error = None, None
        try:
            result = act()
        except BaseException as raised:  # whatever it is, the caller gets it
            error = raised
        try:
            loop.call_soon_threadsafe(set_result, result, error)
        except RuntimeError:  # the loop is closed: nobody waits
            logger.debug("the event loop ended before a store answered")

    threading.Thread(target=run, name="cross-job-store", daemon=True).start()
