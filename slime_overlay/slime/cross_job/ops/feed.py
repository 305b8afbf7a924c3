"""What the broker says of its jobs, asked once for everybody who looks.

- One thread asks: one `look` a second for each job that somebody looks at, for what changed only; a list of the jobs
  every ten. Nobody looks: nothing is asked. So the broker does not feel how many look.
- What is handed on has its age. A broker that does not answer makes the figures old, never new: they keep the moment
  at which it said them, and the error is told along.
- A job that began anew (its `seq` went down, or it has another beginning) is asked for anew, and whoever looks is told
  to forget what it knew.
"""

import logging
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

from ..errors import BadInput, CrossJobError, JobNotFound, Unreachable
from ..ledger.history import EVENTS_KEPT, PROGRESS
from ..ledger.state import Progress
from ..types import check_job_id
from .page import to_json

logger = logging.getLogger(__name__)

FIELDS = ("rollout_id", *(f.name for f in fields(Progress)))
"""Of a row: rows travel as lists, in this order."""

IDLE_S = 15.0
"""A job at which nobody looked for so long is not asked for any more."""
MOST_JOBS = 16
"""Jobs that are asked for at once; of more, those at which somebody looked last."""

_JOBS_S = 10.0
_MOST_BODIES = 64
_FAILURES = 3  # in a row, after which the way to the broker is looked for anew
_SEQ = FIELDS.index("seq")


class View(Protocol):
    """What is used of a viewer.Viewer."""

    address: str
    namespace: str

    def jobs(self) -> dict[str, dict[str, Any]]: ...

    def look(self, job_id: str, since: int = -1, limit: int = PROGRESS, events_since: int = 0) -> dict[str, Any]: ...

    def detail(self, job_id: str, rollout_id: int) -> dict[str, Any]: ...

    def samples(
        self, job_id: str, rollout_id: int, version: int | None = None, first: int = 0, count: int = 3
    ) -> dict[str, Any]: ...

    def steer(self, operation: str, job_id: str, *args: Any) -> Any: ...


@dataclass
class Copy:
    """What is known of a job."""

    job_id: str
    status: dict[str, Any] | None = None
    wall: float = 0.0
    seq: int = -1
    events_seen: int = 0
    run: str = field(default_factory=lambda: uuid.uuid4().hex[:12])  # changes when the job began anew
    rows: dict[int, list[Any]] = field(default_factory=dict)  # what changed last comes last
    events: dict[int, dict[str, Any]] = field(default_factory=dict)
    taken_at: float | None = None  # monotonic: when the broker was asked for what it said last
    wanted_at: float = 0.0  # monotonic: when somebody looked last
    error: Exception | None = None  # why it could not be asked since
    bodies: dict[tuple[str, int, int], str] = field(default_factory=dict)  # answers, until something new is known

    def is_anew(self, found: dict[str, Any]) -> bool:
        """Whether this answer is about another job of that name than what is known."""
        return self.status is not None and (
            found["seq"] < self.seq or found["status"].get("began") != self.status.get("began")
        )

    def take(self, found: dict[str, Any], asked_at: float) -> None:
        """Know what a `look` found, since `self.seq` and `self.events_seen`."""
        self.status, self.wall, self.seq = found["status"], found["wall"], found["seq"]
        for known in found["progress"]:
            self.rows.pop(known["rollout_id"], None)
            self.rows[known["rollout_id"]] = [_rounded(known.get(name)) for name in FIELDS]
        for event in found["events"]:
            self.events[event["number"]] = event
        self.events_seen = max(self.events, default=self.events_seen)
        _keep_newest(self.rows, PROGRESS)
        _keep_newest(self.events, EVENTS_KEPT)
        self.taken_at, self.error = asked_at, None
        self.bodies.clear()

    def forget(self) -> None:
        """Know nothing: the job began anew."""
        anew = Copy(self.job_id)
        self.status, self.seq, self.events_seen, self.run = None, anew.seq, anew.events_seen, anew.run
        self.rows, self.events, self.bodies = anew.rows, anew.events, anew.bodies

    def body(self, run: str, since: int, events_since: int) -> str:
        """JSON of what is new to somebody who knows that much; "anew" tells it to forget that first."""
        key = (run, since, events_since)
        if key not in self.bodies:
            if len(self.bodies) >= _MOST_BODIES:
                self.bodies.clear()
            anew = run != self.run or since > self.seq
            rows: list[list[Any]] = []
            for row in reversed(self.rows.values()):
                if not anew and row[_SEQ] <= since:
                    break
                rows.append(row)
            self.bodies[key] = to_json(
                {
                    "job_id": self.job_id,
                    "run": self.run,
                    "anew": anew,
                    "seq": self.seq,
                    "wall": self.wall,
                    "status": self.status,
                    "fields": FIELDS,
                    "rows": rows[::-1],
                    "events": [e for number, e in self.events.items() if anew or number > events_since],
                }
            )
        return self.bodies[key]


class Feed:
    """See the module. `start` and `stop` it; everything else may be called from any thread, and does not block.

    Args:
        viewer_factory: makes a way to the broker; called by the asking thread, again when the way is lost.
        job_id: the job that is shown to who names none (None: the one that is not complete, the newest of several).
    """

    def __init__(self, viewer_factory: Callable[[], View], job_id: str | None = None, poll_s: float = 1.0):
        self._factory, self._job_id, self._poll_s = viewer_factory, job_id, poll_s
        self._lock = threading.Lock()
        self._wake, self._ended = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="cross-job-feed", daemon=True)
        self._viewer: View | None = None
        self._copies: dict[str, Copy] = {}
        self._jobs: dict[str, dict[str, Any]] = {}
        self._jobs_at: float | None = None
        self._trouble: Exception | None = None  # why the jobs could not be asked for
        self._failures = 0
        self._someone_at = -IDLE_S

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float = 5.0) -> None:
        """Ask no more; a question that is under way ends by its own deadline."""
        self._ended.set()
        self._wake.set()
        self._thread.join(timeout_s)

    def viewer(self) -> View:
        """The way to the broker. Raises Unreachable: there is none, for now."""
        if self._viewer is None:
            raise self._trouble or Unreachable("the broker has not been reached yet: try again in a few seconds")
        return self._viewer

    def want(self, job_id: str | None) -> str | None:
        """Somebody looks at this job; returns its name. None: at which, is not known yet."""
        now = time.monotonic()
        with self._lock:
            idle, self._someone_at = now - self._someone_at > IDLE_S, now
            name = self._job_id if job_id is None else check_job_id(job_id)
            if name is None and self._jobs_at is not None and not idle:
                name = _shown_first(self._jobs)
            if name is not None:
                copy = self._copies.setdefault(name, Copy(name))
                idle |= now - copy.wanted_at > IDLE_S
                copy.wanted_at = now
        if idle:
            self._wake.set()
        return name

    def answer(self, name: str | None, run: str, since: int, events_since: int) -> str | None:
        """JSON for somebody who looks and knows that much; None: nothing is known yet.

        Raises:
            CrossJobError: nothing is known, and why. JobNotFound: there is no such job.
        """
        with self._lock:
            copy = self._copies.get(name) if name is not None else None
            error = (copy.error if copy is not None else None) or self._trouble
            if copy is None or copy.status is None or isinstance(error, JobNotFound):
                if error is not None:
                    raise error
                if name is None and self._jobs_at is not None:
                    raise JobNotFound("this namespace has no jobs yet: they appear here when they attach")
                return None
            assert copy.taken_at is not None
            head = {
                "age_s": round(time.monotonic() - copy.taken_at, 3),
                "poll_s": self._poll_s,
                "cluster": self._viewer.address if self._viewer is not None else "",
                "namespace": self._viewer.namespace if self._viewer is not None else "",
                "error": str(error) if error is not None else None,
                "kind": type(error).__name__ if error is not None else None,
                "jobs": {job: status.get("complete", False) for job, status in self._jobs.items()},
            }
            return f"{to_json(head)[:-1]},{copy.body(run, since, events_since)[1:]}"

    def is_cold(self, name: str | None) -> bool:
        """Whether nobody asked for this job lately: something newer comes soon."""
        with self._lock:
            copy = self._copies.get(name) if name is not None else None
            if self._trouble is not None or (copy is not None and copy.error is not None):
                return False
            return copy is None or copy.taken_at is None or time.monotonic() - copy.taken_at > IDLE_S / 2

    # ------------------------------------------------------------------ the asking thread

    def _run(self) -> None:
        while not self._ended.is_set():
            began = time.monotonic()
            if began - self._someone_at < IDLE_S:
                self._round(began)
            left_s = self._poll_s - (time.monotonic() - began)
            self._wake.wait(max(0.0, left_s) if self._trouble is None else self._poll_s)
            self._wake.clear()
            self._ended.wait(max(0.0, self._poll_s / 4 - (time.monotonic() - began)))  # however often it is woken

    def _round(self, now: float) -> None:
        try:
            if self._viewer is None:
                self._viewer = self._factory()
            if self._jobs_at is None or now - self._jobs_at > _JOBS_S:
                jobs = self._viewer.jobs()
                with self._lock:
                    self._jobs, self._jobs_at = jobs, now
            with self._lock:
                name = self._job_id or _shown_first(self._jobs)
                if name is not None:
                    self._copies.setdefault(name, Copy(name, wanted_at=now))
        except Exception as error:  # whatever Ray raises: it is shown, and tried again
            self._set_trouble(error)
            return
        for copy in self._wanted(now):
            try:
                self._ask(self._viewer, copy)
            except Exception as error:
                with self._lock:
                    copy.error = error
                if not isinstance(error, (JobNotFound, BadInput)):
                    self._set_trouble(error)
                    return
            if self._ended.is_set():
                return
        self._failures = 0
        self._set_trouble(None)

    def _ask(self, viewer: View, copy: Copy) -> None:
        asked_at = time.monotonic()
        found = viewer.look(copy.job_id, since=copy.seq, events_since=copy.events_seen)
        if copy.is_anew(found):
            logger.info("job %s began anew, or its broker knows less of it: it is asked for anew", copy.job_id)
            asked_at = time.monotonic()
            found = viewer.look(copy.job_id, since=-1, events_since=0)
            with self._lock:
                copy.forget()
        with self._lock:
            copy.take(found, asked_at)

    def _wanted(self, now: float) -> list[Copy]:
        """Jobs at which somebody looked lately; what is known of others is forgotten after a while."""
        with self._lock:
            newest = sorted(self._copies.values(), key=lambda copy: copy.wanted_at, reverse=True)
            wanted = [copy for copy in newest if now - copy.wanted_at < IDLE_S][:MOST_JOBS]
            self._copies = {copy.job_id: copy for copy in newest[:MOST_JOBS]}
        return wanted

    def _set_trouble(self, error: Exception | None) -> None:
        with self._lock:
            was, self._trouble = self._trouble, error
            if error is None:
                return
            self._failures += 1
            if self._failures % _FAILURES == 0:
                self._viewer = None
        if type(was) is not type(error):
            kind = type(error).__name__
            logger.warning("the broker cannot be asked: %s: %s", kind, error, exc_info=_unknown(error))


def _shown_first(jobs: dict[str, dict[str, Any]]) -> str | None:
    """The newest job that is not complete, else the newest."""
    key = {name: (not status.get("complete"), status.get("began") or 0.0) for name, status in jobs.items()}
    return max(key, key=lambda name: key[name], default=None)


def _rounded(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value


def _keep_newest(entries: dict[int, Any], most: int) -> None:
    while len(entries) > most:
        del entries[next(iter(entries))]


def _unknown(error: Exception) -> bool:
    return not isinstance(error, CrossJobError)
