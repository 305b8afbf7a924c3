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
    process: str = ""  # names the process of this broker: no two count as one, whatever their numbers

    @property
    def order(self) -> tuple[int, int]:
        return self.broker, self.serial


def snapshot(ledger: Ledger, job_id: str, broker: int, serial: int, process: str = "") -> Snapshot:
    """The state of a job as it is now. Shares records with the ledger: serialise it before anything else happens."""
    job = ledger.jobs[job_id]
    ledger.age(job)
    groups = {name: replace(group, ready=[]) for name, group in job.groups.items()}
    missed = {**job.lost_values, **job.values}  # until a vault says that it has them
    empty: dict[str, Any] = {name: Table() for name in TABLES}
    bare = replace(job, rollouts={}, values={}, lost_values=missed, groups=groups, aged_at=None, **empty)
    clients = [c for c in ledger.clients.values() if c.info.job_id == job_id]
    return Snapshot(broker, serial, bare, clients, process)


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
    """Let a ledger know jobs that it does not know. Returns job id -> rollouts that no vault holds any more.

    Args:
        snapshots: each with the tables of its job, of any age; the newest of each job counts.
        records: of every payload that some vault holds; what lies in a durable store is known besides. What is acked
            and freed by now is dropped (`take_drops`).
    """
    newest: dict[str, tuple[Snapshot, Tables]] = {}
    for found in sorted(snapshots, key=lambda pair: pair[0].order):
        newest[found[0].job.job_id] = found
    held: dict[str, list[Located | LocatedValue]] = {job_id: [] for job_id in newest}
    for record in records:
        held.setdefault(record.job_id, []).append(record)
    missing = {job_id: _restore_job(ledger, job_id, newest.get(job_id), held[job_id]) for job_id in held}
    return {job_id: rollouts for job_id, rollouts in missing.items() if rollouts}


def _restore_job(
    ledger: Ledger, job_id: str, found: tuple[Snapshot, Tables] | None, held: list[Located | LocatedValue]
) -> list[int]:
    job = Job(job_id) if found is None else found[0].job
    ledger.jobs[job_id] = job
    job.held_bytes = 0  # until a vault says that it has them
    if found is not None:
        for name, entries in found[1].items():
            setattr(job, name, Table(entries))
        ledger.take_age(job)
        ledger.take_clients(found[0].clients)
        newer = {record.serial for record in held if record.serial >= job.serial}
        if newer and len(newer) < max(newer) + 1 - job.serial:
            job.gap = True
            logger.critical("job %s: no vault that answered knows what its broker was told last", job_id)
    here = {record.serial: record for record in held}
    for serial, stored in job.records.items():
        known = here.setdefault(serial, stored)
        if known.payload.token == stored.payload.token:  # its vault may not know yet that it lies there, too
            here[serial] = replace(known, payload=replace(known.payload, stored=stored.payload.stored))
    for serial in sorted(here):
        ledger.put_back(job, here[serial])
    return ledger.reconcile(job)


# ---------------------------------------------------------------------- what a vault holds, in pages

Row = tuple[str, str, int, Any]
"""(job id, table, key, entry)."""
Item = Located | LocatedValue | Snapshot | Row


@dataclass(frozen=True, slots=True)
class Page:
    """Part of what a vault holds."""

    incarnation: str  # of the vault
    items: list[Item]
    left: int  # items after these


def listing(records: list[Located | LocatedValue], snapshots: list[tuple[Snapshot, Tables]]) -> list[Item]:
    """All that a vault holds, in small items: records, snapshots, and the rows of their tables after each."""
    items: list[Item] = [*records]
    for found, tables in snapshots:
        items.append(found)
        job_id = found.job.job_id
        items += [(job_id, name, key, entry) for name, rows in tables.items() for key, entry in rows.items()]
    return items


def gathered(items: list[Item]) -> tuple[list[tuple[Snapshot, Tables]], list[Located | LocatedValue]]:
    """(snapshots with their tables, records) of a listing."""
    snapshots: dict[str, tuple[Snapshot, Tables]] = {}
    records: list[Located | LocatedValue] = []
    for item in items:
        if isinstance(item, tuple):
            job_id, table, key, entry = item
            snapshots[job_id][1][table][key] = entry
        elif isinstance(item, Snapshot):
            snapshots[item.job.job_id] = (item, {name: {} for name in TABLES})
        else:
            records.append(item)
    return [*snapshots.values()], records
