"""A report of a run: one self-contained page with what the broker remembers of it, and the figures that a paper or a
post-mortem needs. The figures are recomputable: what they were computed of lies in the page, and can be saved from it.

They are taken over the rollouts that the broker remembers (the newest progress.PROGRESS); counts, bytes, waits and
events by kind are of the whole run.
"""

import os
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from ..errors import BadInput
from ..ledger.history import WAITS
from ..settings import OF_JOB
from .page import report_page

_SPANS = {  # what -> (its begin, its end)
    "generate": ("begun", "made"),
    "publish": ("made", "published"),
    "queue wait": ("published", "claimed"),
    "train to ack": ("claimed", "acked"),
    "demand to ack": ("demanded", "acked"),
}


class Looks(Protocol):
    """What is used of a viewer.Viewer."""

    address: str
    namespace: str

    def look(self, job_id: str) -> dict[str, Any]: ...


def write_report(viewer: Looks, job_id: str, out: Path) -> dict[str, Any]:
    """Write the report of a job to the file `out`; returns its figures, see `report_data`.

    Raises:
        BadInput: the file cannot be written. JobNotFound, Unreachable: what the viewer raises.
    """
    look = viewer.look(job_id)
    figures = report_data(look)
    whose = {"cluster": viewer.address, "namespace": viewer.namespace}
    page = report_page({"look": look, "figures": figures, **whose, "written_at": time.time()})
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        part.write_text(page, encoding="utf-8")
        part.replace(out)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise BadInput(f"cannot write the report to {out} ({error.strerror}): choose another file (--out)") from None
    return figures


def report_data(look: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of a run, of what Viewer.look said of all of it; JSON-able. Times in seconds; None: not known.

    Shares of waits are of the time since the job began; rates are of the time in which the remembered rollouts were
    made and acked.

    "spans" are {"count", "p50", "p95", "max", "mean"}; "made" is by the clock of the vault, the rest by the broker's,
    so that the first two may be off by what these differ.
    """
    status, rows = look["status"], look["progress"]
    acked = [row for row in rows if row["acked"]]
    began = min((t for row in rows for t in (row["demanded"], row["begun"], row["published"]) if t), default=None)
    ended = max((row["acked"] for row in acked), default=None)
    wall_s = ended - began if began is not None and ended is not None and ended > began else None
    samples = sum(max(0, row["num_samples"]) for row in acked)
    staleness = Counter(row["staleness"] for row in rows if row["staleness"] is not None)
    waited = status["waited"]
    run_s = max(
        0.0, (max(map(changed_at, rows), default=0.0) if status["complete"] else look["wall"]) - status["began"]
    )
    return {
        "job_id": status["job_id"],
        "complete": status["complete"],
        "rollouts": {
            "known": len(rows),
            **{name: status[name] for name in ("published", "republished", "claimed", "acked", "freed")},
        },
        "samples": samples,
        "wall_s": _rounded(wall_s),
        "rollouts_per_minute": _rounded(60 * len(acked) / wall_s) if wall_s else None,
        "samples_per_s": _rounded(samples / wall_s) if wall_s else None,
        "spans": {
            what: spread(row[end] - row[begin] for row in rows if row[begin] and row[end])
            for what, (begin, end) in _SPANS.items()
        },
        "staleness": {str(behind): staleness[behind] for behind in sorted(staleness)},
        "waited_s": {what: waited.get(what, 0.0) for what in WAITS},
        "waited_share": {what: _rounded(min(1.0, waited.get(what, 0.0) / run_s)) if run_s else None for what in WAITS},
        "reward": _reward(rows),
        "bytes": status["bytes"],
        "bytes_per_rollout": spread(row["nbytes"] for row in rows if row["nbytes"]),
        "events": status["events"],
        "losses": {
            **{name: status[name] for name in ("losses", "dropped", "regenerated", "delayed", "requeued", "rewound")},
            "lost now": len(status["lost"]),
        },
        "restarts": status["restarts"],
        "settings": {name: status[name] for name in OF_JOB},
    }


def changed_at(row: Mapping[str, Any]) -> float:
    """When this rollout changed last, in seconds of the broker's clock."""
    return max(row[name] for name in ("demanded", "begun", "published", "claimed", "acked"))


def spread(values: Iterable[float]) -> dict[str, Any]:
    """{"count", "p50", "p95", "max", "mean"}; percentiles are interpolated linearly, as numpy's."""
    found = sorted(value for value in values if value == value)
    if not found:
        return {"count": 0, "p50": None, "p95": None, "max": None, "mean": None}
    return {
        "count": len(found),
        "p50": _rounded(_percentile(found, 0.5)),
        "p95": _rounded(_percentile(found, 0.95)),
        "max": _rounded(found[-1]),
        "mean": _rounded(sum(found) / len(found)),
    }


def _percentile(found: list[float], share: float) -> float:
    at = share * (len(found) - 1)
    low = int(at)
    high = min(low + 1, len(found) - 1)
    return found[low] + (at - low) * (found[high] - found[low])


def _reward(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Of the rollouts in their order: the first, the last, and the best."""
    rewards = {row["rollout_id"]: row["reward"] for row in rows if isinstance(row["reward"], (int, float))}
    rewards = {rollout_id: reward for rollout_id, reward in rewards.items() if reward == reward}
    if not rewards:
        return {"count": 0, "first": None, "last": None, "max": None, "max_at": None}
    best = max(rewards, key=lambda rollout_id: rewards[rollout_id])
    return {
        "count": len(rewards),
        "first": rewards[min(rewards)],
        "last": rewards[max(rewards)],
        "max": rewards[best],
        "max_at": best,
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)
