"""A ledger in few words: clients named by their role, payloads by their rollout."""

import pickle
from typing import Any

from slime.cross_job.ledger import Ledger
from slime.cross_job.ledger.snapshot import Snapshot, Tables, restore, snapshot
from slime.cross_job.ledger.state import TABLES
from slime.cross_job.types import ClientInfo, Located, LocatedValue, Payload


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def attach(
    ledger: Ledger, name: str, group: str = "train", ray_job: str = "", job: str = "exp", **settings: Any
) -> str:
    """Names begin with p for producers, with c for consumers, with w for writers."""
    role = {"p": "producer", "c": "consumer", "w": "writer"}[name[0]]
    info = ClientInfo(name, job, role, group=group if role == "consumer" else "", ray_job_id=ray_job or f"r-{name}")
    ledger.membership.attach(info, **settings)
    return name


def attach_pair(ledger: Ledger, **settings: Any) -> None:
    """The producer p, which says these settings, and the consumer c."""
    attach(ledger, "p", **settings)
    attach(ledger, "c")


def publish(
    ledger: Ledger, rollout_id: int, token: str = "", vault: str = "v1/a", producer: str = "p", **facts: Any
) -> Located:
    payload = Payload(token or f"t{rollout_id}", vault, **{"nbytes": 10, **facts})
    return ledger.publish(producer, rollout_id, payload)[1]


def publish_each(ledger: Ledger, *rollout_ids: int, **facts: Any) -> None:
    for rollout_id in rollout_ids:
        publish(ledger, rollout_id, **facts)


def train(ledger: Ledger, *rollout_ids: int, consumer: str = "c") -> None:
    for rollout_id in rollout_ids:
        ledger.claim(consumer, rollout_id)
        ledger.ack(consumer, rollout_id)


def weights(ledger: Ledger, version: int, author: str = "c") -> None:
    ledger.put_value(author, "weights", Payload(f"w{version}-{author}", "v1/a", 1), version)


def figures(ledger: Ledger, *names: str) -> list[Any]:
    status = ledger.status("exp")["exp"]
    return [status[name] for name in names]


def remembered(ledger: Ledger, broker: int = 1, serial: int = 1) -> list[tuple[Snapshot, Tables]]:
    """What a vault keeps of each job, as it comes back from there."""
    kept = [
        (snapshot(ledger, job_id, broker, serial), {name: dict(getattr(job, name)) for name in TABLES})
        for job_id, job in ledger.jobs.items()
    ]
    return pickle.loads(pickle.dumps(kept))


def restarted(ledger: Ledger, *held: Located | LocatedValue) -> Ledger:
    """A ledger as a broker that restarts makes it, where vaults hold only these."""
    again = Ledger(lambda: 1000.0, wall=lambda: 1000.0)
    restore(again, remembered(ledger), [*held])
    return again


def ends_at(ledger: Ledger, rollout_id: int, producer: str = "p") -> tuple[int, Any]:
    """(n, where the source stands before its generation)."""
    position, payload = ledger.source_before(producer, rollout_id)
    return position, payload and payload.source
