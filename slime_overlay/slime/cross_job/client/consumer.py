"""The train side: demand rollouts, claim them, read them, ack them; publish new weights."""

import asyncio
import logging
import threading
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import cached_property
from types import TracebackType
from typing import Any

from ..batch import Batch
from ..deadline import Deadline
from ..errors import (
    BadInput,
    EndOfStream,
    NotOwner,
    PayloadLost,
    PeerFailed,
    Refused,
    RolloutNotFound,
    Unreachable,
    WaitTimeout,
)
from ..metrics import Latencies
from ..types import (
    Located,
    check_name,
    check_names,
    check_number,
    check_rollout_id,
    check_stamp,
    check_version,
    ids_text,
)
from .connection import START_S
from .session import Session, get_parts, read_source, small_or_apart
from .weights import KEY, pack_weights

logger = logging.getLogger(__name__)

_NOTHING_TAKEN = (BadInput, EndOfStream, PeerFailed, Refused, RolloutNotFound)
"""How a claim ends that was answered, and granted nothing."""


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
        return self._consumer.connection.open_refs(self._located.payload)

    def open(self, deadline: Deadline) -> None:
        """Get `refs`, within this deadline where the vault is silent."""
        self.refs = self._consumer.connection.open_refs(self._located.payload, deadline=deadline)

    @property
    def source(self) -> Any:
        """Where the producer's source of prompts stood after this rollout (JSON-able or a Batch, as it said); None: it
        did not say. To be kept in a checkpoint, for Consumer.resume. Raises PayloadLost."""
        return read_source(self._consumer.connection, self._located.payload)

    @cached_property
    def parts(self) -> list[Any]:
        """All parts, zero-copy where they lie on this node. Raises PayloadLost."""
        self._consumer.connection.check_process()
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


class Consumer(Session):
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
        """See Session. `columns`: those that every batch must have: a producer that says that its batches lack them is
        refused, or this consumer is; a batch without them is refused when it is claimed."""
        group = check_name(group, "a consumer group")
        self._prepare(check_names(columns, "columns"))
        super().__init__(job_id, group=group, columns=self._columns, **settings)

    def _prepare(self, columns: tuple[str, ...]) -> None:
        self._columns = columns
        self._tokens = _Tokens()
        self._releases: dict[int, str] = {}  # rollout id -> token of a release that nobody knows the outcome of
        self._latencies = Latencies()

    def resume(self, rollout_id: int, source: Any = None) -> None:
        """This consumer goes on from a checkpoint that covers every rollout below `rollout_id`, and no other.

        What its group acked from there on can be claimed again, the same bytes, as far as --cross-job-retain goes;
        what lies below is acked. Another consumer of the group that is silent is waited for, until its lease ends.

        Args:
            source: Rollout.source of the last rollout that the checkpoint covers, if it kept that: where nothing was
                published yet, as on a new cluster, the rollout job goes on from there. A large one lies in the vault
                of this node until then.

        Raises:
            JobIdTaken: a consumer of this group is alive in another Ray job.
            RolloutNotFound: something from `rollout_id` on was acked and freed.
        """
        self.check()
        rollout_id, token = check_rollout_id(rollout_id), uuid.uuid4().hex
        source, apart = small_or_apart(source)
        kept = source if apart is None else self._keep_apart(token, apart)
        asked = ("resume", self.info.client_id, rollout_id, kept, token)
        try:
            found = self._when_free(lambda: self.connection.call(*asked))
        except _NOTHING_TAKEN:
            if apart is not None:
                self.connection.vault(kept.vault).drop.remote([f"{token}.source"])
            raise
        if found["again"] or found["acked"]:
            logger.info(
                "job %s: resumed at rollout %d: acked before and wanted again: %s; acked now: %s",
                *(self.job_id, rollout_id, ids_text(found["again"]), ids_text(found["acked"])),
            )

    def be_first(self) -> None:
        """For a group of which one Ray job at a time consumes: wait until the one before this is over.

        Raises:
            JobIdTaken: it is alive.
        """
        self.check()
        self._when_free(lambda: self.connection.call("first", self.info.client_id))

    def demand(self, rollout_id: int) -> None:
        """Ask that a rollout be generated; returns at once. Raises RolloutNotFound when it was acked and freed."""
        self.check()
        self.connection.call("demand", self.info.client_id, check_rollout_id(rollout_id))

    def claim(
        self, rollout_id: int | None = None, version: int | None = None, timeout_s: float | None = None
    ) -> Rollout:
        """Wait for a rollout (default: the lowest that nobody of the group has) and hold it under a lease.

        A claim that is interrupted (KeyboardInterrupt) or times out strands nothing: what it was granted all the same
        is what the next claim returns.

        Raises:
            EndOfStream: the producer finished, and there is no such rollout. PeerFailed: it failed or died.
            WaitTimeout: with a verdict on the producer, or on who holds the lease.
            Unreachable: its vault did not answer in the time, and may come back; the next claim returns it.
            RolloutNotFound, Fenced, BrokerLost.
        """
        return self._claim(rollout_id, version, self._deadline(timeout_s))

    def _claim(self, rollout_id: int | None, version: int | None, deadline: Deadline) -> Rollout:
        rollout_id = None if rollout_id is None else check_rollout_id(rollout_id)
        version = check_version(version, "version")
        token = self._tokens.begin(rollout_id)
        try:
            rollout = self._granted(token, rollout_id, version, deadline)
        except BaseException as error:
            if isinstance(error, _NOTHING_TAKEN):
                self._tokens.open.pop(token, None)
            else:
                self._tokens.leave(token)
            raise
        del self._tokens.open[token]  # no call from here on, after which Python might raise KeyboardInterrupt
        return rollout

    def _granted(self, token: str, rollout_id: int | None, version: int | None, deadline: Deadline) -> Rollout:
        what = "rollout" if rollout_id is None else f"rollout {rollout_id}"
        began = time.time()
        while True:
            located = self._wait(
                *(deadline, what, "claim", rollout_id, version), grace_s=self.settings.peer_grace_s, token=token
            )
            self._releases.pop(located.rollout_id, None)
            rollout = Rollout(self, located)
            payload = located.payload
            if payload.columns and (missing := [c for c in self._columns if c not in payload.columns]):
                self.release(located.rollout_id)
                raise Refused(
                    f"rollout {located.rollout_id} of job {self.job_id} has columns {', '.join(payload.columns)}; "
                    f"this consumer needs {', '.join(self._columns)}: {', '.join(missing)} missing"
                )
            try:
                rollout.open(deadline)  # now: what its vault lost is generated again
                self.add_span("claim", located.rollout_id, began, time.time())
                if self.metrics:
                    waited_s = time.time() - max(began, located.published_at)
                    self._latencies.observe("claim_seconds", self.job_id, waited_s)
                return rollout
            except (Unreachable, WaitTimeout) as error:
                logger.warning("job %s: rollout %d cannot be read: %s", self.job_id, located.rollout_id, error)
                may_be_stored = bool(payload.stored) and not isinstance(error, PayloadLost)
                where = (located.rollout_id, payload.vault, payload.token)
                lost = not may_be_stored and self.connection.ask(
                    "unreadable", Deadline(max(2 * START_S, deadline.left())), self.info.client_id, *where
                )
                if not lost and not deadline:
                    raise
                deadline.pause()

    def get(self, rollout_id: int, version: int | None = None) -> Rollout:
        """Read a published rollout without a lease (default: its newest version). Raises RolloutNotFound."""
        self.check()
        asked = check_rollout_id(rollout_id), check_version(version, "version")
        return Rollout(self, self.connection.call("get", self.job_id, *asked))

    def ack(self, rollout_id: int) -> None:
        """The rollout has taken effect for good; its payload may be freed. Acking twice is once. Raises NotOwner."""
        self._ack(rollout_id, None)

    def _ack(self, rollout_id: int, deadline: Deadline | None) -> None:
        self.check()
        with self.span("ack", check_rollout_id(rollout_id)):
            self.connection.call("ack", self.info.client_id, check_rollout_id(rollout_id), deadline=deadline)

    def release(self, rollout_id: int) -> None:
        """Give a claimed rollout back, for others of the group to claim. Raises NotOwner."""
        self._release(rollout_id, None)

    def _release(self, rollout_id: int, deadline: Deadline | None) -> None:
        self.check()
        rollout_id = check_rollout_id(rollout_id)
        token = self._releases.setdefault(rollout_id, uuid.uuid4().hex)
        try:
            self.connection.call("release", self.info.client_id, rollout_id, token=token, deadline=deadline)
        except Refused:
            self._releases.pop(rollout_id, None)
            raise
        self._releases.pop(rollout_id, None)

    def producer_facts(self, timeout_s: float | None = None) -> tuple[int, Any]:
        """Wait for (epoch, what it announced) of a live producer. Raises EndOfStream, PeerFailed, WaitTimeout."""
        return self._peer_facts(timeout_s)

    def begin_update(self, until: int | None = None, timeout_s: float | None = None) -> int:
        """Wait until weights may go into the producer's engines (see gate.py); returns the epoch of that producer.

        Args:
            until: the number of rollouts of the run: nothing from here on is still to be generated.
        """
        limits = {"until": check_version(until, "until"), "grace_s": self.settings.peer_grace_s}
        return self._wait(timeout_s, "permission to update weights", "begin_update", **limits)

    def end_update(self, version: int, epoch: int, stamp: str = "") -> None:
        """All engines of that producer have the weights `version`.

        Args:
            stamp: what the engines themselves say of these weights. A rollout of which they say something else
                (`meta["weights_said"]`) is then refused. Empty: they say nothing.

        Raises:
            NotOwner: they are gone, update again.
        """
        self.check()
        version, stamp = check_number(version, "version"), check_stamp(stamp)
        self.connection.call("end_update", self.info.client_id, version, epoch, stamp)

    def break_update(self) -> None:
        """The update came to no good end: nothing is generated before another one has."""
        self.check()
        self.connection.call("break_update", self.info.client_id)

    def training(self, rollout_id: int | None) -> None:
        """Say that this process trains on a rollout from now on; None: on none. Where three processes in a row end
        with an error in that, the rollout is set aside: see --cross-job-on-poison."""
        self.check()
        self.connection.call("training", self.info.client_id, rollout_id)

    def loaded(self, timeout_s: float | None = None) -> int:
        """Wait until the engines have weights, and none are under way; returns their version."""
        return self._wait(timeout_s, "weights in the engines", "loaded", grace_s=self.settings.peer_grace_s)

    def unloaded(self, since: int, timeout_s: float) -> int | None:
        """Epoch of a producer after `since` whose engines wait for weights; None: none within `timeout_s`."""
        self.check()
        return self.connection.wait(Deadline(timeout_s), "unloaded", self.info.client_id, since)

    def catalog(self) -> list[Located]:
        """Newest version of every rollout of this job that can be read, by id."""
        return self.connection.call("catalog", self.job_id)

    def rollout_ids(self) -> list[int]:
        """Ids of the same, in order, which is quick for thousands of them, too."""
        return self.connection.call("listed", self.job_id)[self.job_id]

    def versions(self, rollout_id: int) -> list[Located]:
        """Every readable version of a rollout, oldest first. Raises RolloutNotFound."""
        return self.connection.call("versions", self.job_id, check_rollout_id(rollout_id))

    def publish_weights(self, version: int, params: Mapping[str, Any], timeout_s: float | None = None) -> int:
        """Publish weights as `version`, which must grow; the older version is freed. Returns the version."""
        return self.publish_value(KEY, pack_weights(params), version, timeout_s)

    def subscribe(self, start: int = 0, timeout_s: float | None = None) -> "Subscription":
        """Iterate over every rollout from id `start` on as it is published, until the stream ends: each once for this
        group, also when the subscriber, the broker or the cluster is another one by then.

        A rollout counts as seen when the next one is asked for; what was looked at when the subscriber died comes
        again. Nothing is freed that a group has not seen: see close_group. After an error the next `next` asks again;
        only the end of the stream, or `close`, ends it. NotOwner says, once, that what was looked at last went back to
        the group, as by a `release`: it is not acked, and may come again.

        Args:
            timeout_s: of each rollout.

        Raises:
            WaitTimeout: no rollout within `timeout_s`. PeerFailed, NotOwner.
        """
        return Subscription(self, check_rollout_id(start), timeout_s)

    def asubscribe(self, start: int = 0, timeout_s: float | None = None) -> "AsyncSubscription":
        """`subscribe` for an event loop, which goes on while this waits. A wait that is cancelled takes nothing: what
        comes meanwhile is what the next `anext` returns, or `aclose` gives back."""
        return AsyncSubscription(self.subscribe(start, timeout_s))

    def __iter__(self) -> "Claims":
        """Claim one rollout after the other until the stream ends."""
        return Claims(self)


class Claims(Iterator[Rollout]):
    """Claims one rollout after the other until the stream ends. After an error the next `next` asks again."""

    def __init__(self, consumer: Consumer, timeout_s: float | None = None):
        self._consumer = consumer
        self._timeout_s = timeout_s
        self._deadline = Deadline(0)

    def __next__(self) -> Rollout:
        self._deadline = self._consumer._deadline(self._timeout_s)
        return self._next()

    def _next(self) -> Rollout:
        try:
            return self._consumer._claim(None, None, self._deadline)
        except EndOfStream:
            raise StopIteration from None


class Subscription(Claims):
    """See Consumer.subscribe."""

    def __init__(self, consumer: Consumer, start: int, timeout_s: float | None):
        super().__init__(consumer, timeout_s)
        self._start = start
        self._shown: Rollout | None = None  # counts as seen when the next one is asked for
        self._closed = False

    def __next__(self) -> Rollout:
        while not self._closed:
            self._deadline = self._consumer._deadline(self._timeout_s)
            if self._closed:  # by another thread, which ended the deadline of before
                break
            if self._shown is not None:
                try:
                    self._consumer._ack(self._shown.rollout_id, self._deadline)
                except NotOwner:  # another has it, or had it: this is said once, and the next `next` goes on
                    self._shown = None
                    raise
                self._shown = None
            self._shown = self._next()
            if self._closed:
                self.close()
            elif self._shown.rollout_id >= self._start:
                return self._shown
        raise StopIteration

    def end(self) -> None:
        """Let a thread that waits for the next one give up soon; what it gets until then is given back."""
        self._closed = True
        self._deadline.end()

    def close(self) -> None:
        """End it: what was looked at last is given back, and comes again."""
        self.end()
        shown, self._shown = self._shown, None
        if shown is not None:
            with suppress(NotOwner):  # it was acked, or given back
                self._consumer._release(shown.rollout_id, self._deadline)


class AsyncSubscription(AsyncIterator[Rollout]):
    """See Consumer.asubscribe."""

    def __init__(self, rollouts: Subscription):
        self._rollouts = rollouts
        self._asking: _Outcome | None = None  # of a thread, which goes on when whoever awaits it is cancelled

    async def __anext__(self) -> Rollout:
        while True:
            asking = self._asking = self._asking or self._ask()
            await asyncio.wait([asyncio.wrap_future(asking)])
            if self._asking is not asking:  # another task had it
                continue
            self._asking = None
            found = asking.result()
            if isinstance(found, StopIteration):
                raise StopAsyncIteration
            if isinstance(found, BaseException):
                raise found
            return found

    async def aclose(self) -> None:
        """End it: what was looked at last, or came for a wait that was cancelled, is given back."""
        self._rollouts.end()
        asking, self._asking = self._asking, None  # what it gets is given back, and nobody's any more
        if asking is not None:
            await asyncio.wait([asyncio.wrap_future(asking)])
        await asyncio.to_thread(self._rollouts.close)

    def _ask(self) -> "_Outcome":
        asking: _Outcome = Future()

        def ask() -> None:
            try:
                asking.set_result(next(self._rollouts))
            except BaseException as error:  # a result as well: where nobody awaits it any more, nobody logs it
                asking.set_result(error)

        # a daemon, not a thread of the loop's executor: whoever leaves the loop, or the process, does not wait for it
        threading.Thread(target=ask, name="cross-job-subscription", daemon=True).start()
        return asking


_Outcome = Future[Rollout | BaseException]


class _Tokens:
    """Tokens of the claims that are under way, and of those of which nobody knows whether they were granted."""

    def __init__(self) -> None:
        self.open: dict[str, tuple[int | None, threading.Thread | None]] = {}  # token -> (id asked for, who asks)
        self._lock = threading.Lock()

    def begin(self, rollout_id: int | None) -> str:
        """Of a claim by this thread: that of one whose outcome nobody knows, so that what it was granted is handed out
        now; else a new one. For a claim by id only that of an earlier claim of this id."""
        me = threading.current_thread()
        with self._lock:
            token = uuid.uuid4().hex
            for known, (asked, thread) in [*self.open.items()]:  # other threads end theirs meanwhile
                idle = thread is None or thread is me or not thread.is_alive()
                if idle and rollout_id in (None, asked):
                    token = known
                    break
            self.open[token] = (rollout_id, me)
        return token

    def leave(self, token: str) -> None:
        """The claim ended, and nobody knows whether it was granted: any thread may go on with it."""
        asked, _ = self.open[token]
        self.open[token] = (asked, None)
