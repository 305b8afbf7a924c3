"""A job's figures for people, tools and audits, as JSON-able dicts. Pure functions over the ledger's records."""

import logging
from dataclasses import asdict
from itertools import islice, takewhile
from typing import Any

from ..redaction import without_password
from ..settings import OF_JOB
from ..types import Located, shortened
from .history import WAITS
from .state import ACKED, CLAIMED, FREED, Client, Job, Progress
from .verdicts import ERROR, FEWEST, presumed_dead, standing, state_of, who

logger = logging.getLogger(__name__)

_COUNTERS = ("requeued", "covered", "rewound", "dropped", "regenerated", "delayed", "losses")
_WINDOW = 32  # rollouts over which rates are taken
_LATE_S = 60.0  # after which what is written behind should lie in the durable store


def job_status(job: Job, now: float, wall: float) -> dict[str, Any]:
    """The figures of a job, see `_figures`. Where they cannot be taken, because a record is damaged, the figures of a
    job without rollouts; `standing` says so. Nothing is raised: who looks at all jobs sees the others."""
    try:
        return _figures(job, now, wall)
    except Exception as error:  # whatever a record of another version does to arithmetic
        logger.exception("job %s: its figures cannot be taken", job.job_id)
        bare = Job(job.job_id, control=job.control, complete=job.complete, began=job.began)
        text = f"The figures of this job cannot be taken, because a record is damaged: {shortened(repr(error), 300)}."
        found = _figures(bare, now, wall)
        damaged = sorted(r for r, versions in job.rollouts.items() if not all(v.payload.sound for v in versions))
        return {**found, "damaged": damaged, "standing": [{"level": ERROR, "text": text}]}


def _figures(job: Job, now: float, wall: float) -> dict[str, Any]:
    """Counts, queue, staleness, waits, bytes and clients of `job`; `now` and `wall` are the ledger's clocks.

    `queue_depth` counts published rollouts that some open group has not acked; `staleness` is the distance between the
    newest weight version and that of the oldest rollout in the queue (None while either is unknown); `lost` names the
    rollouts that went with their vault and were not generated again; `damaged` those whose record has fields of a
    wrong type, as an older version may have left it; `unstored` counts what is published, but not in the durable store
    yet (write-behind); `dead_letters` are the rollouts that are or were set aside, see state.Job.

    `oldest_queued_s` is the age of the oldest rollout in the queue, `idle_s` the time since anything happened to a
    rollout, `waited` the seconds by who waited for what (history.WAITS), `bottleneck` whom the other side waits for,
    see `bottleneck`; `recent` says what held over the last rollouts that were claimed; `standing` says how the job
    stands, in sentences, what matters most first: [{"level": "error" | "warning" | "ok", "text"}], `state` in a word,
    see verdicts.state_of.
    """
    queue = [r for r in job.rollouts if r not in job.done]
    newest_weights = job.weights_now
    oldest = job.rollouts[min(queue)][-1] if queue else None
    made_by = oldest.payload.made_by if oldest else None
    damaged = sorted(r for r, versions in job.rollouts.items() if not all(v.payload.sound for v in versions))
    values = sum(value.payload.nbytes for value in job.values.values())
    recent = _recent(job)
    newest = next(reversed(job.progress.data.values()), None)
    idle_s = round(max(0.0, wall - _last_change(newest)), 3) if newest else None
    return {
        "job_id": job.job_id,
        "complete": job.complete,
        "control": job.control,
        "state": state_of(job, now),
        **{name: getattr(job, name) for name in OF_JOB if name != "store"},
        "store": None if job.store is None else without_password(job.store),
        "unstored": sum(not v[-1].payload.stored for v in job.rollouts.values()) if job.store else 0,
        "began": job.began,
        "published": job.published,
        "republished": job.republished,
        "claimed": job.claimed,
        "acked": job.acked,
        **{name: getattr(job, name) for name in _COUNTERS},
        "lost": sorted(job.lost),
        "damaged": damaged,
        "dead_letters": {str(rollout_id): letter for rollout_id, letter in job.dead_letters.items()},
        "freed": len(job.freed),
        "retained": len(job.rollouts),
        "queue_depth": len(queue),
        "leased": sum(len(g.leases) for g in job.groups.values()),
        "demanded": len(job.demands),
        "last_demanded": job.last_demanded,
        "last_published": job.ever.last(),
        "weight_version": newest_weights,
        "staleness": newest_weights - made_by if newest_weights is not None and made_by is not None else None,
        "held_bytes": job.held_bytes + values,
        "bytes": {what: job.nbytes.get(what, 0) for what in ("published", "claimed", "acked", "dropped")},
        "oldest_queued_s": round(max(0.0, wall - oldest.published_at), 3) if oldest else 0.0,
        "idle_s": idle_s,
        "waited": {what: round(job.waited.get(what, 0.0), 3) for what in WAITS},
        "recent": recent,
        "bottleneck": recent["bottleneck"],
        "verdicts": dict(job.verdicts),
        "standing": standing(job, recent, now, idle_s, damaged, _late(job, wall)),
        "events": dict(job.counts),
        "restarts": {
            "producer": max(0, job.producer_epoch - 1 - job.producer_woken),
            **{f"consumer {g.name}": max(0, g.epoch - 1 - g.woken) for g in job.groups.values()},
        },
        "producer": _client(job.producer, now),
        "consumers": {name: _client(g.last, now) for name, g in sorted(job.groups.items())},
        "groups": {
            name: {"leased": sorted(g.leases), "live": g.live, "closed": g.closed, "start": g.start}
            for name, g in sorted(job.groups.items())
        },
    }


def bottleneck(consumer_waited_s: float, producer_waited_s: float, elapsed_s: float) -> float | None:
    """Whom the other side waits for, from -1 to 1: the share of the time that training waited for rollouts, less the
    share that generation waited for training. 1: generation is the bottleneck, -1: training is, 0: neither is, or both
    are in turn; None: nobody knows yet."""
    if elapsed_s <= 0:
        return None
    return round(max(-1.0, min(1.0, (consumer_waited_s - producer_waited_s) / elapsed_s)), 3)


def looked(job: Job, now: float, wall: float, since: int, limit: int, events_since: int) -> dict[str, Any]:
    """{"status", "seq", "progress", "events", "wall"}.

    `progress` are [rollout id, Progress], the newest `limit` of those to whom something happened after `since`, oldest
    change first; whoever asks next says `since` this `seq`. `events` are [number, Event] after `events_since`. A `seq`
    that is less than before says that the job began anew: ask again, for all.
    """
    newest = takewhile(lambda item: item[1].seq > since, reversed(job.progress.data.items()))
    fresh = [[r, known] for r, known in islice(newest, limit)]
    events = [[number, event] for number, event in job.events.data.items() if number > events_since]
    return {
        "status": job_status(job, now, wall),
        "seq": job.seq,
        "progress": fresh[::-1],
        "events": events,
        "wall": wall,
    }


def rollout_detail(job: Job, rollout_id: int, clients: dict[str, Client]) -> dict[str, Any]:
    """A rollout's progress, versions, and how each group stands to it; `events` that name it."""
    known = job.progress.get(rollout_id)
    groups = {}
    for name, group in sorted(job.groups.items()):
        owner, version = group.leases.get(rollout_id, ("", None))
        holder = clients.get(owner)
        state = "leased" if owner else "acked" if rollout_id in group.acked or rollout_id in job.freed else "open"
        groups[name] = {"state": state, "version": version, "held_by": who(holder) if holder else ""}
    return {
        "job_id": job.job_id,
        "rollout_id": rollout_id,
        "progress": None if known is None else asdict(known),
        "versions": [located_dict(version) for version in job.rollouts.get(rollout_id, [])],
        "groups": groups,
        "demanded": rollout_id in job.demands,
        "events": [asdict(event) for event in job.events.data.values() if event.rollout_id == rollout_id],
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
        "columns": [*payload.columns],
        "weight_version": payload.weight_version,
        "published_at": located.published_at,
        "epoch": located.epoch,
        "vault": payload.vault,
        "stored": payload.stored,
        "meta": payload.meta,
    }


def _recent(job: Job) -> dict[str, Any]:
    """What held over the last rollouts that were claimed. Rates and waits are those from the first of these claims to
    the last, hence without what the first one waited for: None with one claim, and waits with few (FEWEST)."""
    newest = reversed(job.progress.data.values())
    claimed = [*islice((p for p in newest if p.state in (CLAIMED, ACKED, FREED) and p.claimed), _WINDOW)]
    claimed.sort(key=lambda p: p.claimed)
    others = claimed[1:]
    elapsed_s = claimed[-1].claimed - claimed[0].claimed if claimed else 0.0
    per = len(others) / elapsed_s if elapsed_s > 0 else None
    rewards = [p.reward for p in claimed if p.reward is not None]
    consumer_s = min(elapsed_s, sum(p.consumer_waited_s for p in others))
    producer_s = min(elapsed_s, sum(p.producer_waited_s for p in others))
    told = per is not None and len(claimed) >= FEWEST
    return {
        "rollouts": len(claimed),
        "per_minute": None if per is None else round(60 * per, 3),
        "samples_per_s": None if per is None else round(per * _mean([max(0, p.num_samples) for p in others]), 3),
        "bottleneck": bottleneck(consumer_s, producer_s, elapsed_s) if told else None,
        "producer_waited_share": round(producer_s / elapsed_s, 3) if told else None,
        "consumer_waited_share": round(consumer_s / elapsed_s, 3) if told else None,
        "reward": round(_mean(rewards), 6) if rewards else None,
    }


def _mean(values: list[Any]) -> float:
    return sum(values) / len(values)


def _last_change(known: Progress) -> float:
    return max(known.demanded, known.begun, known.published, known.claimed, known.acked)


def _late(job: Job, wall: float) -> int:
    """How many rollouts should lie in the durable store by now, and do not."""
    newest = [versions[-1] for versions in job.rollouts.values()] if job.store else []
    return sum(not one.payload.stored and wall - one.published_at > _LATE_S for one in newest)


def _client(client: Client | None, now: float) -> dict[str, Any] | None:
    if client is None:
        return None
    info = client.info
    return {
        "state": client.state,
        "reason": client.reason,
        "terms": client.terms,
        "activity": client.activity,
        "activity_s": round(max(0.0, now - client.since), 3),
        "epoch": client.epoch,
        "attached_as": client.attached_as,
        "presumed_dead": presumed_dead(client, now),
        "silent_s": round(now - client.last_beat, 3),
        "dead_after_s": client.dead_after_s,
        "attached_at": client.attached_at,
        "ray_job_id": info.ray_job_id,
        "submission_id": info.submission_id,
        "node_id": info.node_id,
        "host": info.host,
        "pid": info.pid,
    }
