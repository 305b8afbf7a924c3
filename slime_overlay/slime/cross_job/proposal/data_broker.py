"""The names of the original proposal, on top of the same broker and with its guarantees.

For code that thinks in "store a ref, get a ref": every ref that is handed in is copied into a vault that owns it, so
what was stored outlives the process that made it. Nobody acks here, so what was stored lives as long as its retention
says: by number, age and bytes, from when it was stored or last got. New code uses Producer and Consumer.
"""

import threading
from dataclasses import replace
from typing import Any

import ray

from ..client.connection import Connection
from ..client.producer import Producer
from ..client.session import Session
from ..errors import BadInput, Fenced, RolloutNotFound
from ..ledger.state import PUBLICATION
from ..settings import Settings
from ..types import DEFAULT_NAMESPACE, check_job_id, check_name, check_rollout_id

RETAIN_S = 86_400.0
"""Seconds for which a stored rollout can be got, unless it is said otherwise: a day."""
_SHARE = 4  # of a node's object store, for one job


class CrossJobDataBroker:
    """Store and look up rollouts by (job id, rollout id). See `setup_cross_job_communication`.

    What is stored is freed by the first bound that it meets, the oldest first; getting a rollout makes it the newest.
    The newest goes with its age only. Storing never waits for room: what goes before anybody got it is counted in
    `status` ("dropped"). Where a consumer group is attached to a job, its acks decide instead, as with a Producer.

    Args:
        retain: rollouts that are kept of a job (None: any number).
        retain_s: seconds for which each can be got.
        retain_bytes: bytes that are kept of a job (None: a quarter of the object store of this node).
        max_bytes: bytes of a job in the object store, at which the oldest goes, too.

    Raises:
        BadInput: a bound that is out of range. Else as setup_cross_job_communication.
    """

    def __init__(
        self,
        namespace: str = DEFAULT_NAMESPACE,
        *,
        retain: int | None = None,
        retain_s: float = RETAIN_S,
        retain_bytes: int | None = None,
        max_bytes: int | None = None,
    ):
        self.namespace = namespace
        bounds = Settings(
            retain=retain,
            retain_s=retain_s,
            retain_bytes=retain_bytes,
            max_bytes=max_bytes,
            retain_from=PUBLICATION,
            namespace=namespace,
        )
        self._connection = Connection(namespace)
        self._settings = bounds if retain_bytes else replace(bounds, retain_bytes=_share_of_this_node())
        self._producers: dict[str, Producer] = {}
        self._lock = threading.Lock()

    def store_rollout_data(self, job_id: str, rollout_id: int, data_ref: Any) -> int:
        """Publish what `data_ref` stands for (an ObjectRef to anything, columns, or a Batch); returns its version.

        The first call for a job id attaches this process as the job's producer, until `close`. An id that was freed is
        not taken again.

        Raises:
            BadInput, JobIdTaken, and whatever Producer.publish raises.
        """
        check_rollout_id(rollout_id)
        with self._lock:
            try:
                return self._producer(job_id).publish(rollout_id, data_ref).version
            except Fenced:  # another process of this Ray job stored something since: take over again
                self._producers.pop(job_id)
                return self._producer(job_id).publish(rollout_id, data_ref).version

    def get_rollout_data(self, job_id: str, rollout_id: int) -> Any:
        """A ref to the newest version, owned by a vault, for `ray.get`; claims nothing, and its retention begins anew.

        Raises:
            RolloutNotFound: it was not stored, or is freed.
        """
        payload = self._connection.call("read", check_job_id(job_id), check_rollout_id(rollout_id)).payload
        if payload.parts != 1:
            raise BadInput(f"rollout {rollout_id} of job {job_id} has {payload.parts} parts: read it with a Consumer")
        return self._connection.open_refs(payload)[0]

    def list_available_rollouts(self, job_id: str | None = None) -> list[tuple[str, int]]:
        """(job id, rollout id) of every rollout that can be read, sorted; of one job, or of all."""
        if job_id is not None and check_job_id(job_id) not in self._connection.call("status"):
            return []
        listed = self._connection.call("listed", job_id)
        return [(job, rollout_id) for job in sorted(listed) for rollout_id in listed[job]]

    def close(self) -> None:
        """End the stream of every job that was stored to; what it holds can be got as long as its retention says."""
        with self._lock:
            for producer in self._producers.values():
                producer.finish()
            self._producers.clear()

    def __enter__(self) -> "CrossJobDataBroker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _producer(self, job_id: str) -> Producer:
        if job_id not in self._producers:
            self._producers[job_id] = Producer(job_id, settings=self._settings)
        return self._producers[job_id]


class DataProducer(Session):
    """Keep named data for other jobs: newest wins, older ones are freed. Owned by a vault, not by this process.

    Any number of them may write to one job id.
    """

    role = "writer"

    def __init__(self, job_id: str = "data", namespace: str = DEFAULT_NAMESPACE):
        super().__init__(job_id, namespace=namespace)

    def produce_data(self, key: str, data: Any) -> Any:
        """Publish `data` (an ObjectRef, or anything that Ray serialises) under `key`; returns a ref to it."""
        self.publish_value(key, data if isinstance(data, ray.ObjectRef) else ray.put(data))
        return self.get_data_ref(key)

    def get_data_ref(self, key: str) -> Any:
        """A ref to the newest data of `key`, owned by a vault. Raises RolloutNotFound."""
        self.check()
        located = self.connection.call("get_value", self.job_id, check_name(key, "a key"))
        if located is None:
            raise RolloutNotFound(f"no data under {key!r} in job {self.job_id}")
        return self.connection.open_refs(located.payload)[0]


def setup_cross_job_communication(namespace: str = DEFAULT_NAMESPACE) -> CrossJobDataBroker:
    """Find the broker of `namespace` on this Ray cluster, or create it (race-free); returns access to it. What is
    stored is kept as far as the default bounds of CrossJobDataBroker say.

    Raises:
        ClusterUnreachable, ProtocolMismatch, WaitTimeout.
    """
    return CrossJobDataBroker(namespace)


def _share_of_this_node() -> int | None:
    here = ray.get_runtime_context().get_node_id()
    rooms = [n["Resources"].get("object_store_memory", 0) for n in ray.nodes() if n["NodeID"] == here and n["Alive"]]
    return int(rooms[0] / _SHARE) if rooms and rooms[0] >= _SHARE else None
