"""The train side: demand rollouts, claim them, read them, ack them; publish new weights."""

import asyncio
import logging
import threading
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from functools import cached_property
from types import TracebackType
from typing import Any

from .batch import Batch
from .errors import (
    BadInput,
    BrokerLost,
    EndOfStream,
    PayloadLost,
    Refused,
    Stopped,
    StoreUnreachable,
    Unreachable,
    WaitTimeout,
)
from .link import START_S, Deadline
from .member import Member, get_parts, read_source
from .metrics import Latencies
from .types import Located, check_name, check_names, check_number, check_plain, check_rollout_id, check_version
from .weights import KEY, pack_weights

logger = logging.getLogger(__name__)


class Rollout:
    """A published rollout in the hands of a consumer; the payload is read when it is first looked at.

    As a context manager it is acked when the block ends without an exception, else given back.

    Attributes:
        job_id, rollout_id, version, weight_version, num_samples, nbytes, meta, published_at (wall clock, s): as
            published.
    """

    def __init__(self, consumer: "Consumer", located: Located):
        self._consumer = consumer
        self._located = located
        self.job_id = located.job_id
        self.rollout_id = located.rollout_id
        self.version = located.version
        self.weight_version = located.payload.weight_version
        self.num_samples = located.payload.num_samples
        self.nbytes = located.payload.nbytes
        self.meta = located.payload.meta
        self.published_at = located.published_at

    @cached_property
    def refs(self) -> list[Any]:
        """Ray refs to the parts, owned by a vault: other actors may `ray.get` them on their own nodes.

        A rollout that was claimed has them already; PayloadLost is for those that were only looked at.
        """
        return self._consumer.link.open_refs(self._located.payload)

    @property
    def source(self) -> Any:
        """Where the producer's source of prompts stood after this rollout (JSON-able); None: it did not say. To be
        kept in a checkpoint, for Consumer.resume. Raises PayloadLost."""
        return read_source(self._consumer.link, self._located.payload)

    @cached_property
    def parts(self) -> list[Any]:
        """All parts, zero-copy where they lie on this node. Raises PayloadLost."""
        with self._consumer.span("transfer", self.rollout_id):
            return get_parts(self.refs, f"rollout {self.rollout_id} of job {self._located.job_id}")

    @property
    def batch(self) -> Batch:
        """The batch of a rollout with one part (or whatever was published through a ref)."""
        if len(self.parts) != 1:
            raise BadInput(f"rollout {self.rollout_id} has {len(self.parts)} parts: read .parts")
        return self.parts[0]

    def ack(self) -> None:
        """See Consumer.ack."""
        self._consumer.ack(self.rollout_id)

    def release(self) -> None:
        """See Consumer.release."""
        self._consumer.release(self.rollout_id)

    def __enter__(self) -> "Rollout":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.ack()
            return
        try:
            self.release()
        except Exception as other:  # the error that passes through matters more
            logger.warning("could not give rollout %d back: %s", self.rollout_id, other)


class Consumer(Member):
    """Claims rollouts of one job. Consumers of one group share them; every group gets all of them.

    Example:
        with Consumer("exp1") as consumer:
            for rollout_id in range(100):
                consumer.demand(rollout_id)
                with consumer.claim(rollout_id, timeout_s=600) as rollout:
                    train(rollout.batch)
                consumer.publish_weights(rollout_id + 1, model.state_dict())
    """

    role = "consumer"

    def __init__(self, job_id: str, group: str = "train", *, columns: Sequence[str] = (), **settings: Any):
        """See Member. `columns`: those that every batch must have: a producer that says that its batches lack them is
        refused, or this consumer is; a batch without them is refused when it is claimed."""
        group = check_name(group, "a consumer group")
        self._columns = check_names(columns, "columns")
        self._unanswered: list[str] = []  # tokens of claims that may have been granted, though nobody heard it
        self._releasing = threading.Lock()
        self._latencies = Latencies()
        super().__init__(job_id, group=group, columns=self._columns, **settings)

    def resume(self, rollout_id: int, source: Any = None) -> None:
        """This consumer goes on from a checkpoint that covers every rollout below `rollout_id`, and no other.

        What its group acked from there on can be claimed again, the same bytes, as far as --cross-job-retain goes;
        what lies below is acked. Another consumer of the group that is silent is waited for, until its lease ends.

        Args:
            source: Rollout.source of the last rollout that the checkpoint covers, if it kept that: where nothing was
                published yet, as on a new cluster, the rollout job goes on from there.

        Raises:
            JobIdTaken: a consumer of this group is alive in another Ray job.
            RolloutNotFound: something from `rollout_id` on was acked and freed.
        """
        self.check()
        rollout_id, source = check_rollout_id(rollout_id), check_plain(source, "source")
        found = self._when_free(lambda: self.link.call("resume", self.info.client_id, rollout_id, source))
        if found["again"] or found["acked"]:
            logger.info(
                "job %s: resumed at rollout %d: acked before and wanted again: %s; acked now: %s",
                *(self.job_id, rollout_id, found["again"], found["acked"]),
            )

    def be_first(self) -> None:
        """For a group of which one Ray job at a time consumes: wait until the one before this is over.

        Raises:
            JobIdTaken: it is alive.
        """
        self.check()
        self._when_free(lambda: self.link.call("first", self.info.client_id))

    def demand(self, rollout_id: int) -> None:
        """Ask that a rollout be generated; returns at once. Raises RolloutNotFound when it was acked and freed."""
        self.check()
        self.link.call("demand", self.info.client_id, check_rollout_id(rollout_id))

    def claim(
        self, rollout_id: int | None = None, version: int | None = None, timeout_s: float | None = None
    ) -> Rollout:
        """Wait for a rollout (default: the lowest that nobody of the group has) and hold it under a lease.

        Raises:
            EndOfStream: the producer finished, and there is no such rollout. PeerFailed: it failed or died.
            WaitTimeout: with a verdict on the producer, or on who holds the lease.
            RolloutNotFound, Fenced, BrokerLost.
        """
        rollout_id = None if rollout_id is None else check_rollout_id(rollout_id)
        version = check_version(version, "version")
        what = "rollout" if rollout_id is None else f"rollout {rollout_id}"
        deadline, began = self._deadline(timeout_s), time.time()
        asked: dict[str, Any] = {"grace_s": self.settings.peer_grace_s, "token": self._token(rollout_id)}
        while True:
            try:
                located = self._wait(deadline, what, "claim", rollout_id, version, **asked)
            except (WaitTimeout, BrokerLost, StoreUnreachable, Stopped):
                self._keep_token(asked["token"])
                raise
            rollout = Rollout(self, located)
            payload = located.payload
            if payload.columns and (missing := [c for c in self._columns if c not in payload.columns]):
                self.release(located.rollout_id)
                raise Refused(
                    f"rollout {located.rollout_id} of job {self.job_id} has columns {', '.join(payload.columns)}; "
                    f"this consumer needs {', '.join(self._columns)}: {', '.join(missing)} missing"
                )
            try:
                rollout.refs  # noqa: B018  opened now: what its vault lost is generated again
                self.add_span("claim", located.rollout_id, began, time.time())
                if self.metrics:
                    waited_s = time.time() - max(began, located.published_at)
                    self._latencies.observe("claim_seconds", self.job_id, waited_s)
                return rollout
            except (Unreachable, WaitTimeout) as error:
                logger.warning("job %s: rollout %d cannot be read: %s", self.job_id, located.rollout_id, error)
                may_be_stored = bool(payload.stored) and not isinstance(error, PayloadLost)
                where = (located.rollout_id, payload.vault, payload.token)
                if not may_be_stored and self.link.ask(
                    "unreadable", Deadline(2 * START_S), self.info.client_id, *where
                ):
                    asked["token"] = self._token(rollout_id)
                elif not deadline:
                    self._keep_token(asked["token"])
                    raise
                time.sleep(0.5)

    def _token(self, rollout_id: int | None) -> str:
        """Of a claim of the next one: that of a claim without an answer, whose rollout is then handed out first."""
        if rollout_id is not None:
            return ""
        return self._unanswered.pop() if self._unanswered else uuid.uuid4().hex

    def _keep_token(self, token: str) -> None:
        if token:
            self._unanswered.append(token)

    def get(self, rollout_id: int, version: int | None = None) -> Rollout:
        """Read a published rollout without a lease (default: its newest version). Raises RolloutNotFound."""
        self.check()
        asked = check_rollout_id(rollout_id), check_version(version, "version")
        return Rollout(self, self.link.call("get", self.job_id, *asked))

    def ack(self, rollout_id: int) -> None:
        """The rollout has taken effect for good; its payload may be freed. Acking twice is once. Raises NotOwner."""
        self.check()
        with self.span("ack", check_rollout_id(rollout_id)):
            self.link.call("ack", self.info.client_id, check_rollout_id(rollout_id))

    def release(self, rollout_id: int) -> None:
        """Give a claimed rollout back, for others of the group to claim. Raises NotOwner."""
        self.check()
        with self._releasing:  # the broker remembers the newest token only
            self.link.call("release", self.info.client_id, check_rollout_id(rollout_id), token=uuid.uuid4().hex)

    def producer_facts(self, timeout_s: float | None = None) -> tuple[int, Any]:
        """Wait for (epoch, what it announced) of a live producer. Raises EndOfStream, PeerFailed, WaitTimeout."""
        return self._peer_facts(timeout_s)

    def begin_update(self, until: int | None = None, timeout_s: float | None = None) -> int:
        """Wait until weights may go into the producer's engines (see gate.py); returns the epoch of that producer.

        Args:
            until: the number of rollouts of the run: nothing from here on is still to be generated.
        """
        grace_s = self.settings.peer_grace_s
        return self._wait(timeout_s, "moment for new weights", "begin_update", until=until, grace_s=grace_s)

    def end_update(self, version: int, epoch: int) -> None:
        """All engines of that producer have the weights `version`. Raises NotOwner: they are gone, update again."""
        self.check()
        self.link.call("end_update", self.info.client_id, check_number(version, "version"), epoch)

    def break_update(self) -> None:
        """The update came to no good end: nothing is generated before another one has."""
        self.check()
        self.link.call("break_update", self.info.client_id)

    def loaded(self, timeout_s: float | None = None) -> int:
        """Wait until the engines have weights, and none are under way; returns their version."""
        return self._wait(timeout_s, "weights in the engines", "loaded", grace_s=self.settings.peer_grace_s)

    def unloaded(self, since: int, timeout_s: float) -> int | None:
        """Epoch of a producer after `since` whose engines wait for weights; None: none within `timeout_s`."""
        self.check()
        return self.link.wait(Deadline(timeout_s), "unloaded", self.info.client_id, since)

    def catalog(self) -> list[Located]:
        """Newest version of every rollout of this job that can be read, by id."""
        return self.link.call("catalog", self.job_id)

    def rollout_ids(self) -> list[int]:
        """Ids of the same, in order, which is quick for thousands of them, too."""
        return self.link.call("listed", self.job_id)[self.job_id]

    def versions(self, rollout_id: int) -> list[Located]:
        """Every readable version of a rollout, oldest first. Raises RolloutNotFound."""
        return self.link.call("versions", self.job_id, check_rollout_id(rollout_id))

    def publish_weights(self, version: int, params: Mapping[str, Any], timeout_s: float | None = None) -> int:
        """Publish weights as `version`, which must grow; the older version is freed. Returns the version."""
        return self.publish_value(KEY, pack_weights(params), version, timeout_s)

    def subscribe(self, start: int = 0, timeout_s: float | None = None) -> Iterator[Rollout]:
        """Yield every rollout from id `start` on as it is published, until the stream ends: each once for this group,
        also when the subscriber, the broker or the cluster is another one by then.

        A rollout counts as seen when the next one is asked for; what was looked at when the subscriber died comes
        again. Nothing is freed that a group has not seen: see close_group.

        Raises:
            WaitTimeout: no rollout within `timeout_s`. PeerFailed.
        """
        while True:
            try:
                rollout = self.claim(timeout_s=timeout_s)
            except EndOfStream:
                return
            if rollout.rollout_id >= start:
                yield rollout
            rollout.ack()

    async def asubscribe(self, start: int = 0, timeout_s: float | None = None) -> AsyncIterator[Rollout]:
        """`subscribe` for an event loop, which goes on while this waits."""
        rollouts, over = self.subscribe(start, timeout_s), object()
        while (rollout := await asyncio.to_thread(next, rollouts, over)) is not over:
            yield rollout  # type: ignore[misc]

    def __iter__(self) -> Iterator[Rollout]:
        """Claim one rollout after the other until the stream ends."""
        while True:
            try:
                yield self.claim()
            except EndOfStream:
                return
