"""What `doctor` sees of a durable store, from this machine: whether it answers, takes and gives back, and how quickly.

It writes one key of its own, twice, and deletes it; nothing else is touched. No text names a password.
"""

import contextlib
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote

from ...errors import CrossJobError
from ...redaction import without_password, without_secrets
from ...storage import Store, open_store
from ...storage.base import parts_of
from ...storage.payloads import Archive
from . import Finding

SLOW_S, BAD_S = 0.5, 2.0  # for a few bytes; the broker writes a sign of life every 2 s
SLOW_MB_S = 2.0  # for a megabyte: less than 0.5 MB/s would hold up any rollout
_CHECK, _MB = "durable store", 1 << 20


def look_at_store(uri: str, timeout_s: float, open_: Callable[[str, float], Store] = open_store) -> Finding:
    """Try a store. Ends within a few times `timeout_s`, as far as the store keeps its deadline."""
    shown = without_password(uri)
    took: dict[str, float] = {}

    def timed(step: str, act: Callable[..., object], *args: object) -> object:
        began = time.monotonic()
        found = act(*args)
        took[step] = time.monotonic() - began
        return found

    try:
        parts = parts_of(uri)
        folder = Path(unquote(parts.path))
        if parts.scheme == "memory":
            return Finding(_CHECK, "note", "not looked at: it lives and ends with one process", where=shown)
        if parts.scheme == "file" and folder.parent.is_dir() and not folder.exists():
            what = "not looked at: the folder is not there yet; the first job that uses it makes it"
            return Finding(_CHECK, "note", what, where=shown)
        key = f"slime-cross-job-doctor-{uuid.uuid4().hex}"
        store = open_(uri, timeout_s)
        try:
            store.check_room(_MB)
            store.create(key, b"")  # is refused where that does not hold against others
            for size, data in (("bytes", b"\x5a" * 64), ("MB", b"\x5a" * _MB)):
                timed(f"put {size}", store.put, key, data)
                if bytes(memoryview(timed(f"get {size}", store.get, key))) != data:  # type: ignore[arg-type]
                    why = "a store that changes what it keeps loses rollouts: they end in quarantine"
                    what, do = "it gives back something else than was written", "use another; see what stands between"
                    return Finding(_CHECK, "error", what, why, do, shown)
        finally:
            timed("delete", store.delete, [key])
            store.close()
    except CrossJobError as error:
        why = "jobs with this store cannot publish, and their broker cannot keep what it is told"
        do = "see whether it runs, has room, and is reached from this machine; its address, user and rights"
        return Finding(_CHECK, "error", without_secrets(str(error), uri), why, do, shown)
    return judge(took, shown)


def judge(took: dict[str, float], shown: str) -> Finding:
    """By the seconds that each step took: "put bytes", "get bytes", "put MB", "get MB", "delete"."""
    what = ", ".join(f"{step} {seconds:.3f} s" for step, seconds in took.items())
    slowest = max(seconds for step, seconds in took.items() if not step.endswith("MB"))
    if slowest <= SLOW_S and max(took.values()) <= SLOW_MB_S:
        return Finding(_CHECK, "ok", what, where=shown)
    why = "the broker writes each change there before it answers: every publish, claim and ack waits for it"
    if slowest > BAD_S:
        why += "; its signs of life come late, and another broker may take its jobs"
    do = "put it nearer (same site, faster disk), or write behind (--cross-job-store-mode write-behind)"
    return Finding(_CHECK, "error" if slowest > BAD_S else "warning", f"it is slow: {what}", why, do, shown)


def quarantine(uri: str, job_id: str, timeout_s: float) -> Finding:
    """Payloads of the job that were found damaged."""
    try:
        with contextlib.closing(open_store(uri, timeout_s)) as store:
            found = Archive(store, job_id).quarantined()
    except CrossJobError as error:
        return Finding("quarantine", "note", f"not looked at: {without_secrets(str(error), uri)}", where=job_id)
    if not found:
        return Finding("quarantine", "ok", "no payload was found damaged", where=job_id)
    first = "; ".join(f"{name}: {why}" for name, why in sorted(found.items())[:3])
    what = f"{len(found)} payloads in {without_password(uri)} are damaged and not read any more: {first}"
    why = "something changed what was written; the rollouts are generated again, if they are still needed"
    do = "look for the cause (disk, network file system, somebody's clean-up)"
    return Finding("quarantine", "warning", what, why, do, job_id)
