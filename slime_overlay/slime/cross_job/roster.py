"""The roster: which producers and consumers are attached, in which incarnation, and when each was last heard.

The membership half of the ledger (ledger.py); pure state with an injected clock, like it.
"""

import time
from collections.abc import Callable
from typing import Any

from .errors import BadInput, BrokerLost, EndOfStream, Fenced, JobIdTaken, PeerFailed, Refused
from .records import DEAD, FINISHED, Client, Group, Job
from .types import ClientInfo, check_job_id
from .verdicts import verdict, who


class Roster:
    """Jobs and clients of one namespace.

    Args:
        clock: monotonic seconds, for everything that is waited for.
        wall: wall-clock seconds, for what is shown to people.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time):
        self._clock = clock
        self._wall = wall
        self.jobs: dict[str, Job] = {}
        self.clients: dict[str, Client] = {}

    def attach(
        self, info: ClientInfo, max_ahead: int | None = None, retain: int | None = None, dead_after_s: float = 30.0
    ) -> dict[str, Any]:
        """Let a client in; returns {"epoch", "max_ahead", "retain"} as they hold for the job.

        A producer replaces an earlier one that ended, or that belongs to the same Ray job (which is fenced).

        Raises:
            JobIdTaken: a producer of another Ray job is alive under this job id.
            Refused: the job's settings were stated otherwise by a client that is alive.
        """
        if info.role not in ("producer", "consumer", "writer"):
            raise BadInput(f"role {info.role!r} is none of 'producer', 'consumer', 'writer'")
        known = self.clients.get(info.client_id)
        if known is not None and known.live:  # the same call again, whose answer was lost
            job = self.jobs[known.info.job_id]
            return {"epoch": known.epoch, "max_ahead": job.max_ahead, "retain": job.retain}
        job = self._job_for_attach(check_job_id(info.job_id))
        stated = {n: v for n, v in (("max_ahead", max_ahead), ("retain", retain)) if v is not None}
        replaced = self._replaced_by(job, info)
        self._agree(job, stated, replaced)
        if replaced is not None:
            self.end(replaced.info.client_id, DEAD, "replaced by a newer producer of the same Ray job")
        for name, value in stated.items():
            setattr(job, name, value)
        now, wall = self._clock(), self._wall()
        if info.role == "producer":
            job.producer_epoch += 1
            client = Client(info, job.producer_epoch, dead_after_s, wall, now, wall)
            job.producer = client
        elif info.role == "consumer":
            group = job.groups.get(info.group)
            if group is None:
                group = job.groups[info.group] = Group(info.group)
                group.ready = sorted(job.rollouts)
            for rollout_id in [r for r in job.done if r not in group.acked]:  # no longer acked by all open groups
                del job.done[rollout_id]
            group.epoch += 1
            client = Client(info, group.epoch, dead_after_s, wall, now, wall)
            group.last, group.live = client, group.live + 1
        else:  # a writer publishes values only; any number a job
            client = Client(info, 1, dead_after_s, wall, now, wall)
        client.stated = stated
        self.clients[info.client_id] = client
        return {"epoch": client.epoch, "max_ahead": job.max_ahead, "retain": job.retain}

    def heartbeat(self, client_id: str, activity: str) -> None:
        """Record a sign of life. Raises Fenced when the client was replaced or counted as dead."""
        client = self._live(client_id)
        client.last_beat, client.last_beat_wall, client.activity = self._clock(), self._wall(), activity

    def end(self, client_id: str, state: str, reason: str = "") -> None:
        """A client ends as `finished`, `failed` or `dead`. Its leases are given back. Ending twice changes nothing."""
        client = self.clients.get(client_id)
        if client is None or not client.live:
            return
        client.state, client.reason, client.ended_at = state, reason, self._clock()
        if client.info.role == "consumer":
            group = self.jobs[client.info.job_id].groups[client.info.group]
            group.live, group.ended = group.live - 1, client
        self._ended(self.jobs[client.info.job_id], client)

    def silent(self, longer_than_s: float) -> list[Client]:
        """Live clients without a sign of life for `longer_than_s` seconds: those that are worth asking Ray about."""
        now = self._clock()
        return [c for c in self.clients.values() if c.live and now - c.last_beat > longer_than_s]

    def tick(self) -> list[Client]:
        """Count clients as dead whose silence exceeds their own limit; returns them."""
        now = self._clock()
        gone = [c for c in self.clients.values() if c.live and now - c.last_beat > c.dead_after_s]
        for client in gone:
            self.end(client.info.client_id, DEAD, f"no sign of life for {now - client.last_beat:.1f} s")
        return gone

    # ------------------------------------------------------------------ inside

    def _ended(self, job: Job, client: Client) -> None:
        """Called when a client has ended, whatever the way; the ledger gives its leases back."""

    def _job_for_attach(self, job_id: str) -> Job:
        job = self.jobs.get(job_id)
        if job is None or job.complete:  # a complete job holds nothing; its name begins a new one
            if job is not None:
                self._free_all(job)  # but a writer that lives on may have put a value since
            job = self.jobs[job_id] = Job(job_id)
        return job

    def _free_all(self, job: Job) -> None:
        """Called when a job is replaced; the ledger drops what it holds."""

    def _agree(self, job: Job, stated: dict[str, int], leaving: Client | None) -> None:
        others = [c for c in self.clients.values() if c.live and c.info.job_id == job.job_id and c is not leaving]
        for name, value in stated.items():
            for other in others:
                if other.stated.get(name, value) != value:
                    flag = "--cross-job-" + name.replace("_", "-")
                    raise Refused(
                        f"{flag} is {value} here and {other.stated[name]} at the {who(other)}: "
                        "give both jobs the same value"
                    )

    def _replaced_by(self, job: Job, info: ClientInfo) -> Client | None:
        """The live producer that `info` takes over from, if any. Raises JobIdTaken."""
        old = job.producer
        if info.role != "producer" or old is None or not old.live:
            return None
        if info.ray_job_id and old.info.ray_job_id == info.ray_job_id:
            return old
        silent = self._clock() - old.last_beat
        raise JobIdTaken(
            f"job id {job.job_id} is taken: the {who(old)} is alive (last sign of life {silent:.1f} s ago). "
            "Stop that job, or choose another --job-id"
        )

    def _live(self, client_id: str, role: str | None = None) -> Client:
        client = self.clients.get(client_id)
        if client is None:
            raise BrokerLost("the broker does not know this client: it was restarted since; start this job again")
        if not client.live:
            raise Fenced(
                f"this {who(client)} was ended ({client.state}: {client.reason or 'closed'}): it can do nothing more"
            )
        if role is not None and client.info.role != role:
            raise BadInput(f"only a {role} can do this, not a {client.info.role}")
        return client

    def _raise_if_producer_over(self, job: Job, grace_s: float) -> None:
        producer = job.producer
        if producer is None or producer.live:
            return
        if producer.state == FINISHED:
            raise EndOfStream(f"the {who(producer)} finished: job {job.job_id} has nothing more to claim")
        self._raise_peer(producer, grace_s)

    def _raise_peer(self, peer: Client, grace_s: float) -> None:
        if self._clock() - peer.ended_at >= grace_s:
            found = verdict(peer, peer.info.role, peer.info.job_id, self._clock(), self._wall())
            raise PeerFailed(found["message"], found)
