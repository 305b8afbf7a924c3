"""The rollout side: learn which rollout is wanted, publish it, end the stream."""

import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from .batch import Batch
from .errors import BadInput, EndOfStream, WaitTimeout
from .link import START_S, Deadline, get
from .member import Member, as_source, get_parts
from .types import PROTOCOL, Located, check_rollout_id
from .vault import HEADER, FromMethod, FromRefs, Target
from .weights import KEY, Weights


@dataclass(frozen=True)
class Published:
    """A rollout that is owned by a vault and known to the broker."""

    rollout_id: int
    version: int
    nbytes: int
    num_samples: int
    meta: dict[str, Any]


class Producer(Member):
    """Publishes rollouts of one job. One producer a job id at a time; a second Ray job is refused with JobIdTaken.

    Example:
        with Producer("exp1", max_ahead=1) as producer:
            for rollout_id in producer.demands(until=100):
                producer.publish(rollout_id, columns, weight_version=3)
    """

    role = "producer"

    def __init__(self, job_id: str, **settings: Any):
        super().__init__(job_id, **settings)
        self._nodes: dict[Any, str] = {}

    def publish(
        self,
        rollout_id: int,
        value: Mapping[str, Sequence[Any]] | Batch | ray.ObjectRef | list[Batch],
        *,
        meta: Mapping[str, Any] | None = None,
        weight_version: int | None = None,
        timeout_s: float | None = None,
    ) -> Published:
        """Publish columns, a Batch, a list of them (its parts), or what an ObjectRef stands for; returns once a vault
        owns it (two copies).

        The same content again is the same version, other content the next version.

        Args:
            meta: small JSON-able facts that readers see without opening the payload.
            weight_version: which weights generated it.

        Raises:
            BatchError: the columns make no batch. Refused: the rollout was acked and freed.
            Fenced, WaitTimeout, Unreachable.
        """
        rollout_id = check_rollout_id(rollout_id)
        self.check()
        source = as_source(value)
        source = FromRefs(source.refs, {**source.header, "meta": dict(meta or {}), "weight_version": weight_version})
        return self._publish(rollout_id, source, self.info.node_id, timeout_s)

    def publish_from(
        self,
        rollout_id: int,
        actor: Any,
        method: str,
        /,
        *args: Any,
        parts: int = 1,
        timeout_s: float | None = None,
        **kwargs: Any,
    ) -> Published:
        """Publish what `actor.method(*args, **kwargs)` will return: the vault of the actor's node calls it (one copy).

        The method must return `returned(...)` with `parts` batches. While it runs, `doing` and heartbeats go on.
        An actor whose class other processes cannot import takes keyword arguments only.

        Raises:
            ActorLost: the actor died in the method. Else as `publish`, and whatever the method raises.
        """
        rollout_id = check_rollout_id(rollout_id)
        if not hasattr(actor, method):
            raise BadInput(f"the actor has no method {method!r}")
        source = FromMethod(actor, method, args, kwargs, parts)
        return self._publish(rollout_id, source, self._node_of(actor), timeout_s)

    def next_demand(
        self,
        timeout_s: float | None = None,
        *,
        start: int | None = None,
        until: int | None = None,
        gated: bool = False,
    ) -> int:
        """Wait until a rollout is wanted, at most `max_ahead` beyond the last one demanded; returns its id.

        Args:
            start: first id of this run, so that going ahead may begin before the first demand.
            until: ids from here on are not generated.
            gated: the engines take weights from the train job: wait while they do (see gate.py), and stay at `until`.

        Raises:
            EndOfStream: the consumers finished, or `until` is reached. PeerFailed: they failed. WaitTimeout.
        """
        grace_s = self.settings.peer_grace_s
        limits = {"start": start, "until": until, "gated": gated}
        return self._wait(timeout_s, "demand", "next_demand", **limits, grace_s=grace_s)

    def consumer_facts(self) -> Any:
        """What the newest consumer announced; None: it announced nothing, or has ended."""
        self.check()
        found = self.link.call("facts", self.info.client_id)
        try:
            return None if found is None else get(found[1][0], Deadline(START_S), "the train job")
        except ray.exceptions.ObjectLostError:
            return None

    def resume_point(self) -> tuple[int, dict[str, Any]] | None:
        """Highest rollout id that was ever published in this job, with its metadata; None: nothing was."""
        self.check()
        return self.link.call("resume_point", self.info.client_id)

    def demands(
        self, timeout_s: float | None = None, *, start: int | None = None, until: int | None = None
    ) -> Iterator[int]:
        """Yield the ids that are wanted, each when it may be generated, until the stream ends; see next_demand."""
        while True:
            try:
                yield self.next_demand(timeout_s, start=start, until=until)
            except EndOfStream:
                return

    def weights(self, newer_than: int | None = None, timeout_s: float = 0.0) -> Weights | None:
        """The newest weights, zero-copy; None if within `timeout_s` seconds there are none newer than `newer_than`."""
        found = self.value_ref(KEY, newer_than, timeout_s)
        return None if found is None else Weights(found[0], get_parts([found[1]], "the weights")[0], found[1])

    def _publish(
        self, rollout_id: int, source: FromRefs | FromMethod, node_id: str, timeout_s: float | None
    ) -> Published:
        target = Target(uuid.uuid4().hex, self.info.client_id, rollout_id=rollout_id)
        located: Located = self._hand_over(target, source, node_id, timeout_s, f"rollout {rollout_id}")
        payload = located.payload
        return Published(rollout_id, located.version, payload.nbytes, payload.num_samples, payload.meta)

    def _node_of(self, actor: Any) -> str:
        """Node of the actor, so that a payload is owned where it is made; this node if it does not say in time."""
        if actor not in self._nodes:
            try:
                ask = actor.__ray_call__.remote(lambda self: ray.get_runtime_context().get_node_id())
                self._nodes[actor] = get(ask, Deadline(10), "the actor")
            except WaitTimeout:
                return self.info.node_id
        return self._nodes[actor]


def returned(
    *parts: Mapping[str, Sequence[Any]] | Batch,
    meta: Mapping[str, Any] | None = None,
    weight_version: int | None = None,
) -> tuple[Any, ...]:
    """What a method that is published with `publish_from` returns: a header, then its parts as batches.

    Raises:
        BatchError: a part makes no batch.
    """
    if not parts:
        raise BadInput("returned() needs at least one part")
    batches = [part if isinstance(part, Batch) else Batch.pack(part) for part in parts]
    header = {
        HEADER: PROTOCOL,
        "nbytes": sum(batch.nbytes for batch in batches),
        "num_samples": sum(batch.num_samples for batch in batches),
        "weight_version": weight_version,
        "meta": dict(meta or {}),
    }
    return (header, *batches)
