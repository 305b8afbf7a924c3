"""What changed in a job since a mark. Whoever remembers a job for its broker is told nothing else: vaults
(broker/replicas.py) and a durable store (storage/wal.py); `snapshot.rebuild` makes the job again from it.

A job is small but for its tables (state.TABLES), of which only changed rows go. Its rollouts and values are left out:
their records lie beside the payloads in vaults, and in the table `records` where a durable store holds them.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from .state import TABLES, Job
from .tables import Change, Mark, Table

Marks = dict[str, Mark]
"""Table -> how far its changes are known."""


def bare(job: Job) -> Job:
    """The job as it is now, without what is kept apart. Shares records with the ledger: serialise it at once."""
    empty: dict[str, Any] = {name: Table() for name in TABLES}
    groups = {name: replace(group, ready=[]) for name, group in job.groups.items()}
    in_memory = {key: value for key, value in job.values.items() if not value.payload.stored}
    # the others are in `records`
    missed = {**job.lost_values, **in_memory}  # until one of those that hold them says so
    return replace(job, rollouts={}, values={}, lost_values=missed, groups=groups, aged_at=None, **empty)


def changes(job: Job, since: Mapping[str, Mark] | None = None) -> tuple[dict[str, Change[Any]], Marks]:
    """(what makes the tables of whoever knew them at `since` what they are now, this moment); None: who knows nothing
    of them."""
    tables: dict[str, Table[Any]] = {name: getattr(job, name) for name in TABLES}
    told = {name: table.since(since[name] if since else None) for name, table in tables.items()}
    return told, {name: table.mark() for name, table in tables.items()}
