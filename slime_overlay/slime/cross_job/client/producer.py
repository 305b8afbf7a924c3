"""The rollout side: learn which rollout is wanted, publish it, end the stream."""

import logging
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from ..batch import Batch
from ..deadline import Deadline
from ..errors import BadInput, EndOfStream, NoResources, PayloadLost, WaitTimeout
from ..types import PROTOCOL, Located, check_facts, check_number, check_rollout_id, check_version, shortened
from ..vault.protocol import HEADER, FromMethod, FromRefs, Target
from .connection import get
from .placement import Limits, shortage
from .session import Session, as_source, get_parts, read_source, small_or_apart
from .weights import KEY, Weights

logger = logging.getLogger(__name__)

_LOOK_S = 5.0  # after which one looks why an actor does not answer


@dataclass(frozen=True)
class Published:
    """A rollout that is owned by a vault and known to the broker.

    Version 0: it was not taken, because the weights that generated it are those of a checkpoint to which the consumers
    went back while it was generated; it is demanded again.
    """

    rollout_id: int
    version: int
    nbytes: int
    num_samples: int
    meta: dict[str, Any]


class Producer(Session):
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
        self._stores: dict[str, float] = {}  # node -> bytes of its object store, or of what was warned of

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
            meta: JSON-able facts that readers see without opening the payload, at most 256 KiB as JSON.
            weight_version: which weights generated it, 0 or greater.

        Raises:
            BatchError: the columns make no batch. BadInput. Refused: the rollout was acked and freed.
            Fenced, WaitTimeout, Unreachable.
        """
        rollout_id = check_rollout_id(rollout_id)
        facts = {"meta": check_facts(meta, "meta"), "weight_version": check_version(weight_version)}
        self.check()
        source = as_source(value)
        source = FromRefs(source.refs, {**source.header, **facts})
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
        repeatable: bool = False,
        **kwargs: Any,
    ) -> Published:
        """Publish what `actor.method(*args, **kwargs)` will return: the vault of the actor's node calls it (one copy).

        The method must return `returned(...)` with `parts` batches. While it runs, `doing` and heartbeats go on.
        An actor whose class other processes cannot import takes keyword arguments only.

        Args:
            repeatable: the method may be called again with the same arguments, which happens if the vault dies.

        Raises:
            ActorLost: the actor died in the method. Unreachable: the vault died; nothing was published.
            NoResources: the actor has not started, because no node has, or has free, what it needs.
            MethodFailed: the method raised an exception that cannot be carried here.
            Else as `publish`, and whatever the method raises.
        """
        rollout_id, parts = check_rollout_id(rollout_id), check_number(parts, "parts", 1)
        if not isinstance(actor, ray.actor.ActorHandle):
            raise BadInput(
                f"a {type(actor).__name__} is no handle of an actor: give what ACTOR_CLASS.remote(...) returned"
            )
        if not isinstance(method, str) or not hasattr(getattr(actor, method, None), "remote"):
            raise BadInput(f"the actor has no method {shortened(method, 100)}")
        source = FromMethod(actor, method, args, kwargs, parts)
        timeout_s = self.settings.rollout_timeout_s if timeout_s is None else timeout_s
        return self._publish(
            rollout_id, source, self._node_of(actor, self._deadline(timeout_s)), timeout_s, repeatable
        )

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
        limits = {"start": check_version(start, "start"), "until": check_version(until, "until"), "gated": bool(gated)}
        return self._wait(timeout_s, "demand", "next_demand", **limits, grace_s=grace_s)

    def set_aside(self, rollout_id: int, reason: str) -> str:
        """Say that what was generated as `rollout_id` cannot be published for what it holds. Returns the job's
        --cross-job-on-poison: `stop` (both jobs end, and name it) or `skip` (it is wanted again, from new prompts).
        """
        self.check()
        return str(self.connection.call("set_aside", self.info.client_id, check_rollout_id(rollout_id), reason))

    def patient_demand(self, **limits: Any) -> int | None:
        """`next_demand`, waited for as long as the consumers live, are paused or full: a training step may take its
        time; a train job that is not there may not. None: the stream ended. Raises PeerFailed, WaitTimeout."""
        while True:
            try:
                return self.next_demand(**limits)
            except EndOfStream as end:
                logger.info("%s", end)
                return None
            except WaitTimeout as waited:
                if waited.verdict.get("kind") not in ("alive", "slow", "paused", "full"):
                    raise
                logger.warning("%s", waited)

    def consumer_facts(self) -> Any:
        """What the newest consumer announced; None: it announced nothing, or has ended."""
        self.check()
        found = self.connection.call("facts", self.info.client_id)
        try:
            return None if found is None else get(found[1][0], Deadline(self.connection.patience_s), "the train job")
        except ray.exceptions.ObjectLostError:
            return None

    def source_before(self, rollout_id: int) -> tuple[int, Any]:
        """(n, where the source of prompts stood before the generation of `rollout_id`), which is the n-th of this job.

        The second is what `returned(..., source=)` said of the generation before it; None at the source's beginning,
        or where nobody said it. What is generated again (lost, or too stale) begins where it began the first time; all
        else where the newest generation ended. So no prompt is skipped or repeated, whichever process asks.

        Raises:
            PayloadLost: it is large, and went with its vault.
        """
        self.check()
        position, payload = self.connection.call("source_before", self.info.client_id, check_rollout_id(rollout_id))
        try:
            return position, None if payload is None else read_source(self.connection, payload)
        except PayloadLost as error:
            raise PayloadLost(
                f"where the source of prompts stood before rollout {rollout_id} of job {self.job_id} is lost: {error}."
                " If nothing was published yet, start the train job again from its checkpoint; else begin anew under "
                "another --job-id, from a checkpoint that knows it"
            ) from None

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
        found = self._value(KEY, newer_than, timeout_s)
        if found is None:
            return None
        located, ref = found
        return Weights(located.version, get_parts([ref], "the weights")[0], ref, located.payload.token)

    def _publish(
        self,
        rollout_id: int,
        source: FromRefs | FromMethod,
        node_id: str,
        timeout_s: float | None,
        repeatable: bool = True,
    ) -> Published:
        durably = self._durably_within(timeout_s)
        observed = self.job_id if self.metrics else ""
        target = Target(
            uuid.uuid4().hex,
            self.info.client_id,
            rollout_id=rollout_id,
            durably=durably,
            observed=observed,
            patience_s=self._patience_s(timeout_s),
        )
        what = f"rollout {rollout_id}"
        located: Located = self._hand_over(target, source, node_id, timeout_s, what, repeatable)
        payload = located.payload
        self._warn_if_too_large(payload.nbytes, node_id)
        if not located.version:
            logger.warning(
                "job %s: rollout %d was not taken: it comes from weights %s, but was begun for newer ones; the train "
                "job went back to a checkpoint meanwhile",
                *(self.job_id, rollout_id, payload.weight_version),
            )
        return Published(rollout_id, located.version, payload.nbytes, payload.num_samples, payload.meta)

    def _warn_if_too_large(self, nbytes: int, node_id: str) -> None:
        """Ray puts on disk what its object store cannot hold, which works, and is slow; said once."""
        if node_id not in self._stores:
            self._stores |= {n["NodeID"]: n["Resources"].get("object_store_memory", 0) for n in ray.nodes()}
        room = self._stores.setdefault(node_id, nbytes)
        if nbytes > room:
            self._stores[node_id] = nbytes
            logger.warning(
                "job %s: a rollout of %d bytes is larger than its node's object store (%d): Ray keeps it on disk, "
                "which is slow; start the nodes with a larger --object-store-memory",
                *(self.job_id, nbytes, room),
            )

    def _node_of(self, actor: Any, deadline: Deadline) -> str:
        """Node of the actor, so that a payload is owned where it is made; this node if it is too busy to say.

        Raises:
            NoResources: it has not started within the deadline, or no node could hold it.
        """
        if actor in self._nodes:
            return self._nodes[actor]
        limits = Limits(self.settings, self.doing)
        while True:
            try:
                ask = actor.__ray_call__.remote(lambda self: ray.get_runtime_context().get_node_id())
                self._nodes[actor] = get(ask, Deadline(min(_LOOK_S, deadline.left())), "the actor")
                return self._nodes[actor]
            except WaitTimeout:
                missing = shortage(actor)
                if missing is None:
                    return self.info.node_id
                limits.check(missing)
                if not deadline:
                    raise NoResources(
                        f"nothing was started within {deadline.timeout_s:g} s: {missing.message}"
                    ) from None
            except ray.exceptions.RayActorError:  # the vault will say so when it calls it
                return self.info.node_id


def returned(
    *parts: Mapping[str, Sequence[Any]] | Batch,
    meta: Mapping[str, Any] | None = None,
    weight_version: int | None = None,
    source: Any = None,
) -> tuple[Any, ...]:
    """What a method that is published with `publish_from` returns: a header, its parts as batches, and its source.

    Args:
        meta, weight_version: as of Producer.publish.
        source: where its source of prompts stands now (JSON-able or a Batch, of any size), see
            Producer.source_before.

    Raises:
        BatchError: a part makes no batch. BadInput: `meta` or `source` hold something else than JSON can.
    """
    if not parts:
        raise BadInput("returned() needs at least one part")
    batches = [part if isinstance(part, Batch) else Batch.pack(part) for part in parts]
    source, apart = small_or_apart(source)
    header = {
        HEADER: PROTOCOL,
        "nbytes": sum(batch.nbytes for batch in batches),
        "num_samples": sum(batch.num_samples for batch in batches),
        "columns": [*batches[0]],
        "weight_version": check_version(weight_version),
        "meta": check_facts(meta, "meta"),
        "source": source,
        "source_apart": apart is not None,
    }
    return (header, *batches, apart)
