"""The way to the broker and the vaults: find or create them race-free, call them with a deadline, read their errors.

Names and namespace are given explicitly on create and on get, so that any Ray job reaches them from any namespace.
"""

import contextlib
import logging
import os
import re
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray.util.client import ray as ray_client

from ..deadline import Deadline
from ..errors import (
    BadInput,
    BrokerLost,
    ClusterUnreachable,
    CrossJobError,
    Forgotten,
    NoBroker,
    NotStored,
    PayloadLost,
    ProtocolMismatch,
    StoreUnreachable,
    Unreachable,
    WaitTimeout,
)
from ..types import (
    BROKER_NAME,
    DEFAULT_NAMESPACE,
    PROTOCOL,
    VAULT_NAME,
    ClientInfo,
    Payload,
    shortened,
    source_name,
    split_address,
)
from . import shutdown

logger = logging.getLogger(__name__)

START_S = 30.0
"""Deadline for a broker or vault to start: they need no CPU, only a worker process."""
_STORED_S = 5.0  # for a vault to answer, where the durable store has the payload, too
_LOAD_S = 600.0  # for a payload to be read from a durable store
_LEFT = "this process has left its Ray cluster (ray.shutdown): nothing can be asked"
_LOOKS_S = (3.0, 10.0)  # after which one asks how an actor that does not answer stands: first, and then
_SAID_S = 30.0  # between two log lines on that
_MISSING = re.compile(r"No module named '([^']+)'")  # in what Ray says of an actor that it cannot import
POLL_S = 2.0
"""Longest single long poll; a dead broker is noticed within one."""
_SILENT_S = 60.0  # for a head to say its first word: it may be busy
_GRPC = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])  # preface, and empty settings

BROKER_PLACES = ("cross_job_broker", "node:__internal_head__")
"""A broker stays on nodes with the first of these resources that any node had when it was made. The second is the
head's, by Ray; the first is for a cluster whose broker should be elsewhere, as on a CPU node that never goes away."""

_NO_CLIENT = (
    "which cross-job cannot use: give HOST:PORT of the cluster (port 6379 by default) on one of its nodes, or submit "
    "a job (`ray job submit`)"
)

_AWAY = (ray.exceptions.ActorUnavailableError, ray.exceptions.RpcError)  # of these, what may pass
GONE = (ray.exceptions.RayActorError, ray.exceptions.ActorUnschedulableError, ray.exceptions.RpcError)
"""What Ray raises of an actor that does not answer: it died, restarts, or its node has left the cluster; or nobody can
look it up, because Ray's GCS has been away for a minute."""


_inherited = False  # a connection to Ray, of the process from which this one was forked


def _forked() -> None:
    global _inherited
    _inherited = ray.is_initialized()


os.register_at_fork(after_in_child=_forked)


def check_address(address: str) -> str:
    """Return the address of a Ray cluster. Raises BadInput: it is one of Ray's Client, where the state API, named
    actors of other jobs and zero-copy reads are not to be had, or none of a cluster."""
    if address.startswith("ray://"):
        raise BadInput(f"{address} is an address of Ray's Client, {_NO_CLIENT}")
    if address.startswith(("http://", "https://")):
        raise BadInput(
            f"{address} is the address of Ray's dashboard, to which jobs are submitted, not that of the cluster: give "
            "HOST:PORT (port 6379 by default)"
        )
    if address == "local":
        raise BadInput("address 'local' would start another Ray cluster: give HOST:PORT of one that runs")
    return address


def find_address(address: str | None = None) -> str:
    """Return the address to go to: `address`, else RAY_ADDRESS; for "auto", that of the one cluster that has a node on
    this machine.

    Raises:
        BadInput: see check_address; or several clusters have a node here. ClusterUnreachable: none is known.
    """
    address = address or os.environ.get("RAY_ADDRESS")
    if not address:
        raise ClusterUnreachable(
            "this process belongs to no Ray cluster: call ray.init(address='HOST:PORT'), set RAY_ADDRESS, or start it "
            "with `ray job submit`"
        )
    if check_address(address) != "auto":
        return address
    found = local_clusters()
    if not found:
        raise ClusterUnreachable("no Ray cluster has a node on this machine: give the address of one, HOST:PORT")
    if len(found) > 1:
        raise BadInput(f"several Ray clusters have a node on this machine, name one of them: {', '.join(found)}")
    return found[0]


def local_clusters() -> list[str]:
    """Addresses of the Ray clusters that have a node on this machine, as far as this process sees its processes."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended
            program, *words = path.read_bytes().decode(errors="replace").split("\0")
            if program.endswith("/raylet"):
                found |= {word.partition("=")[2] for word in words if word.startswith("--gcs-address=")}
    return sorted(found)


def ensure_ray(
    address: str | None = None,
    probe_s: float = 5.0,
    log_to_driver: bool = False,
    logging_level: int = logging.INFO,
    runtime_env: dict[str, Any] | None = None,
) -> Any:
    """Connect this process to Ray if it is not connected: to the cluster of `find_address`.

    Args:
        probe_s: how long to try whether anybody listens at the address, in seconds.
        log_to_driver: show what the actors of this job print.
        logging_level: of what Ray itself says here.
        runtime_env: of what this process starts on the cluster.

    Returns:
        What ray.init returns; None where this process was connected before.

    Raises:
        ClusterUnreachable: no address is known, or no cluster answers there. BadInput: see find_address.
    """
    if _inherited:
        raise BadInput(
            f"process {os.getpid()} was forked from one that is connected to Ray, whose connection it cannot use: "
            "start it in another way (multiprocessing's 'spawn')"
        )
    if ray.is_initialized():
        if ray_client.is_connected():
            raise BadInput(f"this process is connected with Ray's Client (ray://), {_NO_CLIENT}")
        return None
    address = find_address(address)
    try:
        probe(address, probe_s, _SILENT_S)
    except TimeoutError as error:  # for which Ray would wait without end
        raise ClusterUnreachable(f"no Ray cluster answers at {address}: {error}") from None
    try:
        return ray.init(
            address=address, log_to_driver=log_to_driver, logging_level=logging_level, runtime_env=runtime_env
        )
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise ClusterUnreachable(f"no Ray cluster answers at {address}: {error}") from None


def probe(address: str, timeout_s: float, silent_s: float) -> None:
    """See whether a Ray cluster may be at HOST:PORT, from what a gRPC server says first.

    Raises:
        ClusterUnreachable: nobody takes a connection there within `timeout_s` seconds, or somebody who is no Ray.
        TimeoutError: who listens says nothing for `silent_s` seconds.
    """
    where = split_address(address)
    do = "check that the cluster runs, and the address"
    try:
        connection = socket.create_connection(where, timeout_s)
    except OSError as error:
        raise ClusterUnreachable(f"no Ray cluster at {address}: nobody listens there ({error}); {do}") from None
    with connection:
        if os.environ.get("RAY_USE_TLS", "").lower() in ("1", "true"):
            return
        connection.settimeout(silent_s)
        try:
            connection.sendall(_GRPC)
            said = connection.recv(64)
        except TimeoutError:
            raise TimeoutError(f"what listens at {address} says nothing for {silent_s:g} s") from None
        except OSError as error:
            raise ClusterUnreachable(
                f"no Ray cluster at {address}: what listens there closes the connection ({error})"
            ) from None
    if len(said) < 4 or said[3] != 4:  # a frame of settings, with which every gRPC server begins
        line = said.decode("ascii", "replace").partition("\n")[0].strip()
        what = f"it says {shortened(line, 40)!r}" if said else "it closes the connection at once"
        what = f"what listens there is not Ray: {what}"
        raise ClusterUnreachable(f"no Ray cluster at {address}: {what}; {do}. If it uses TLS, set RAY_USE_TLS=1")


class Connection:
    """A connection to the broker of one namespace, without identity: reads the catalogue and the status.

    Args:
        make: make a broker where there is none.
        patience_s: how long to wait for an answer of a broker or vault that is silent while Ray does not say that it
            died, where no other deadline is given.
        grace_s: how long one that Ray calls dead, or restarts, may take to be back.

    Raises:
        ClusterUnreachable, NoBroker, BrokerLost, ProtocolMismatch, WaitTimeout.
    """

    def __init__(
        self,
        namespace: str = DEFAULT_NAMESPACE,
        make: bool = True,
        patience_s: float = START_S,
        grace_s: float = START_S,
    ):
        ensure_ray()
        self.namespace, self.patience_s = namespace, patience_s
        self._grace_s = grace_s
        self.cluster_lost: ClusterUnreachable | None = None
        self._pid, self._worker_id = os.getpid(), ray.get_runtime_context().get_worker_id()
        self._make = make
        self.store: tuple[str, str] | None = None  # (job id, URI) of the durable store, for a client whose job has one
        self.client: ClientInfo | None = None  # who asks
        self.observed = False  # the job has metrics on
        self._vaults: dict[str, Any] = {}
        self._broker: Any = None
        self._find_broker()

    def hello(self) -> dict[str, Any]:
        """What the broker says of itself: {"protocol", "namespace", "actor_id", "gcs_survives"}."""
        return self.ask("hello", Deadline(self.patience_s))

    def call(
        self,
        operation: str,
        *args: Any,
        timeout_s: float | None = None,
        deadline: Deadline | None = None,
        **kwargs: Any,
    ) -> Any:
        """A ledger operation on the broker, once; raises what the ledger raises, BrokerLost, or WaitTimeout.

        Args:
            timeout_s: for a broker that is silent, in seconds; else `deadline`, START_S at least, else patience_s.
        """
        patience = self._patience(deadline) if timeout_s is None else Deadline(timeout_s)
        return self.ask("call", patience, operation, *args, **kwargs)

    def wait(self, deadline: Deadline, operation: str, *args: Any, **kwargs: Any) -> Any:
        """Long-poll a ledger operation until it finds something; None at the deadline. Raises Stopped, and WaitTimeout
        where the broker is silent at the deadline (START_S at least)."""
        while True:
            shutdown.check()
            slice_s = min(POLL_S, deadline.left())
            silence_s = max(START_S, deadline.timeout_s if deadline.bounds_silence else 0.0)
            patience = Deadline(slice_s + silence_s, deadline)
            found = self.ask("wait", patience, slice_s, operation, *args, **kwargs)
            if found is not None or not deadline:
                return found

    def vault(self, name: str) -> Any:
        """Handle of an existing vault. Raises PayloadLost when it is gone."""
        self.check_process()
        name = name.partition("/")[0]
        if name not in self._vaults:
            try:
                self._vaults[name] = ray.get_actor(name, namespace=self.namespace)
            except ValueError:
                raise PayloadLost(
                    f"{name} is gone, and with it what it held: its node died or left the cluster"
                ) from None
        return self._vaults[name]

    def open_refs(self, payload: Payload, suffix: str = "", deadline: Deadline | None = None) -> list[Any]:
        """Refs to the parts of a payload, owned by its vault; any Ray process of the cluster may `ray.get` them. What
        its vault has no more is read from the durable store, by the vault of this node.

        Args:
            deadline: for a vault that is silent, START_S at least (None: patience_s).

        Raises:
            PayloadLost: it was freed, or its vault is gone. PayloadDamaged: what is stored is not what was written.
            Unreachable: the vault does not answer, or the durable store does not.
        """
        try:
            if not payload.vault and not suffix:
                raise PayloadLost(f"payload {payload.token} lies in the job's durable store alone")
            return self._open_in_vault(payload, suffix, deadline)
        except (Unreachable, WaitTimeout) as error:
            if not payload.stored or self.store is None:
                raise
            logger.info("payload %s is read from the durable store: %s", payload.stored, error)
        job_id, uri = self.store
        name = source_name(payload.stored) if suffix else payload.stored
        patience = Deadline(_LOAD_S if deadline is None else 0.0, self._patience(deadline))
        try:
            vault = self.vault_on(ray.get_runtime_context().get_node_id(), deadline)
            return get(vault.load.remote(uri, job_id, name, self.observed), patience, "the vault")
        except NotStored as error:
            raise PayloadLost(f"{error}: it was freed") from None
        except GONE as error:
            raise Unreachable(f"the vault of this node does not answer: {error}") from None

    def _open_in_vault(self, payload: Payload, suffix: str, deadline: Deadline | None) -> list[Any]:
        patience = Deadline(_STORED_S) if payload.stored and self.store else self._patience(deadline)
        try:
            vault = self.vault(payload.vault)
            return self.get_of_vault(vault.open.remote(payload.token + suffix), patience, payload.vault)
        except GONE as error:
            self._vaults.pop(payload.vault.partition("/")[0], None)
            raise Unreachable(f"{payload.vault}, which holds the payload, does not answer: {error}") from None

    def vault_on(self, node_id: str, deadline: Deadline | None = None) -> Any:
        """The vault of a node, created if the node has none yet. Raises WaitTimeout when it cannot start within the
        deadline, START_S at least (None: patience_s)."""
        self.check_process()
        name = f"{VAULT_NAME}_{node_id}"
        if name not in self._vaults:
            from ..vault.actor import vault_actor  # whoever only looks needs none, and is quicker without

            handle = vault_actor(name, self.namespace, node_id)
            try:
                self.get_of_vault(handle.hello.remote(), self._patience(deadline), name)
            except ray.exceptions.ActorUnschedulableError:
                raise Unreachable(
                    f"node {node_id} has left the cluster, and with it the actor and the vault that were there: start "
                    "this job again"
                ) from None
            self._vaults[name] = handle
        return self._vaults[name]

    def forget_vault(self, node_id: str) -> None:
        """Look for the vault of this node anew: the one that was known does not answer."""
        self._vaults.pop(f"{VAULT_NAME}_{node_id}", None)

    def get_of_vault(self, ref: Any, deadline: Deadline, name: str) -> Any:
        """What a vault answers, see `get`; of one that is silent, WaitTimeout says which, where, and how it stands."""
        name = name.partition("/")[0]
        node_id = name.rpartition("_")[2]
        what = f"the vault of node {node_id[:8]} in namespace {self.namespace!r}"
        return get(ref, deadline, what, lambda: _actor_words(name, self.namespace))

    def _patience(self, deadline: Deadline | None) -> Deadline:
        """For one that is silent: as long as the caller has, and time to start."""
        return Deadline(self.patience_s) if deadline is None else Deadline(START_S, deadline)

    def check_process(self) -> None:
        """Raises BadInput in a process that was forked since, and ClusterUnreachable in one that has left Ray, or
        whose cluster is lost (`cluster_lost`): no wait goes on then."""
        if os.getpid() != self._pid:
            raise BadInput(
                f"process {os.getpid()} was forked from process {self._pid} and cannot use its connection to Ray: use "
                "this object there, or make a new one in a process that is not forked (multiprocessing's 'spawn')"
            )
        if not ray.is_initialized():  # or a call would start a new cluster of its own
            raise ClusterUnreachable(_LEFT)
        if ray.get_runtime_context().get_worker_id() != self._worker_id:
            raise ClusterUnreachable(
                "this process has left its Ray cluster and connected anew since this object was made (ray.shutdown, "
                "ray.init): make a new one"
            )
        if self.cluster_lost is not None:
            raise self.cluster_lost

    def _how_the_broker_stands(self) -> str:
        self.check_process()
        with contextlib.suppress(ray.exceptions.RayError, ray.exceptions.GetTimeoutError):
            begins = ray.get(self._broker.starting.remote(), timeout=1.0)
            if begins is not None:
                return str(begins["message"])
            for name in ray.get(self._broker.unanswered.remote(), timeout=1.0):
                node = name.rpartition("_")[2][:8]
                words = _actor_words(name, self.namespace)
                return f"it answers, and waits for the vault of node {node} to keep this: {words}"
        return _actor_words(BROKER_NAME, self.namespace)

    def _broker_handle(self) -> Any:
        if not self._make:
            return self._broker_that_is_there()
        from ..broker.actor import Broker

        options: dict[str, Any] = {"lifetime": "detached", "get_if_exists": True, "num_cpus": 0}
        options |= {"max_restarts": -1, "max_concurrency": 10_000}
        there = ray.cluster_resources()
        place = next(({name: 0.001} for name in BROKER_PLACES if name in there), {})
        actor: Any = ray.remote(Broker).options(name=BROKER_NAME, namespace=self.namespace, resources=place, **options)
        return actor.remote(self.namespace)

    def _broker_that_is_there(self) -> Any:
        try:
            return ray.get_actor(BROKER_NAME, namespace=self.namespace)
        except ValueError:
            there = ", ".join(namespaces()) or "none"
            raise NoBroker(
                f"namespace {self.namespace!r} has no broker: no job has used cross-job there. Namespaces of this "
                f"cluster that have one: {there} (--namespace)"
            ) from None

    def _find_broker(self) -> None:
        self._broker = self._broker_handle()
        hello = self.hello()
        self.gcs_survives: bool | None = hello.get("gcs_survives")
        if hello["protocol"] != PROTOCOL:
            raise ProtocolMismatch(
                f"the broker of namespace {self.namespace!r} speaks protocol {hello['protocol']}, "
                f"this client {PROTOCOL}: give both jobs the same slime cross-job, or another --cross-job-namespace"
            )

    def ask(self, method: str, deadline: Deadline, *args: Any, **kwargs: Any) -> Any:
        """Call the broker actor, again while it restarts, within the deadline. Raises BrokerLost, WaitTimeout."""
        store_trouble, recalled, gone = None, False, None
        what = f"the broker of namespace {self.namespace!r}"
        while True:
            self.check_process()
            try:
                ask = getattr(self._broker, method).remote(*args, **kwargs)
                return get(ask, deadline, what, self._how_the_broker_stands)
            except (*_AWAY, ray.exceptions.ActorDiedError) as error:
                if gone is None:
                    gone = Deadline(min(self._grace_s, deadline.left()))
                if not gone:
                    raise BrokerLost(f"{what} has been gone for {gone.timeout_s:.0f} s: {error}") from None
                if isinstance(error, ray.exceptions.ActorDiedError):  # for good, as by ray.kill: another one is made
                    with contextlib.suppress(*_AWAY):
                        self._broker = self._broker_handle()
            except Forgotten:  # by a broker whose vaults are gone, too; or another one keeps the job
                if self.client is None or self.store is None or recalled or method == "recall":
                    raise
                recalled, gone = True, None
                job_id, uri = self.store
                self.ask("recall", deadline, job_id, self.client.client_id, uri)
                continue
            except StoreUnreachable as error:  # the broker cannot keep what it is told, for now
                store_trouble, gone = error, None  # it answers
                if not deadline:
                    raise
            except WaitTimeout:
                if store_trouble is not None:
                    raise store_trouble from None
                raise
            deadline.pause()


def _actor_words(name: str, namespace: str) -> str:
    from ..broker.liveness import actor_words  # whoever only looks seldom needs it, and is quicker without

    return actor_words(name, namespace)


def namespaces() -> list[str]:
    """Namespaces of this cluster that have a broker."""
    named = ray.util.list_named_actors(all_namespaces=True)
    return sorted(actor["namespace"] for actor in named if actor["name"] == BROKER_NAME)


def get(ref: Any, deadline: Deadline, what: str, stands: Callable[[], str] | None = None) -> Any:
    """`ray.get` within a deadline; raises the CrossJobError that the other side raised, without Ray's wrapping.

    Args:
        what: who is to answer, in words.
        stands: says how that one stands, in words, where it is silent: asked now and then, logged, and said by
            WaitTimeout.
    """
    try:
        return _silence_borne(ref, deadline, what, stands)
    except ray.exceptions.GetTimeoutError:
        raise WaitTimeout(
            f"{what} did not answer within {deadline.timeout_s:.0f} s: it may be waiting for a free worker process "
            "or be stuck; see `ray list actors`"
        ) from None
    except ray.exceptions.ActorDiedError as error:
        if "failed to import" in str(error):
            missing = (_MISSING.findall(str(error)) or ["slime.cross_job"])[-1]
            raise (BrokerLost if what.startswith("the broker") else Unreachable)(
                f"{what} could not start, because Ray's workers cannot import {missing}: put it on their "
                "PYTHONPATH (runtime_env env_vars), or pass a working_dir that holds it"
            ) from None
        raise
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, CrossJobError):
            raise cause from None
        raise


def _silence_borne(ref: Any, deadline: Deadline, what: str, stands: Callable[[], str] | None) -> Any:
    """`ray.get`, with a look now and then at who is silent, and at whether this process is in the cluster still."""
    began = time.monotonic()
    said_at, look_s, words = began, _LOOKS_S[0], ""
    while True:
        if not ray.is_initialized():  # ray.get would start a cluster of its own
            raise ClusterUnreachable(_LEFT)
        try:
            return ray.get(ref, timeout=min(look_s, deadline.left()))
        except ray.exceptions.GetTimeoutError:
            now = time.monotonic()
            if not deadline:
                if not words:
                    raise
                message = f"{what} has not answered for {now - began:.0f} s: {words}"
                raise WaitTimeout(message, {"kind": "silent", "message": message, "silent_s": now - began}) from None
            words = (stands() if stands is not None else "") or words
            if words and (now - said_at > _SAID_S or (said_at == began and look_s == _LOOKS_S[1])):
                said_at = now
                logger.warning(
                    "%s has not answered for %.0f s: %s; waiting for %.0f s more",
                    what,
                    now - began,
                    words,
                    deadline.left(),
                )
            look_s = _LOOKS_S[1]
