"""Calls of stores that hang or are slow: each has its thread and its deadline. Real threads, a real clock."""

import asyncio
import logging
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from slime.cross_job.broker.durability import Durability
from slime.cross_job.errors import NotStored, StoreUnreachable
from slime.cross_job.ledger import Ledger
from slime.cross_job.storage import calls as calls_module
from slime.cross_job.storage.calls import Calls, progress
from slime.cross_job.storage.memory import MemoryStore
from tests.support.ledger import attach

SOON_S = 60.0  # beyond which a test has failed


class Gate:
    """A call that hangs, until it is opened."""

    def __init__(self) -> None:
        self.entered, self.opened = threading.Event(), threading.Event()
        self.calls = 0

    def __call__(self) -> str:
        self.calls += 1
        self.entered.set()
        assert self.opened.wait(SOON_S)
        return "late"


@pytest.fixture
def gate() -> Iterator[Gate]:
    made = Gate()
    yield made
    made.opened.set()


def run(test: Any) -> None:
    asyncio.run(asyncio.wait_for(test, SOON_S))


def test_a_call_gives_what_it_returns_or_raises():
    def missing() -> None:
        raise NotStored("no such key")

    async def test() -> None:
        calls = Calls("memory://x")
        assert await calls.call("exp", lambda n: n + 1, 1) == 2
        with pytest.raises(NotStored, match="no such key"):
            await calls.call("exp", missing)

    run(test())


def test_a_call_that_hangs_is_abandoned_and_said_once_and_holds_up_nothing_else(gate, caplog):
    caplog.set_level(logging.WARNING, calls_module.__name__)

    async def test() -> None:
        calls, other = Calls("file:///hung"), Calls("file:///well")
        with pytest.raises(StoreUnreachable, match="file:///hung does not answer"):
            await calls.call("exp", gate, turn="write", silent_s=0.01)
        with pytest.raises(StoreUnreachable, match=r"1 calls before this one have not returned"):
            await calls.call("exp", lambda: 1, turn="write")  # at once, and no second thread hangs
        assert gate.calls == 1
        assert await calls.call("another", lambda: 1, turn="write") == 1
        assert await other.call("exp", lambda: 1, turn="write") == 1
        assert await asyncio.to_thread(lambda: 1) == 1
        (said,) = caplog.messages
        assert said.startswith("job exp: a call of file:///hung has not returned for")
        gate.opened.set()
        while "returned after" not in caplog.text:
            await asyncio.sleep(0)
        assert await calls.call("exp", lambda: 1, turn="write") == 1

    run(test())


def test_a_store_that_hangs_takes_a_bounded_number_of_threads(gate, monkeypatch):
    monkeypatch.setattr(calls_module, "MOST_THREADS", 3)

    async def test() -> None:
        calls = Calls("file:///hung")
        for _ in range(3):
            with pytest.raises(StoreUnreachable):
                await calls.call("exp", gate, silent_s=0.01)
        with pytest.raises(StoreUnreachable, match="3 calls before this one"):
            await calls.call("exp", gate)
        assert gate.calls == 3

    run(test())


def test_a_deadline_bounds_silence_not_work():
    """The gate is passed step by step, each in time, for longer than the deadline."""

    async def test() -> None:
        loop, calls = asyncio.get_running_loop(), Calls("file:///slow")
        began = loop.time()

        def long() -> str:
            while loop.time() < began + 0.5:
                progress()
            return "done"

        assert await calls.call("exp", long, silent_s=0.25) == "done"

    run(test())


def test_who_waits_for_as_long_as_it_takes_hears_how_it_stands(gate):
    async def test() -> None:
        calls, said = Calls("file:///slow"), list[str]()

        def late(words: str) -> None:
            said.append(words)
            if len(said) == 2:
                gate.opened.set()

        assert await calls.wait("exp", gate, every_s=0.01, late=late) == "late"
        assert said[0] == "file:///slow has worked on it for 0 s"

    run(test())


class Watched(MemoryStore):
    """Tells the event loop of each sign of life; what it does hangs while `gate` is set."""

    def __init__(self, uri: str):
        super().__init__(uri)
        self.beats: asyncio.Queue[float] = asyncio.Queue()
        self.gate: Gate | None = None
        self._loop = asyncio.get_running_loop()

    def exists(self, key: str) -> bool:
        if self.gate is not None:
            self.gate()
        return super().exists(key)

    def put(self, key: str, data: Any) -> None:
        super().put(key, data)
        self._loop.call_soon_threadsafe(self.beats.put_nowait, self._loop.time())


def test_one_store_that_hangs_does_not_delay_the_signs_of_life_of_other_jobs(gate):
    async def test() -> None:
        ledger = Ledger()
        durability = Durability(ledger, "me")
        stores = {uri: Watched(uri) for uri in ("memory://bad", "memory://good")}
        durability._stores.update(stores)
        for name, uri in (("bad", "memory://bad"), ("good", "memory://good")):
            await durability.open(name, uri)
            attach(ledger, f"p-{name}", job=name, store=uri)  # or no sign of life is needed
            await stores[uri].beats.get()  # the one with which it opened
        stores["memory://bad"].gate = gate
        for _ in range(5):
            while stores["memory://good"].beats.empty():  # else the test ends by its own deadline
                await durability.beat()
                await asyncio.sleep(0)
            stores["memory://good"].beats.get_nowait()
        assert gate.calls == 1, "nothing hung: nothing is tested"
        assert stores["memory://bad"].beats.empty()
        gate.opened.set()
        while stores["memory://bad"].beats.empty():
            await durability.beat()
            await asyncio.sleep(0)

    run(test())
