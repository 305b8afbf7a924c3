"""What `doctor` sees of a durable store, from this machine: whether it answers, takes and gives back, and how quickly.

It writes one key of its own, twice, and deletes it; nothing else is touched. No text names a password.
"""

import contextlib
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote

from ..archive import Archive
from ..errors import BadInput, CrossJobError, StoreFull, StoreRefused
from ..stores import Store, open_store
from ..stores.base import parts_of, without_password, without_secrets
from .doctor_checks import Finding
from .text import bytes_text

SLOW_S, BAD_S = 0.5, 2.0
"""Seconds that a few bytes may take: the broker writes its journal before it answers a change, so that every publish,
claim and ack waits for it; and it writes a sign of life every 2 s, which must not be late."""
SLOW_MB_S = 2.0
"""Seconds that a megabyte may take: less than 0.5 MB/s would hold up any rollout."""
_MB = 1 << 20
_CHECK = "durable store"


def look_at_store(uri: str, timeout_s: float, open_: Callable[[str, float], Store] = open_store) -> list[Finding]:
    """Try a store. Ends within a few times `timeout_s`, as far as the store keeps its deadline."""
    shown = without_password(uri)
    try:
        parts = parts_of(uri)
    except BadInput as error:
        return [_failed(error, str(error), shown)]
    if parts.scheme == "memory":
        return [Finding(_CHECK, "note", "it lives and ends with one process", "nothing else reads it", where=shown)]
    if parts.scheme == "file":
        folder = Path(unquote(parts.path))
        if folder.parent.is_dir() and not folder.exists():
            what = "not looked at: the folder is not there yet; the first job that uses it makes it"
            return [Finding(_CHECK, "note", what, where=shown)]
    key = f"slime-cross-job-doctor-{uuid.uuid4().hex}"
    try:
        began = time.monotonic()
        store = open_(uri, timeout_s)
        opened_s = time.monotonic() - began
        try:
            return _timed(store, key, opened_s)
        finally:
            store.close()
    except CrossJobError as error:
        return [_failed(error, without_secrets(str(error), uri), shown)]


def _timed(store: Store, key: str, opened_s: float) -> list[Finding]:
    took: dict[int, tuple[float, float]] = {}
    try:
        store.check_room(_MB)
        for nbytes in (64, _MB):
            data = b"\x5a" * nbytes
            began = time.monotonic()
            store.put(key, data)
            put_s = time.monotonic() - began
            same = bytes(memoryview(store.get(key))) == data
            took[nbytes] = (put_s, time.monotonic() - began - put_s)
            if not same:
                store.delete([key])
                what = f"{bytes_text(nbytes)} came back as something else than was written"
                why = "a store that changes what it keeps loses rollouts: they end in quarantine"
                do = "use another store; look for what stands between"
                return [Finding(_CHECK, "error", what, why, do, store.shown)]
    except CrossJobError:
        with contextlib.suppress(CrossJobError):  # the first error says more
            store.delete([key])
        raise
    began = time.monotonic()
    store.delete([key])
    deleted_s = time.monotonic() - began
    return judge(took[64], took[_MB], deleted_s, opened_s, store.shown)


def judge(
    small_s: tuple[float, float], large_s: tuple[float, float], deleted_s: float, opened_s: float, shown: str
) -> list[Finding]:
    """Args:
    small_s, large_s: seconds to (put, get) a few bytes, and a megabyte.
    """
    what = (
        f"open {opened_s:.3f} s; a few bytes: put {small_s[0]:.3f} s, get {small_s[1]:.3f} s; 1 MB: put "
        f"{large_s[0]:.3f} s, get {large_s[1]:.3f} s; delete {deleted_s:.3f} s"
    )
    slowest = max(*small_s, deleted_s)
    if slowest <= SLOW_S and max(large_s) <= SLOW_MB_S:
        return [Finding(_CHECK, "ok", what, where=shown)]
    return [
        Finding(
            _CHECK,
            "error" if slowest > BAD_S else "warning",
            f"it is slow: {what}",
            "the broker writes each change there before it answers: every publish, claim and ack waits for it"
            + ("; its signs of life come late, and another broker may take its jobs" if slowest > BAD_S else ""),
            "put it nearer (same site, faster disk), or write behind (--cross-job-store-mode write-behind)",
            shown,
        )
    ]


def _failed(error: CrossJobError, words: str, shown: str) -> Finding:
    why = "jobs with this store cannot publish, and their broker cannot keep what it is told"
    if isinstance(error, StoreFull):
        what, do = f"it is full: {words}", "free some, make it larger, or keep less (--cross-job-retain)"
    elif isinstance(error, StoreRefused):
        what, do = f"it refuses: {words}", "do what it says; see user, password and access rights"
    elif isinstance(error, BadInput):
        what, do = f"it cannot be opened: {words}", "correct the URI (--cross-job-store), or install what is named"
    else:
        what, do = f"it does not answer: {words}", "see whether it runs, and whether this machine reaches its address"
    return Finding(_CHECK, "error", what, why, do, shown)


def quarantine(uri: str, job_id: str, timeout_s: float) -> Finding:
    """Payloads of the job that were found damaged."""
    shown = without_password(uri)
    if uri.startswith("memory:"):
        return Finding("quarantine", "note", "not looked at: only its own process reads such a store", where=shown)
    try:
        store = open_store(uri, timeout_s)
        try:
            found = Archive(store, job_id).quarantined()
        finally:
            store.close()
    except CrossJobError as error:
        words = without_secrets(str(error), uri)
        return Finding("quarantine", "note", f"not looked at: {words}", where=job_id)
    if not found:
        return Finding("quarantine", "ok", "no payload was found damaged", where=job_id)
    first = "; ".join(f"{name}: {why}" for name, why in sorted(found.items())[:3])
    return Finding(
        "quarantine",
        "warning",
        f"{len(found)} payloads in {shown} are damaged and not read any more: {first}",
        "something changed what was written; the rollouts are generated again, if they are still needed",
        "look for the cause (disk, network file system, somebody's clean-up) before more of it is damaged",
        job_id,
    )
