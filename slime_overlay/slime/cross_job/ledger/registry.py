"""Every job and every client of a namespace, by name, and the clocks. What the parts of the ledger share."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from ..errors import BadInput, Fenced, Forgotten, JobNotFound
from ..types import check_job_id
from .state import LIVE, SILENT, Client, Group, Job
from .verdicts import VOUCHED_S, presumed_dead, who


@dataclass(eq=False)
class Registry:
    """Jobs and clients of one namespace.

    Args:
        clock: monotonic seconds, for everything that is waited for.
        wall: wall-clock seconds, for what is shown to people.
    """

    clock: Callable[[], float] = time.monotonic
    wall: Callable[[], float] = time.time
    jobs: dict[str, Job] = field(default_factory=dict)
    clients: dict[str, Client] = field(default_factory=dict)

    def live(self, client_id: str, role: str | None = None) -> Client:
        client = self.clients.get(client_id)
        if client is None:
            raise Forgotten(
                "the broker does not know this client: it ended long ago, or no vault that remembers it is left (they "
                "died, or were given up); start this job again"
            )
        if not client.attached:
            raise Fenced(
                f"this {who(client)} was ended ({client.state}: {client.reason or 'closed'}): it can do nothing more"
            )
        if role is not None and client.info.role != role:
            raise BadInput(f"only a {role} can do this, not a {client.info.role}")
        return client

    def is_live(self, client_id: str) -> bool:
        """Whether this client is attached, and its lease is not over."""
        client: Client | None = self.clients.get(client_id)
        return client is not None and client.state == LIVE

    def known_job(self, job_id: str) -> Job:
        if check_job_id(job_id) not in self.jobs:
            known = ", ".join(sorted(self.jobs)) or "none"
            raise JobNotFound(f"this namespace has no job {job_id!r}; it has {known}")
        return self.jobs[job_id]

    def is_there(self, client: Client | None) -> bool:
        """Whether it is attached, and its peers do not take it for dead."""
        return client is not None and client.attached and not presumed_dead(client, self.clock())

    def members(self, group: Group, job: Job) -> list[Client]:
        """Those that are attached, heard or not."""
        mine = [c for c in self.clients.values() if c.attached and c.info.job_id == job.job_id]
        return [c for c in mine if c.info.role == "consumer" and c.info.group == group.name]

    def clients_of(self, job_id: str) -> list[Client]:
        """All that attached to this job, whatever became of them."""
        return [c for c in self.clients.values() if c.info.job_id == job_id]

    def living_of(self, job_id: str) -> list[Client]:
        """The clients of a job that are there."""
        return [c for c in self.clients_of(job_id) if self.is_there(c)]

    def left(self, group: Group, job: Job) -> Client | None:
        """The member with which this group ended; None: one is there, or there never was one."""
        if group.live == 0:
            return group.ended
        if group.last is not None and group.last.state == LIVE:
            return None
        members = self.members(group, job)
        if any(self.is_there(member) for member in members):
            return None
        return max(members, key=self.ended_at, default=None)

    def ended_at(self, client: Client) -> float:
        """Since when its peers miss it (monotonic)."""
        if client.state == SILENT and client.vouched_at is not None:
            return max(client.ended_at, client.vouched_at + VOUCHED_S)
        return client.ended_at

    def while_silent(self, client: Client) -> str:
        return f" after {self.clock() - client.last_beat:.1f} s without a sign of life" * (client.state == SILENT)
