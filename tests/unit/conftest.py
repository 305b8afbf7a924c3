"""A ledger, and a broker and a vault on an event loop, whose clocks the test moves; see tests/support."""

import asyncio
import gc
import importlib
import inspect
import sys
import uuid
from collections.abc import Callable, Coroutine, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from slime.cross_job.broker import actor as broker_module
from slime.cross_job.broker import replicas as replicas_module
from slime.cross_job.broker.actor import Broker
from slime.cross_job.ledger import Ledger
from slime.cross_job.storage import calls
from slime.cross_job.types import BROKER_NAME, ClientInfo
from slime.cross_job.vault import actor as vault_module
from slime.cross_job.vault import durable as durable_module
from slime.cross_job.vault.actor import Vault
from tests.support.ledger import Clock, attach_pair
from tests.support.ray_stand_in import NAMESPACE, VAULT, Hangs, Loop, RayStandIn


def pytest_sessionfinish() -> None:
    """Python 3.11 takes what it collects while it parses for an error of that (SystemError: AST constructor recursion
    depth mismatch), and hypothesis is imported after this, for its summary: no event loop is left to collect then."""
    gc.collect()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def ledger(clock: Clock) -> Ledger:
    return Ledger(clock, wall=clock)


@pytest.fixture
def pair(ledger: Ledger) -> Ledger:
    """A ledger with the producer p and the consumer c of group train."""
    attach_pair(ledger)
    return ledger


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch) -> Iterator[Loop]:
    """What the test stands in for stands until the tasks have ended, hence `monkeypatch`."""
    loop = Loop()
    asyncio.set_event_loop(loop)
    yield loop
    for task in asyncio.all_tasks(loop):
        task.cancel()
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    asyncio.set_event_loop(None)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """A test that is a coroutine function runs on `loop`, which one of its fixtures makes."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    given = {name: pyfuncitem.funcargs[name] for name in inspect.signature(pyfuncitem.obj).parameters}
    pyfuncitem.funcargs["loop"].run_until_complete(pyfuncitem.obj(**given))
    return True


@pytest.fixture
def run(loop: Loop) -> Callable[[Coroutine[Any, Any, Any]], Any]:
    return loop.run_until_complete


@pytest.fixture
def over() -> dict[str, str]:
    """Client id -> why Ray says that it is over; empty: Ray calls it alive. Of others nobody can tell."""
    return {}


@pytest.fixture
def asked() -> list[str]:
    """Ids of the clients that Ray was asked about."""
    return []


@pytest.fixture
def ray_stand_in(loop: Loop, monkeypatch: pytest.MonkeyPatch, over: dict[str, str], asked: list[str]) -> RayStandIn:
    async def at_once(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        await asyncio.sleep(0)
        return function(*args, **kwargs)

    def over_reason(info: ClientInfo, silent_s: float = 0.0) -> str | None:
        asked.append(info.client_id)
        return over.get(info.client_id)

    def in_loop(act: Callable[[], Any], done: "asyncio.Future[Any]") -> None:
        def carry_out() -> None:
            try:
                done.set_result(act())
            except Hangs:
                pass
            except Exception as error:
                done.set_exception(error)

        loop.call_soon(carry_out)

    stand_in = RayStandIn()
    for module in (broker_module, durable_module, replicas_module, vault_module):
        monkeypatch.setattr(module, "ray", stand_in)
    monkeypatch.setattr(asyncio, "to_thread", at_once)
    monkeypatch.setattr(calls, "in_thread", in_loop)
    monkeypatch.setattr(broker_module, "ask_ray", at_once)
    monkeypatch.setattr(broker_module, "over_reason", over_reason)
    monkeypatch.setattr(broker_module, "job_words", lambda ray_job_id: None)
    monkeypatch.setattr(broker_module, "Ledger", lambda: Ledger(loop.time, loop.time))
    return stand_in


@pytest.fixture
def uri() -> str:
    """A durable store in memory, of this test alone."""
    return f"memory://{uuid.uuid4().hex}"


@pytest.fixture
def broker(ray_stand_in: RayStandIn) -> Broker:
    made = Broker(NAMESPACE)
    ray_stand_in.actors[BROKER_NAME] = made
    return made


@pytest.fixture
def vault(ray_stand_in: RayStandIn) -> Vault:
    made = Vault(VAULT, NAMESPACE)
    ray_stand_in.actors[VAULT] = made
    return made


@pytest.fixture
def train_driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module, without its gateway, which imports slime."""
    monkeypatch.setitem(sys.modules, "slime.cross_job.adapter.gateway", SimpleNamespace(Gateway=None))
    yield importlib.import_module("slime.cross_job.adapter.train_driver")
    del sys.modules["slime.cross_job.adapter.train_driver"]


@pytest.fixture
def gateway(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module, without slime's boxes."""
    monkeypatch.setitem(sys.modules, "slime.cross_job.adapter.boxes", SimpleNamespace(boxes_anew=None, boxes_of=None))
    yield importlib.import_module("slime.cross_job.adapter.gateway")
    del sys.modules["slime.cross_job.adapter.gateway"]
