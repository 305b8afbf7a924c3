"""What a broker that restarts must know, and how the ledger is made again from it. Pure state, no Ray.

Vaults keep the record of every payload that they hold, and the newest snapshot of each job: all the rest that the
ledger knows of it. Both are written before anybody is answered, so a broker that dies forgets nothing that it said.
"""

import logging
from dataclasses import dataclass, replace
from typing import Any

from .ledger import Ledger
from .records import TABLES, Client, Job
from .tables import Table
from .types import Located, LocatedValue

logger = logging.getLogger(__name__)

Tables = dict[str, dict[int, Any]]
"""Field of the job (records.TABLES) -> its entries."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A job and its clients; without its rollouts and values, whose records lie beside the payloads, and without its
    tables, of which vaults are told only what changed (keeper.py)."""

    broker: int  # n-th broker of the namespace
    serial: int  # n-th snapshot by it
    job: Job
    clients: list[Client]

    @property
    def order(self) -> tuple[int, int]:
        return self.broker, self.serial


def snapshot(ledger: Ledger, job_id: str, broker: int, serial: int) -> Snapshot:
    """The state of a job as it is now. Shares records with the ledger: serialise it before anything else happens."""
    job = ledger.jobs[job_id]
    ledger.age(job)
    groups = {name: replace(group, ready=[]) for name, group in job.groups.items()}
    missed = {**job.lost_values, **job.values}  # until a vault says that it has them
    empty: dict[str, Any] = {name: Table() for name in TABLES}
    bare = replace(job, rollouts={}, values={}, lost_values=missed, groups=groups, aged_at=None, **empty)
    return Snapshot(broker, serial, bare, [c for c in ledger.clients.values() if c.info.job_id == job_id])


def take_job(ledger: Ledger, job: Job, clients: list[Client]) -> list[int]:
    """Let a ledger know a job as its journal in a durable store says; returns the rollouts that are not there."""
    ledger.jobs[job.job_id] = job
    ledger.take_age(job)
    ledger.take_clients(clients)
    job.held_bytes = 0
    for record in sorted(job.records.values(), key=lambda record: record.serial):
        ledger.put_back(job, record)
    return ledger.reconcile(job)


def restore(
    ledger: Ledger,
    snapshots: list[tuple[Snapshot, Tables]],
    records: list[Located | LocatedValue],
) -> dict[str, list[int]]:
    """Fill an empty ledger. Returns job id -> rollouts that no vault holds any more.

    Args:
        snapshots: each with the tables of its job, of any age; the newest of each job counts.
        records: of every payload that some vault holds; what lies in a durable store is known besides. What is acked
            and freed by now is dropped (`take_drops`).
    """
    for found, tables in sorted(snapshots, key=lambda pair: pair[0].order):
        ledger.jobs[found.job.job_id] = found.job
        for name, entries in tables.items():
            setattr(found.job, name, Table(entries))
        found.job.held_bytes = 0  # until a vault says that it has them
        ledger.take_age(found.job)
    for found in {found.job.job_id: found for found, _ in sorted(snapshots, key=lambda pair: pair[0].order)}.values():
        ledger.take_clients(found.clients)
    for known in ledger.jobs.values():
        newer = {r.serial for r in records if r.job_id == known.job_id and r.serial >= known.serial}
        if newer and len(newer) < max(newer) + 1 - known.serial:  # of what was recorded between nobody knows any more
            known.gap = True
            logger.critical("job %s: what its broker was told last died with the vaults that kept it", known.job_id)
    here = {(record.job_id, record.serial) for record in records}
    in_stores = [r for job in ledger.jobs.values() for r in job.records.values() if (r.job_id, r.serial) not in here]
    for record in sorted([*records, *in_stores], key=lambda record: record.serial):
        job = ledger.jobs.setdefault(record.job_id, Job(record.job_id))
        ledger.put_back(job, record)
    missing: dict[str, list[int]] = {}
    for job in ledger.jobs.values():
        if gone := ledger.reconcile(job):
            missing[job.job_id] = gone
    return missing
