"""What producer and consumer have in common: attaching, signs of life, values of the job, ending."""

import base64
import json
import logging
import os
import socket
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields, replace
from types import TracebackType
from typing import Any

import numpy as np
import ray

from ..batch import Batch
from ..broker.liveness import submission_id
from ..deadline import Deadline
from ..errors import (
    BadInput,
    ClusterUnreachable,
    CrossJobError,
    EndOfStream,
    Fenced,
    Forgotten,
    HeldBack,
    JobIdTaken,
    MethodFailed,
    PayloadLost,
    Stopped,
    StoreFull,
    StoreUnreachable,
    Unreachable,
    WaitTimeout,
)
from ..ledger.state import FAILED, FINISHED, STOPPED, WRITE_BEHIND
from ..ledger.verdicts import patience_left_s
from ..settings import OF_JOB, Settings
from ..types import (
    MOST_ACTIVITY,
    MOST_REASON,
    VAULT_NAME,
    ClientInfo,
    LocatedValue,
    Payload,
    check_facts,
    check_job_id,
    check_name,
    check_names,
    check_plain,
    check_rollout_id,
    check_seconds,
    check_version,
    shortened,
)
from ..vault.protocol import Durably, FromMethod, FromRefs, Target
from . import shutdown
from .cluster_watch import ClusterWatch
from .connection import GONE, POLL_S, START_S, Connection, ensure_ray, get

logger = logging.getLogger(__name__)

_SPANS_AT_ONCE = 1000
_SLICE_S = 3.0  # of a hand-over, after which one looks what it waits for
_SMALL_SOURCE_BYTES = 4096  # larger ones do not pass through the broker
_BATCH = "$batch"  # key of a small source that is a batch
_TAKEN_RETRY_S = 5.0  # a job that was killed a moment ago still holds its job id until Ray has noticed


class Session:
    """An attached client with a heartbeat thread. Leaving the `with` block ends it: as finished, or as failed with the
    exception that passes through (EndOfStream and sys.exit(0) are no failures; Stopped leaves all as it is, for the
    next one). A process that dies without a word is noticed by the broker.

    Args:
        job_id: name of the experiment.
        settings: see Settings; keyword arguments of the same names may be given instead.
        terms: JSON-able values by name that hold for this side; another client that states one of them otherwise is
            refused, or this one is.
        lasting: names of those terms that must hold for what is published and not acked, too: of the data.
        columns: of every batch: those that a producer will publish, or those that a consumer needs.
        of_slime: it is one of slime's jobs: where a rollout is set aside, it is refused, unless another one takes its
            place.

    Raises:
        BadInput, ClusterUnreachable, BrokerLost, ProtocolMismatch, Refused (and its JobIdTaken).
    """

    role = ""

    def __init__(
        self,
        job_id: str,
        *,
        settings: Settings | None = None,
        group: str = "",
        terms: Mapping[str, Any] | None = None,
        lasting: Sequence[str] = (),
        columns: Sequence[str] = (),
        of_slime: bool = False,
        **overrides: Any,
    ):
        stated = check_facts(terms, "terms")
        names = {"lasting": [*check_names(lasting, "lasting")], "columns": [*check_names(columns, "columns")]}
        if unknown := set(overrides) - {f.name for f in fields(Settings)}:
            raise BadInput(f"unknown settings: {', '.join(sorted(unknown))}; see Settings")
        if not isinstance(settings, (Settings, type(None))):
            raise BadInput(f"settings= must be a Settings, not a {type(settings).__name__}")
        if settings is not None and overrides:
            raise BadInput("give either settings= or single settings, not both")
        self.settings = settings or Settings(**overrides)
        self.job_id = check_job_id(job_id)
        ensure_ray()
        shutdown.install()
        patience_s, grace_s = (max(START_S, s) for s in (self.settings.timeout_s, self.settings.peer_grace_s))
        self.connection = Connection(self.settings.namespace, patience_s=patience_s, grace_s=grace_s)
        self.info = self._introduce(group, of_slime)
        self._activity = "attached"
        self._fault: CrossJobError | None = None
        self._ended = threading.Event()
        self._beaten = threading.Event()  # no sign of life is sent any more
        self._waits: dict[object, float] = {}  # waits that are under way -> when they began, monotonic
        self._at_work = False  # whatever else waits in this process
        self._spans: list[tuple[str, int, float, float]] = []  # that the broker was not told yet
        self._tracing = False
        self.metrics = False  # whether its job has figures for Prometheus
        self.connection.vault_on(self.info.node_id)  # it also keeps the broker's memory
        granted = self._attach(terms=stated, **names)
        self._durably: Durably | None = None
        self._use_store(granted)
        self.epoch: int = granted["epoch"]
        self.max_ahead: int = granted["max_ahead"]
        gcs = ray.get_runtime_context().gcs_address
        ClusterWatch(gcs, self.connection.gcs_survives, self._beaten, self._lost_cluster).start()
        threading.Thread(target=self._beat, name=f"cross-job-{self.role}", daemon=True).start()

    def __enter__(self) -> Any:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Stopped):
            self.stop("it was asked to (SIGTERM)")
            return
        planned = isinstance(error, EndOfStream) or (isinstance(error, SystemExit) and not error.code)
        if error is None or planned:
            self.finish()
            return
        try:
            last = traceback.format_exception_only(kind, error)[-1].strip()
            self.fail(last)
        except (CrossJobError, ray.exceptions.RayError) as other:  # the error that passes through matters more
            logger.warning("could not tell the broker of the failure: %s", other)

    def finish(self, reason: str = "") -> None:
        """End as planned: the other side learns it as the end of the stream."""
        self._end(FINISHED, reason)

    def fail(self, reason: str) -> None:
        """End with an error: the other side raises it as PeerFailed."""
        self._end(FAILED, reason)

    def stop(self, reason: str = "") -> None:
        """End for now: nothing is freed, and who waits for this client waits for the next, as long as it may."""
        self._end(STOPPED, reason)

    @property
    def stopping(self) -> bool:
        """Whether this process was asked to stop (SIGTERM): save what there is; the next wait raises Stopped."""
        return shutdown.requested.is_set()

    def status(self) -> dict[str, Any]:
        """Figures of this job: published, claimed, acked, queue_depth, staleness, clients (see status.py)."""
        return self.connection.call("status", self.job_id)[self.job_id]

    def doing(self, activity: str) -> None:
        """Say what this client is at (one short line); it is shown to whoever waits for it."""
        self._activity = shortened(activity, MOST_ACTIVITY)

    def working(self, at_work: bool) -> None:
        """Say whether this process is at work, though another of its threads waits here: as long as it is, no wait of
        the job ends because every client only waits."""
        self._at_work = at_work

    @contextmanager
    def span(self, what: str, rollout_id: int) -> Iterator[None]:
        """Say what the block does to a rollout (train, save ...): a span of that rollout's trace, where the traces of
        the job are on (--cross-job-traces); it costs nothing where they are off."""
        rollout_id, began = check_rollout_id(rollout_id), time.time()
        try:
            yield
        finally:
            self.add_span(what, rollout_id, began, time.time())

    def add_span(self, what: str, rollout_id: int, began: float, ended: float) -> None:
        """Like `span`, of what is over; wall clock, seconds."""
        if self._tracing:
            self._spans.append((str(what)[:50], check_rollout_id(rollout_id), float(began), float(ended)))

    def announce(self, facts: Any) -> None:
        """Tell the other side what it needs to know of this client: small values and actor handles, no payload.

        It is forgotten when this process ends.
        """
        self.check()
        # a ref: the broker must not open handles, for which Ray would import slime
        self.connection.call("announce", self.info.client_id, [ray.put(facts)])

    def agree(self, name: str, value: str) -> str:
        """What all clients of the job share under `name`, as whoever came first said it: `value`, where nobody did."""
        self.check()
        return str(self.connection.call("agree", self.info.client_id, name, value))

    def _peer_facts(self, timeout_s: float | None) -> tuple[int, Any]:
        """Wait for (epoch, facts) of the peer; see Ledger.facts."""
        deadline = self._deadline(timeout_s)
        while True:
            epoch, refs = self._wait(deadline, "word from the other job", "facts", grace_s=self.settings.peer_grace_s)
            try:
                return epoch, get(refs[0], Deadline(START_S, deadline), "the other job")
            except ray.exceptions.ObjectLostError:  # it ended a moment ago, and the broker will know in another
                if not deadline:
                    raise
                deadline.pause()

    def publish_value(
        self,
        key: str,
        value: Mapping[str, Any] | Batch | Any,
        version: int | None = None,
        timeout_s: float | None = None,
    ) -> int:
        """Publish a value of the job under `key` (columns, a batch, an ObjectRef); newest wins, older are freed.

        Returns its version: `version`, which must grow, or one more than the last (from 0).
        """
        key, version = check_name(key, "a key"), check_version(version, "version")
        source = as_source(value)
        durably = self._durably_within(timeout_s)
        token, patience_s = uuid.uuid4().hex, self._patience_s(timeout_s)
        target = Target(token, self.info.client_id, key=key, version=version, durably=durably, patience_s=patience_s)
        return self._hand_over(target, source, self.info.node_id, timeout_s, f"value {key!r}").version

    def value(self, key: str, newer_than: int | None = None, timeout_s: float = 0.0) -> tuple[int, Any] | None:
        """Newest (version, value) of `key`; None if within `timeout_s` there is none newer than `newer_than`."""
        found = self.value_ref(key, newer_than, timeout_s)
        return None if found is None else (found[0], get_parts([found[1]], f"value {key!r} {found[0]}")[0])

    def value_ref(self, key: str, newer_than: int | None = None, timeout_s: float = 0.0) -> tuple[int, Any] | None:
        """Like `value`, but a ref in its place, for other processes to `ray.get`."""
        found = self._value(key, newer_than, timeout_s)
        return None if found is None else (found[0].version, found[1])

    def _value(self, key: str, newer_than: int | None, timeout_s: float) -> tuple[LocatedValue, Any] | None:
        self.check()
        key = check_name(key, "a key")
        deadline, newer_than = self._deadline(timeout_s), check_version(newer_than, "newer_than")
        located = self.connection.wait(deadline, "get_value", self.job_id, key, newer_than)
        while located is not None:
            try:
                return located, self.connection.open_refs(located.payload, deadline=deadline)[0]
            except Unreachable:  # replaced since the broker named it, or really lost
                newer = self.connection.call("get_value", self.job_id, key, located.version, deadline=deadline)
                if newer is None:
                    raise
                located = newer
        return None

    def check(self) -> None:
        """Raise what the heartbeat learned (Fenced, BrokerLost), that this client has ended, or that its process was
        forked, or has left Ray."""
        self.connection.check_process()
        if self._fault is not None:
            raise self._fault
        if self._ended.is_set():
            raise BadInput(f"this {self.role} of job {self.job_id} has ended: make a new one")

    # ------------------------------------------------------------------ inside

    def _deadline(self, timeout_s: float | None) -> Deadline:
        """What the caller allows; None: work may take its time, silence --cross-job-timeout-s."""
        if timeout_s is None:
            return Deadline(self.settings.timeout_s, bounds_silence=True)
        return Deadline(check_seconds(timeout_s, "timeout_s"))

    def _wait(self, timeout_s: float | Deadline | None, what: str, operation: str, *args: Any, **kwargs: Any) -> Any:
        """Long-poll; at the deadline WaitTimeout with the verdict on whoever is waited for."""
        self.check()
        deadline = timeout_s if isinstance(timeout_s, Deadline) else self._deadline(timeout_s)
        asked = [a for a in args[:1] if isinstance(a, int) and self.role == "consumer"]
        self.doing(f"waiting for {what}")
        wait = object()
        self._waits[wait] = time.monotonic()
        try:
            while True:
                with shutdown.while_waiting():
                    found = self.connection.wait(deadline, operation, self.info.client_id, *args, **kwargs)
                if found is not None:
                    return found
                self._bear_or_raise(deadline, f"no {what} of job {self.job_id}", *asked)
        finally:
            del self._waits[wait]
            self.doing(f"nothing here since it waited for {what}")

    def _bear_or_raise(self, deadline: Deadline, missing: str, *asked: int) -> None:
        """At a deadline: renew it where it bounds silence, and the peer is neither silent nor stuck.

        Raises:
            WaitTimeout: with the verdict on the peer.
        """
        verdict = self.connection.call("peer_verdict", self.info.client_id, *asked, deadline=deadline)
        waited_s = deadline.timeout_s
        left_s = patience_left_s(verdict, waited_s, self.settings.peer_grace_s)
        if deadline.bounds_silence and left_s > 0:
            logger.warning("%s yet, still waiting: %s", missing, verdict["message"])
            deadline.renew(left_s)
            return
        kind = HeldBack if verdict["kind"] in ("paused", "full") else WaitTimeout
        stuck = deadline.bounds_silence and verdict.get("stalled_s", 0.0) >= waited_s
        words = "; every client of the job only waits" if stuck else ""
        raise kind(f"{missing} within {waited_s:g} s: {verdict['message']}{words}", verdict)

    def answer(self, ref: Any, what: str) -> Any:
        """What an actor of the peer answers, as long as it takes while the peer lives.

        Args:
            what: is asked of it, in words.

        Raises:
            WaitTimeout: the peer is silent, with the verdict on it. Whatever the actor raises, or Ray of it.
        """
        deadline = self._deadline(None)
        while not ray.wait([ref], timeout=min(POLL_S, deadline.left()))[0]:
            self.check()
            if not deadline:
                self._bear_or_raise(deadline, f"no answer to {what} of job {self.job_id}")
        return get(ref, Deadline(START_S), "the other job")

    def _waits_s(self) -> float:
        """For how long this client has only waited; 0: it is at work."""
        began = [*self._waits.values()]
        return 0.0 if self._at_work or not began else time.monotonic() - max(began)

    def _use_store(self, granted: Mapping[str, Any] | None) -> None:
        """The job's durable store, and whether it is traced, which the other side may say later."""
        if granted:
            self._tracing = granted["traces"] == "on"
            self.metrics = self.connection.observed = granted["metrics"] == "on"
        if granted and granted["store"] is not None and self._durably is None:
            behind = granted["store_mode"] == WRITE_BEHIND
            self._durably = Durably(
                granted["store"], self.job_id, granted["compression"], behind, mark=granted.get("mark", "")
            )
            self.connection.store, self.connection.client = (self.job_id, granted["store"]), self.info

    def _patience_s(self, timeout_s: float | None) -> float:
        """How long the vault tries to reach a broker that is gone."""
        return max(START_S, self._deadline(timeout_s).timeout_s)

    def _durably_within(self, timeout_s: float | None) -> Durably | None:
        """How the job's payloads are stored; a store that is full or away is waited for as long as the caller does."""
        patience_s = self._deadline(timeout_s).timeout_s
        return self._durably and replace(self._durably, patience_s=patience_s)

    def _hand_over(
        self,
        target: Target,
        source: FromRefs | FromMethod | None,
        node_id: str,
        timeout_s: float | None,
        what: str,
        repeatable: bool = True,
    ) -> Any:
        """Let the vault of a node own this; with a vault that died begun again, where it is `repeatable`."""
        self.check()
        deadline = self._deadline(timeout_s)
        self.doing(f"publishing {what}")
        try:
            while True:
                slice_s = _SLICE_S if deadline.bounds_silence else min(_SLICE_S, deadline.left())
                try:
                    ask = self.connection.vault_on(node_id, deadline).hand_over.remote(target, source, slice_s)
                    patience = Deadline(slice_s + START_S, deadline)
                    recorded = self.connection.get_of_vault(ask, patience, f"{VAULT_NAME}_{node_id}")
                except TypeError as error:  # Ray cannot pickle an argument of the producer's method
                    raise BadInput(f"{what} cannot be handed to its vault: {shortened(error, 1000)}") from None
                except ray.exceptions.RayTaskError as error:
                    raise _foreign(what, error) from None
                except GONE as error:
                    self.connection.forget_vault(node_id)
                    dead = isinstance(error, ray.exceptions.ActorDiedError)
                    if not deadline or (dead and not repeatable):
                        raise Unreachable(
                            f"the vault died while {what} was handed over: {error}; publish it again"
                        ) from None
                    if not repeatable:
                        source = None  # if the vault lives, its call goes on, which is never made twice
                    logger.warning(
                        "job %s: %s is handed over again, because the vault did not answer: %s",
                        self.job_id,
                        what,
                        error,
                    )
                    deadline.pause()
                    continue
                self.check()
                if not isinstance(recorded, str):
                    return recorded
                if not repeatable:
                    source = None  # the vault has it by now, and must not begin it again if it dies
                if not recorded:  # the producer's method is at work, and the vault is heard
                    deadline.renew(deadline.timeout_s)
                if recorded:  # the durable store is full or away
                    self.doing(f"publishing {what}: {recorded}")
                if not deadline and recorded:
                    raise StoreUnreachable(
                        f"{what} of job {self.job_id} was not published within {deadline.timeout_s:g} s: {recorded}"
                    )
                if not deadline:
                    raise WaitTimeout(
                        f"{what} of job {self.job_id} was not published within {deadline.timeout_s:g} s: its "
                        "producer's method still runs; what it returns is published then, unless this client ends"
                    )
        finally:
            self.doing(f"nothing here since {what} was handed over")

    def _keep_apart(self, token: str, source: Batch) -> Payload:
        """Let the vault of this node own where a source of prompts stands; the record for the broker."""
        name = f"{VAULT_NAME}_{self.info.node_id}"
        try:
            asked = self.connection.vault_on(self.info.node_id).keep_source.remote(token, as_source(source))
            where = self.connection.get_of_vault(asked, Deadline(self.connection.patience_s), name)
        except GONE as error:
            self.connection.forget_vault(self.info.node_id)
            raise Unreachable(f"the vault of this node does not answer: {error}") from None
        return Payload(token, where, source.nbytes, source_apart=True)

    def _attach(self, **said: Any) -> dict[str, Any]:
        stated = {name: getattr(self.settings, name) for name in OF_JOB}
        stated |= {"dead_after_s": self.settings.dead_after_s, **said}
        return self._when_free(
            lambda: self.connection.ask("attach", Deadline(self.connection.patience_s), self.info, stated)
        )

    def _when_free(self, take: Callable[[], Any]) -> Any:
        """Take a place that another job may hold: if that one is silent, wait until its lease is over."""
        began = time.monotonic()
        while True:
            try:
                return take()
            except JobIdTaken as error:
                silent = error.silent_s > 2 * self.settings.heartbeat_s + 1
                patience_s = self.settings.dead_after_s + _TAKEN_RETRY_S if silent else _TAKEN_RETRY_S
                if time.monotonic() - began > patience_s:
                    raise
                time.sleep(0.5)

    def _introduce(self, group: str, of_slime: bool) -> ClientInfo:
        context = ray.get_runtime_context()
        return ClientInfo(
            client_id=uuid.uuid4().hex,
            job_id=self.job_id,
            role=self.role,
            group=group,
            ray_job_id=context.get_job_id(),
            submission_id=submission_id(context.get_job_id()),
            actor_id=context.get_actor_id() or "",
            node_id=context.get_node_id(),
            host=socket.gethostname(),
            pid=os.getpid(),
            of_slime=of_slime,
        )

    def _beat(self) -> None:
        try:
            self._send_signs_of_life()
        finally:
            self._beaten.set()

    def _send_signs_of_life(self) -> None:
        while not self._ended.wait(self.settings.heartbeat_s):
            try:
                spans = self._spans[:_SPANS_AT_ONCE]
                beat = ("heartbeat", self.info.client_id, self._activity, spans, self._waits_s())
                granted = self.connection.call(*beat, timeout_s=self.settings.dead_after_s)
                self._use_store(granted)
                if "notice" in granted:
                    logger.error("job %s: %s", self.job_id, granted["notice"])
                if granted["epoch"] != self.epoch:
                    logger.warning(
                        "job %s: %s was silent beyond its lease, and nobody took its place: it goes on as epoch %d",
                        *(self.job_id, self.role, granted["epoch"]),
                    )
                    self.epoch = granted["epoch"]
                del self._spans[: len(spans)]
            except (Fenced, Forgotten, ClusterUnreachable) as error:
                if not self._ended.is_set():
                    self._fault = error
                    logger.error("job %s: %s must stop: %s", self.job_id, self.role, error)
                return
            except Exception as error:  # a lost heartbeat is no failure: the next one counts
                logger.warning(
                    "job %s: a heartbeat of %s failed, the next one follows: %s", self.job_id, self.role, error
                )

    def _lost_cluster(self, error: ClusterUnreachable) -> bool:
        try:
            self.connection.check_process()
        except CrossJobError:  # it has left by itself
            return False
        self._fault = self.connection.cluster_lost = error
        return True

    def _end(self, state: str, reason: str) -> None:
        if self._ended.is_set():
            return
        self._ended.set()
        if isinstance(self._fault, Fenced):  # the broker has ended it; to tell it again might make a new broker
            return
        if self._spans:
            with suppress(CrossJobError):
                self.connection.call("heartbeat", self.info.client_id, self._activity, self._spans, timeout_s=START_S)
        # without this word a job that is through counts as one that failed; of the others Ray tells how they ended
        patience_s = self.connection.patience_s if state == FINISHED else START_S
        self.connection.call("end", self.info.client_id, state, shortened(reason, MOST_REASON), timeout_s=patience_s)


def _foreign(what: str, error: ray.exceptions.RayTaskError) -> Exception:
    """What the producer's method raised, in the vault that called it."""
    if isinstance(error.cause, Exception) and not isinstance(error.cause, ray.exceptions.RayError):
        return error.cause
    return MethodFailed(f"{what} was not published: {error}")


def as_source(value: Any) -> FromRefs:
    """What a vault can own of `value`: columns are packed, batches are put, an ObjectRef is taken as it is (opaque).

    Raises:
        BatchError: columns that make no batch. BadInput: anything else.
    """
    if isinstance(value, ray.ObjectRef):
        return FromRefs([value], {"nbytes": 0, "num_samples": -1})
    parts = value if isinstance(value, list) and value else [value]
    if not all(isinstance(part, Mapping) for part in parts):
        raise BadInput(
            f"cannot publish a {type(value).__name__}: give a mapping of columns, a Batch, a list of those, or an "
            "ObjectRef to anything that Ray can serialise"
        )
    batches = [part if isinstance(part, Batch) else Batch.pack(part) for part in parts]
    nbytes = sum(batch.nbytes for batch in batches)
    try:
        refs = [ray.put(batch) for batch in batches]
    except (ray.exceptions.OutOfDiskError, ray.exceptions.ObjectStoreFullError) as error:
        raise StoreFull(f"no room for {nbytes} bytes in the object store or on its spill disk: {error}") from None
    num_samples = sum(batch.num_samples for batch in batches)
    return FromRefs(refs, {"nbytes": nbytes, "num_samples": num_samples, "columns": [*batches[0]]})


def small_or_apart(source: Any) -> tuple[Any, Batch | None]:
    """Where a source of prompts stands, as (what passes through the broker, what lies in a vault beside its payload):
    a small one is the first, a large one the second. `read_source` gives it back.

    Args:
        source: JSON-able, or a Batch.

    Raises:
        BadInput: it is neither.
    """
    if isinstance(source, Batch):
        if source.nbytes > _SMALL_SOURCE_BYTES:
            return None, source
        return {_BATCH: base64.b64encode(source.ipc.to_pybytes()).decode()}, None
    source = check_plain(source, "source")
    text = b"" if source is None else json.dumps(source).encode()
    if len(text) > _SMALL_SOURCE_BYTES:
        return None, Batch.pack({"json": [np.frombuffer(text, np.uint8)]})
    return source, None


def read_source(connection: Connection, payload: Payload) -> Any:
    """Where the source of prompts stood after this payload; None: nobody said. Raises PayloadLost."""
    if not payload.source_apart:
        small = payload.source
        is_batch = isinstance(small, dict) and [*small] == [_BATCH]
        return Batch.from_ipc(base64.b64decode(small[_BATCH])) if is_batch else small
    batch = get_parts(connection.open_refs(payload, ".source"), "where the source of prompts stood")[0]
    return json.loads(bytes(batch["json"][0])) if [*batch] == ["json"] else batch


def get_parts(refs: list[Any], what: str, timeout_s: float = 600.0) -> list[Any]:
    """`ray.get` of the parts of a payload. Raises PayloadLost, or WaitTimeout after `timeout_s` seconds."""
    try:
        return get(refs, Deadline(timeout_s), f"the object store ({what})")
    except ray.exceptions.ObjectLostError as error:
        raise PayloadLost(f"{what} is lost: {error}") from None
