"""A job's figures for people and audits, as one JSON-able dict. Pure functions over the ledger's records."""

from typing import Any

from .records import SETTINGS, Client, Job
from .stores.base import without_password
from .types import Located

_COUNTERS = ("requeued", "covered", "rewound", "dropped", "regenerated", "delayed", "losses")


def job_status(job: Job, now: float) -> dict[str, Any]:
    """Counts, queue, staleness, bytes and clients of `job`; `now` is the ledger's monotonic clock.

    `queue_depth` counts published rollouts that some open group has not acked; `staleness` is the distance between the
    newest weight version and that of the oldest rollout in the queue (None while either is unknown); `lost` names the
    rollouts that went with their vault and were not generated again; `unstored` counts what is published, but not in
    the durable store yet (write-behind).
    """
    queue = [r for r in job.rollouts if r not in job.done]
    newest_weights = job.weights_now
    oldest = job.rollouts[min(queue)][-1].payload.weight_version if queue else None
    values = sum(value.payload.nbytes for value in job.values.values())
    return {
        "job_id": job.job_id,
        "complete": job.complete,
        "control": job.control,
        **{name: getattr(job, name) for name in SETTINGS if name != "store"},
        "store": None if job.store is None else without_password(job.store),
        "unstored": sum(not v[-1].payload.stored for v in job.rollouts.values()) if job.store else 0,
        "published": job.published,
        "republished": job.republished,
        "claimed": job.claimed,
        "acked": job.acked,
        **{name: getattr(job, name) for name in _COUNTERS},
        "lost": sorted(job.lost),
        "freed": len(job.freed),
        "retained": len(job.rollouts),
        "queue_depth": len(queue),
        "leased": sum(len(g.leases) for g in job.groups.values()),
        "last_demanded": job.last_demanded,
        "last_published": job.ever.last(),
        "weight_version": newest_weights,
        "staleness": newest_weights - oldest if newest_weights is not None and oldest is not None else None,
        "held_bytes": job.held_bytes + values,
        "producer": _client(job.producer, now),
        "consumers": {name: _client(g.last, now) for name, g in sorted(job.groups.items())},
    }


def located_dict(located: Located) -> dict[str, Any]:
    """A version as a JSON-able dict."""
    payload = located.payload
    return {
        "job_id": located.job_id,
        "rollout_id": located.rollout_id,
        "version": located.version,
        "num_samples": payload.num_samples,
        "nbytes": payload.nbytes,
        "parts": payload.parts,
        "weight_version": payload.weight_version,
        "published_at": located.published_at,
        "vault": payload.vault,
        "meta": payload.meta,
    }


def _client(client: Client | None, now: float) -> dict[str, Any] | None:
    if client is None:
        return None
    info = client.info
    return {
        "state": client.state,
        "reason": client.reason,
        "terms": client.terms,
        "activity": client.activity,
        "epoch": client.epoch,
        "silent_s": round(now - client.last_beat, 3),
        "ray_job_id": info.ray_job_id,
        "submission_id": info.submission_id,
        "node_id": info.node_id,
        "host": info.host,
        "pid": info.pid,
    }
