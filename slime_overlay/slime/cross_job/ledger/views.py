"""What is asked of a job for people and for those who wait: verdicts, status, figures. Changes nothing but counts."""

from dataclasses import dataclass
from typing import Any

from ..types import check_rollout_id
from .history import PROGRESS, History
from .operations import reads
from .pacing import Pacing
from .registry import Registry
from .rollouts import Rollouts
from .state import PAUSED, Client, Job, is_full
from .status import job_status, looked, rollout_detail
from .verdicts import presumed_dead, verdict, who

_WAITS_OF = {
    **{"claim": "consumer data", "begin_update": "consumer weights", "loaded": "consumer weights"},
    "facts": "consumer peer",
}


@dataclass(eq=False)
class Views:
    """See the module."""

    registry: Registry
    history: History
    rollouts: Rollouts
    pacing: Pacing

    @reads(of_job=True)
    def living(self) -> dict[str, str]:
        """Clients that are attached, in all jobs: client id -> who it is, in words."""
        return {name: who(client) for name, client in self.registry.clients.items() if client.attached}

    @reads()
    def peer_verdict(self, client_id: str, rollout_id: int | None = None) -> dict[str, Any]:
        """Say how the one stands for whom this client waits: its producer, its consumers, or another lease holder; and
        `stalled_s`, the seconds for which every client of the job has only waited (0: some client is at work)."""
        client = self.registry.live(client_id)
        clients = [c for c in self.registry.living_of(client.info.job_id) if c.info.role != "writer"]
        stalled_s = min((c.waits_s for c in clients), default=0.0)
        found = {**self._peer_of(client, rollout_id), "stalled_s": round(stalled_s, 3)}
        return self.history.count_verdict(client.info.job_id, found)

    @reads(of_job=True)
    def status(self, job_id: str | None = None) -> dict[str, dict[str, Any]]:
        """Figures of one job, or of all, by job id (see status.py). Raises JobNotFound."""
        jobs = self.registry.jobs.values() if job_id is None else [self.registry.known_job(job_id)]
        return {job.job_id: job_status(job, self.registry.clock(), self.registry.wall()) for job in jobs}

    @reads(of_job=True)
    def look(
        self, job_id: str, since: int = -1, limit: int = PROGRESS, events_since: int = 0, spans: bool = False
    ) -> dict[str, Any]:
        """Everything that a view of a job needs, or what is new of it: see status.py. Raises JobNotFound."""
        job = self.registry.known_job(job_id)
        found = looked(job, self.registry.clock(), self.registry.wall(), since, limit, events_since)
        return {**found, "spans": [*self.history.spans.get(job_id, ())]} if spans else found

    @reads(of_job=True)
    def detail(self, job_id: str, rollout_id: int) -> dict[str, Any]:
        """All that is known of one rollout: see status.py. Raises RolloutNotFound."""
        job, rollout_id = self.registry.known_job(job_id), check_rollout_id(rollout_id)
        if rollout_id not in job.progress and rollout_id not in job.rollouts:
            self.rollouts.version(job, rollout_id, None)
        return rollout_detail(job, rollout_id, self.registry.clients)

    def note_wait(self, client_id: str, operation: str, waited_s: float) -> None:
        """A client waited in this operation for so long, and waits still, or just got what it wanted."""
        client = self.registry.clients.get(client_id)
        job = self.registry.jobs.get(client.info.job_id) if client is not None else None
        if client is None or job is None:
            return
        if client.info.role == "producer":
            what = self._producer_waits_for(job) if operation == "next_demand" else ""
        elif client.info.role == "consumer" and self.pacing.drives(job, client.info.group):
            what = _WAITS_OF.get(operation, "")
        else:
            what = ""
        if what:
            job.waited[what] = job.waited.get(what, 0.0) + waited_s
            client.waited_s += waited_s

    def _peer_of(self, client: Client, rollout_id: int | None) -> dict[str, Any]:
        job, info = self.registry.jobs[client.info.job_id], client.info
        if info.role == "producer":
            mine = [
                c for c in self.registry.clients.values() if c.info.job_id == job.job_id and c.info.role == "consumer"
            ]
            candidates = [c for c in mine if c.attached] or [g.last for g in job.groups.values() if g.last is not None]
            now = self.registry.clock()  # the producer waits for whoever is alive, even if others attached later
            peer = max(candidates, key=lambda c: (c.live, not presumed_dead(c, now), c.attached_at), default=None)
            found = verdict(peer, "consumer", job.job_id, now)
            return self.pacing.held_back(job) or _with_words(found, self.pacing.idle(job))
        owner = job.groups[info.group].leases.get(-1 if rollout_id is None else rollout_id)
        if owner is not None and owner[0] != info.client_id:
            found = verdict(self.registry.clients[owner[0]], "consumer", job.job_id, self.registry.clock())
            return {**found, "message": f"it is leased: {found['message']}"}
        found = verdict(job.producer, "producer", job.job_id, self.registry.clock())
        if found["kind"] not in ("alive", "slow", "silent"):
            return found
        held_back = self.pacing.held_back(job)
        return {**found, **held_back} if held_back else _with_words(found, self.pacing.idle(job))

    def _producer_waits_for(self, job: Job) -> str:
        if job.control == PAUSED:
            return "producer pause"
        if is_full(job):
            return "producer space"
        if job.gate.engines and not job.gate.open:
            return "producer weights"
        return "producer demand"


def _with_words(found: dict[str, Any], idle: str) -> dict[str, Any]:
    return {**found, "message": f"{found['message']}; {idle}"} if idle else found
