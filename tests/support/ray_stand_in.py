"""Stand-ins for Ray and for time, to test broker, vault and replicas without a cluster; all logic is the real one; and
what lies in a durable store before.

`RayStandIn` is those parts of `ray` that they use: actors by name, put, refs; the errors are Ray's own. Arguments and
answers are copied when they are handed over, as Ray does. `Loop` is an event loop that never sleeps: where the real
one would wait for time, its clock jumps.
"""

import asyncio
import copy
import selectors
from collections.abc import Coroutine, Generator
from types import SimpleNamespace
from typing import Any

import ray

from slime.cross_job.batch import Batch
from slime.cross_job.broker.actor import Broker
from slime.cross_job.storage import open_store
from slime.cross_job.storage.payloads import Archive, new_name
from slime.cross_job.types import ClientInfo, Payload
from slime.cross_job.vault.actor import Vault
from slime.cross_job.vault.protocol import FromRefs

NAMESPACE = "ns"
VAULT = "slime_cross_job_vault_1"
OTHER = "slime_cross_job_vault_2"
DOOMSDAY_S = 100_000.0


class Loop(asyncio.SelectorEventLoop):
    """Stands in for the event loop's clock: waiting for a moment brings it at once."""

    def __init__(self) -> None:
        self.now = 1000.0
        super().__init__(_Selector(self))

    def time(self) -> float:
        return self.now


class _Selector(selectors.SelectSelector):
    def __init__(self, loop: Loop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        assert timeout is not None, "everybody waits, and nothing will ever happen"
        self._loop.now += max(timeout, 0.0)
        assert self._loop.now < DOOMSDAY_S, "what the test waits for does not come"
        return super().select(0)


class Ref:
    """Stands in for an ObjectRef: to be awaited, again and again; copies are the same ref."""

    def __init__(self, value: Any):
        self._value = value

    def __deepcopy__(self, memo: Any) -> "Ref":
        return self

    def __await__(self) -> Generator[Any, None, Any]:
        yield from asyncio.sleep(0).__await__()
        if isinstance(self._value, Exception):
            raise self._value
        return self._value


class Answer:
    """Stands in for the ref of an actor's answer: the call was sent, and goes on though nobody waits for it."""

    def __init__(self, call: Coroutine[Any, Any, Any]):
        self._task = asyncio.ensure_future(call)
        self._task.add_done_callback(lambda task: task.cancelled() or task.exception())

    def __await__(self) -> Generator[Any, None, Any]:
        return (yield from asyncio.shield(self._task).__await__())


class Remote:
    """Stands in for an actor handle: `handle.method.remote(...)`, to whoever has the name now; errors arrive wrapped
    as Ray wraps them."""

    def __init__(self, actors: dict[str, Any], name: str):
        self._actors, self._name = actors, name

    def __getattr__(self, method: str) -> Any:
        async def call(args: list[Any], kwargs: dict[str, Any]) -> Any:
            if self._name not in self._actors:
                raise ray.exceptions.ActorDiedError()
            try:
                return copy.deepcopy(await getattr(self._actors[self._name], method)(*args, **kwargs))
            except ray.exceptions.RayError:
                raise
            except Exception as error:
                raise ray.exceptions.RayTaskError(method, "traceback", error).as_instanceof_cause() from None

        def remote(*args: Any, **kwargs: Any) -> Answer:
            return Answer(call(copy.deepcopy([*args]), copy.deepcopy(kwargs)))

        return SimpleNamespace(remote=remote)


class RayStandIn:
    """Stands in for the module `ray`: actors by name, an object store that copies nothing."""

    exceptions = ray.exceptions

    def __init__(self) -> None:
        self.actors: dict[str, Any] = {}
        self.asked: list[tuple[str, str]] = []
        self.dead_nodes: set[str] = set()
        self.util = SimpleNamespace(list_named_actors=self._list_named_actors)

    def get_actor(self, name: str, namespace: str) -> Remote:
        self.asked.append((name, namespace))
        if name not in self.actors:
            raise ValueError(f"Failed to look up actor with name '{name}'")
        return Remote(self.actors, name)

    def kill(self, handle: Remote) -> None:
        del self.actors[handle._name]

    def nodes(self) -> list[dict[str, Any]]:
        """Every vault has a node of its own, with whose id its name ends."""
        ids = {name.rpartition("_")[2] for name in (VAULT, OTHER, *self.actors)}
        return [{"NodeID": node_id, "Alive": node_id not in self.dead_nodes} for node_id in ids]

    @property
    def experimental(self) -> Any:
        """Sizes of opaque values: those of the tests say theirs, as `size`."""
        return SimpleNamespace(
            get_local_object_locations=lambda refs: {
                ref: {"node_ids": [], "object_size": getattr(ref._value, "size", None)} for ref in refs
            }
        )

    def put(self, value: Any) -> Ref:
        return Ref(value)

    def get_runtime_context(self) -> Any:
        return SimpleNamespace(
            get_actor_id=lambda: "actor1", get_node_id=lambda: "node1", get_session_name=lambda: "session_1"
        )

    def _list_named_actors(self, all_namespaces: bool) -> list[dict[str, str]]:
        assert all_namespaces
        foreign = {"name": f"{VAULT}_of_others", "namespace": "other"}
        return [foreign, *({"name": name, "namespace": NAMESPACE} for name in self.actors)]


class Troubled(Vault):
    """A vault that answers late, or not at all: `troubles` says what comes of each call of a method, in turn.

    An error is raised; a number is so many seconds before the call is carried out. None, or nothing left: at once.
    """

    def __init__(self, name: str = VAULT, **troubles: list[Exception | float | None]):
        super().__init__(name, NAMESPACE)
        self.calls: list[tuple[str, Any]] = []
        for method, found in troubles.items():
            setattr(self, method, self._with_trouble(method, [*found]))

    def _with_trouble(self, method: str, troubles: list[Exception | float | None]) -> Any:
        carry_out = getattr(self, method)

        async def call(*args: Any) -> Any:
            trouble = troubles.pop(0) if troubles else None
            if isinstance(trouble, Exception):
                raise trouble
            await asyncio.sleep(trouble or 0)
            self.calls.append((method, args[0] if args else None))
            return await carry_out(*args)

        return call

    def told(self, method: str) -> list[Any]:
        """First argument of each call that was carried out."""
        return [argument for name, argument in self.calls if name == method]


class Actor:
    """Stands in for a producer's actor whose method a vault calls; the values it returns, or what it raises."""

    def __init__(self, *values: Any):
        self.values = values
        self.calls: list[tuple[int, tuple[Any, ...], dict[str, Any]]] = []

    @property
    def generate(self) -> Any:
        def options(num_returns: int) -> Any:
            def remote(*args: Any, **kwargs: Any) -> list[Ref]:
                self.calls.append((num_returns, args, kwargs))
                return [Ref(value) for value in self.values]

            return SimpleNamespace(remote=remote)

        return SimpleNamespace(options=options)


class Hangs(Exception):
    """Raised by a store: its call does not return."""


def unavailable() -> Exception:
    """What Ray says of an actor that does not answer, and may be back."""
    return ray.exceptions.ActorUnavailableError("its node does not answer", b"1" * 16)


def client(role: str, name: str | None = None, group: str = "train", ray_job: str = "") -> ClientInfo:
    name = name or role[0]
    return ClientInfo(
        name, "exp", role, group=group if role == "consumer" else "", ray_job_id=ray_job or f"r-{name}", host="h"
    )


async def attach_both(broker: Broker, dead_after_s: float = 30.0) -> None:
    await broker.attach(client("producer"), {"dead_after_s": dead_after_s})
    await broker.attach(client("consumer"), {"dead_after_s": dead_after_s})


def payload(token: str, vault: str = VAULT) -> Payload:
    return Payload(token, vault, 1)


def batch(first: int = 1) -> Batch:
    return Batch.pack({"tokens": [[first, 2], [3]]})


def from_refs(value: Any, num_samples: int = 2) -> FromRefs:
    nbytes = value.nbytes if isinstance(value, Batch) else 0
    return FromRefs([Ref(value)], {"nbytes": nbytes, "num_samples": num_samples})


def saved(uri: str, token: str) -> str:
    """What a payload is named that was written into a durable store."""
    name = new_name(token)
    Archive(open_store(uri), "exp").save(name, [Batch.pack({"x": [1]})], {})
    return name


async def settle() -> None:
    """Let everything run that needs no time."""
    for _ in range(100):
        await asyncio.sleep(0)
