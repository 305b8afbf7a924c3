"""What a broker that restarts must know, and how the ledger is made again from it. Pure state, no Ray.

Vaults keep the record of every payload that they hold, and the newest snapshot of each job: all the rest that the
ledger knows of it. Both are written before anybody is answered, so a broker that dies forgets nothing that it said.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from ..types import Located, LocatedValue
from . import Ledger
from .changes import bare
from .state import TABLES, Client, Job
from .tables import Table

logger = logging.getLogger(__name__)

Tables = dict[str, dict[int, Any]]
"""Field of the job (state.TABLES) -> its entries."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A job and its clients; without its rollouts and values, whose records lie beside the payloads, and without its
    tables, of which vaults are told only what changed (replicas.py)."""

    broker: int  # n-th broker of the namespace
    serial: int  # n-th snapshot by it
    job: Job
    clients: list[Client]
    process: str = ""  # names the process of this broker: no two count as one, whatever their numbers

    @property
    def order(self) -> tuple[int, int]:
        return self.broker, self.serial


def snapshot(ledger: Ledger, job_id: str, broker: int, serial: int, process: str = "") -> Snapshot:
    """The state of a job as it is now, without its tables; see changes.py."""
    job = ledger.jobs[job_id]
    ledger.history.age(job)
    return Snapshot(broker, serial, bare(job), ledger.registry.clients_of(job_id), process)


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


def rebuild(ledger: Ledger, job: Job, clients: list[Client], held: Iterable[Located | LocatedValue] = ()) -> list[int]:
    """Let the ledger know this job, with its tables, in place of what it knew; returns rollouts that nobody holds.

    Args:
        held: records of what vaults hold, besides `job.records`, which lies in its durable store.
    """
    ledger.jobs[job.job_id] = job
    job.held_bytes = 0  # until somebody says that it has them
    ledger.history.take_age(job)
    ledger.membership.take_clients(clients)
    here = {record.serial: record for record in held}
    for serial, stored in job.records.items():
        known = here.setdefault(serial, stored)
        if known.payload.token == stored.payload.token:  # its vault may not know yet that it lies there, too
            here[serial] = replace(known, payload=replace(known.payload, stored=stored.payload.stored))
    for serial in sorted(here):
        ledger.rollouts.put_back(job, here[serial])
    return ledger.rollouts.reconcile(job)


def _restore_job(
    ledger: Ledger, job_id: str, found: tuple[Snapshot, Tables] | None, held: list[Located | LocatedValue]
) -> list[int]:
    if found is None:
        return rebuild(ledger, Job(job_id), [], held)
    state, tables = found
    job = state.job
    for name, entries in tables.items():
        setattr(job, name, Table(entries))
    newer = {record.serial for record in held if record.serial >= job.serial}
    if newer and len(newer) < max(newer) + 1 - job.serial:
        job.gap = True
        logger.critical("job %s: no vault that answered knows what its broker was told last", job_id)
    return rebuild(ledger, job, state.clients, held)


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
