"""What a tool may see of the jobs of a namespace, and do to them. Reading never disturbs a run: no client attaches, no
lease is taken, no broker is made, nothing is written to a store; samples are cut in the vault that owns them, and only
what is shown travels.
"""

import contextlib
import logging
import time
import uuid
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import ray

from ..client.connection import GONE, START_S, Connection, ensure_ray, get, namespaces
from ..deadline import Deadline
from ..errors import BadInput, BrokerLost, JobNotFound, NoBroker, PayloadLost, Unreachable, WaitTimeout
from ..ledger.history import PROGRESS
from ..ledger.state import DEAD
from ..types import BROKER_NAME, DEFAULT_NAMESPACE, VAULT_NAME, Located, check_job_id
from ..vault.preview import MOST_CHARACTERS, MOST_NUMBERS, preview

if TYPE_CHECKING:
    from ..storage.payloads import Archive

_STATS_S = 5.0  # for a vault to say what it holds
_QUIET_S = 1.0  # without a new broker or vault, after which a namespace has ended
_ENDS_S = 20.0
_BEGINS_S = 5.0  # for the broker to say how it begins


class Viewer:
    """See the module.

    Args:
        address: of the Ray cluster (None: RAY_ADDRESS), where this process is not connected yet.

    Raises:
        ClusterUnreachable, NoBroker, BrokerLost, ProtocolMismatch. BrokerLost says for which vault the broker waits.
    """

    def __init__(self, namespace: str = DEFAULT_NAMESPACE, address: str | None = None, timeout_s: float = START_S):
        ensure_ray(address, logging_level=logging.ERROR)
        self.address: str = ray.get_runtime_context().gcs_address
        self.namespace, self._timeout_s = namespace, timeout_s
        raise_if_stuck(namespace)
        try:
            self.connection = Connection(namespace, make=False)
        except WaitTimeout:
            raise_if_stuck(namespace)
            raise

    @staticmethod
    def namespaces(address: str | None = None) -> list[str]:
        """Namespaces of the cluster that have a broker."""
        ensure_ray(address, logging_level=logging.ERROR)
        return namespaces()

    def jobs(self) -> dict[str, dict[str, Any]]:
        """Status by job id, of every job; see status.job_status."""
        return self._call("status")

    def the_job(self, job_id: str | None) -> str:
        """`job_id`; None: the only job that is not complete, or the only one. Raises JobNotFound, BadInput."""
        if job_id is not None:
            return check_job_id(job_id)
        jobs = self.jobs()
        open_ones = [name for name, status in jobs.items() if not status["complete"]]
        candidates = open_ones if len(open_ones) == 1 else [*jobs]
        if len(candidates) == 1:
            return candidates[0]
        if not jobs:
            raise JobNotFound(f"namespace {self.namespace!r} has no jobs yet")
        raise BadInput(f"there are several jobs, say which: --job-id {' | '.join(sorted(jobs))}")

    def status(self, job_id: str) -> dict[str, Any]:
        """See status.job_status. Raises JobNotFound."""
        return self._call("status", job_id)[job_id]

    def look(
        self, job_id: str, since: int = -1, limit: int = PROGRESS, events_since: int = 0, spans: bool = False
    ) -> dict[str, Any]:
        """status.looked, JSON-able: "progress" is [{"rollout_id", ...Progress}], "events" [{"number", ...Event}]."""
        found = self._call("look", job_id, since=since, limit=limit, events_since=events_since, spans=spans)
        found["progress"] = [{"rollout_id": r, **asdict(known)} for r, known in found["progress"]]
        found["events"] = [{"number": number, **asdict(event)} for number, event in found["events"]]
        return found

    def detail(self, job_id: str, rollout_id: int) -> dict[str, Any]:
        """status.rollout_detail. Raises RolloutNotFound."""
        return self._call("detail", job_id, rollout_id)

    def samples(
        self,
        job_id: str,
        rollout_id: int,
        version: int | None = None,
        first: int = 0,
        count: int = 3,
        numbers: int = MOST_NUMBERS,
        characters: int = MOST_CHARACTERS,
    ) -> dict[str, Any]:
        """preview.preview of a published version. Raises RolloutNotFound, PayloadLost, Unreachable."""
        located: Located = self._call("get", job_id, rollout_id, version)
        cut = (first, count, numbers, characters)
        payload = located.payload
        if not payload.vault:
            return preview(self._stored_parts(located), *cut)
        try:
            vault = self.connection.vault(payload.vault)
            return get(vault.preview.remote(payload.token, *cut), Deadline(self._timeout_s), "the vault")
        except PayloadLost:
            if payload.stored:
                return preview(self._stored_parts(located), *cut)
            raise
        except GONE as error:
            raise Unreachable(f"{payload.vault}, which holds rollout {rollout_id}, does not answer: {error}") from None

    def parts(self, job_id: str, rollout_id: int, version: int | None = None) -> tuple[Located, list[Any]]:
        """A published version and its whole parts, which come to this node. Raises as `samples`."""
        located: Located = self._call("get", job_id, rollout_id, version)
        if not located.payload.vault:
            return located, self._stored_parts(located)
        try:
            return located, ray.get(self.connection.open_refs(located.payload), timeout=600)
        except ray.exceptions.ObjectLostError as error:
            raise PayloadLost(f"rollout {rollout_id} of job {job_id} is lost: {error}") from None

    def steer(self, operation: str, job_id: str, *args: Any) -> Any:
        """One of operator.STEERING, carried out once; or "forget". Raises what the ledger raises."""
        if operation == "forget":
            return self._call(operation, job_id)
        return self._call("steer", job_id, uuid.uuid4().hex, operation, *args)

    def foresee(self, operation: str, job_id: str, *args: Any) -> Any:
        """What `steer` would return now. Changes nothing; raises what `steer` would raise."""
        return self._call("foresee", job_id, operation, *args)

    def living(self) -> dict[str, str]:
        """Clients that are attached: client id -> who it is, in words."""
        return self._call("living")

    def end_client(self, client_id: str, why: str) -> None:
        """End a client as dead: its next sign of life tells it so."""
        self._call("end", client_id, DEAD, why)

    def collect(self) -> int:
        """Free what nobody knows of in durable stores; see Broker.collect."""
        return self.connection.ask("collect", Deadline(600.0))

    def archive(self, job_id: str) -> "Archive":
        """The job's payloads in its durable store. Raises BadInput: it has none."""
        uri = self._call("store_uri", job_id)
        if uri is None:
            raise BadInput(f"job {job_id} has no durable store (--cross-job-store)")
        from ..storage import open_store
        from ..storage.payloads import Archive

        return Archive(open_store(uri, make=False), job_id)

    def _stored_parts(self, located: Located) -> list[Any]:
        return self.archive(located.job_id).read(located.payload.stored)

    def _call(self, operation: str, *args: Any, **kwargs: Any) -> Any:
        try:
            return self.connection.call(operation, *args, timeout_s=self._timeout_s, **kwargs)
        except WaitTimeout:
            raise_if_stuck(self.namespace)
            raise


def starting(namespace: str) -> dict[str, Any] | None:
    """What the broker of a namespace waits for while it begins, see Broker.starting; None: it has begun.

    Raises:
        NoBroker: there is none. BrokerLost, WaitTimeout: it does not answer.
    """
    return _ask_one_that_begins(namespace, "starting")


def give_up(namespace: str, vault: str) -> None:
    """Let a broker that begins go on without this vault. Raises as `starting`; BadInput: it does not wait for it."""
    _ask_one_that_begins(namespace, "give_up", vault)


def holdings(namespace: str) -> dict[str, int]:
    """What the vaults of a namespace hold: {"vaults", "silent" of them, "payloads", "nbytes", "behind"}; see
    Vault.stats."""
    found = {"vaults": 0, "silent": 0, "payloads": 0, "nbytes": 0, "behind": 0}
    asked = []
    for name in _actors(namespace):
        if name != BROKER_NAME:
            found["vaults"] += 1
            with contextlib.suppress(ValueError):
                asked.append(ray.get_actor(name, namespace=namespace).stats.remote())
    deadline = Deadline(_STATS_S)
    for ref in asked:
        try:
            for what, number in get(ref, deadline, "a vault").items():
                found[what] += number
        except (*GONE, WaitTimeout):
            found["silent"] += 1
    return found


def end_namespace(namespace: str) -> list[str]:
    """Kill broker and vaults of a namespace, and with them all that only they hold; names of those that were there.

    Raises:
        Unreachable: clients that live make new ones all the time.
    """
    ended: dict[str, None] = {}
    deadline, quiet = Deadline(_ENDS_S), Deadline(_QUIET_S)
    while quiet:
        names = _actors(namespace)
        for name in names:
            with contextlib.suppress(ValueError):  # it has ended by now
                ray.kill(ray.get_actor(name, namespace=namespace), no_restart=True)
                ended[name] = None
        if names:
            quiet = Deadline(_QUIET_S)
        if not deadline:
            raise Unreachable(
                f"namespace {namespace!r} does not end: {', '.join(names)} came back for {_ENDS_S:.0f} s, made by "
                "clients that live: end their jobs first"
            )
        time.sleep(0.2)
    return [*ended]


def _actors(namespace: str) -> list[str]:
    """The broker, if there is one, which would note that vaults died; then the vaults."""
    named = ray.util.list_named_actors(all_namespaces=True)
    mine = [actor["name"] for actor in named if actor["namespace"] == namespace]
    return [name for name in mine if name == BROKER_NAME] + [name for name in mine if name.startswith(VAULT_NAME)]


def raise_if_stuck(namespace: str) -> None:
    """Raises BrokerLost where the broker cannot begin, for the time being: it says for which vault it waits, or what
    fails."""
    try:
        found = starting(namespace)
    except (NoBroker, BrokerLost, WaitTimeout):  # whoever asks it says that
        return
    if found is not None and found["stuck"]:
        raise BrokerLost(found["message"])


def _ask_one_that_begins(namespace: str, method: str, *args: Any) -> Any:
    try:
        broker = ray.get_actor(BROKER_NAME, namespace=namespace)
    except ValueError:
        raise NoBroker(f"namespace {namespace!r} has no broker") from None
    if not hasattr(broker, method):  # of an earlier version: Connection says so
        return None
    try:
        return get(getattr(broker, method).remote(*args), Deadline(_BEGINS_S), "the broker")
    except GONE as error:
        raise BrokerLost(f"the broker of namespace {namespace!r} does not answer: {error}") from None
