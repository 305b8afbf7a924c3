"""`doctor`: what is wrong with a cluster, its broker and its jobs, as seen from this machine; a finding for each.

Looking disturbs no run: no broker, vault or client is made, no lease is taken. A task without CPUs runs on each node
for a moment, and a durable store gets one small key, which is deleted.

All of it happens in a child process that tells its findings one by one. So it ends within its time whatever hangs
(Ray, a network file system), what it found until then is told, and this process is connected to no cluster by it. What
was not looked at is said, with the reason.
"""

import contextlib
import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from .doctor_checks import Finding

CHECKS = (
    ("versions", "Python, Ray, pyarrow and numpy of this process are among those that were tested"),
    ("slime", "the checkout of slime is patched, as it was applied, and at a tested commit"),
    ("cluster", "a Ray cluster answers at the address"),
    ("token", "it lets this process in: Ray's token"),
    ("same versions", "it has the Ray and Python versions of this process"),
    ("broker", "the namespace has a broker that answers; when it was restarted"),
    ("protocol", "broker and vaults speak the protocol of this package"),
    ("vaults", "every vault answers, and two of them keep the broker's memory"),
    ("nodes", "every node that Ray counts as alive runs a task"),
    ("object store", "the nodes' object stores hold the rollouts of the jobs"),
    ("spilling", "no object store overflows to disk"),
    ("shared memory", "/dev/shm holds the object store, and has room"),
    ("disk", "there is room where Ray spills"),
    ("clocks", "the nodes' clocks agree with this machine's"),
    ("peers", "nobody waits for a job that is gone"),
    ("progress", "the jobs move; else, who waits for whom"),
    ("leases", "no live client has been silent for half of its lease"),
    ("durable store", "the durable stores take and give back, quickly"),
    ("quarantine", "no stored payload was found damaged"),
)
"""Every check: its name, and what is the case where it finds nothing."""

_CONNECTED = ("cluster", "token", "same versions")
_ASKED = (*_CONNECTED, "broker", "protocol")
NEEDS = {
    "token": ("cluster",),
    "same versions": ("cluster", "token"),
    **dict.fromkeys(("broker", "nodes"), _CONNECTED),
    **dict.fromkeys(("object store", "spilling", "shared memory", "disk", "clocks"), (*_CONNECTED, "nodes")),
    "protocol": (*_CONNECTED, "broker"),
    **dict.fromkeys(("vaults", "peers", "progress", "leases", "durable store", "quarantine"), _ASKED),
}
"""Check -> those without which it cannot be made."""

_CHILD = "import sys; from slime.cross_job.ops.doctor_child import main; main(sys.stdin.read())"


def diagnose(
    address: str | None,
    namespace: str,
    job_id: str | None = None,
    store: str | None = None,
    slime: str | None = None,
    timeout_s: float = 60.0,
) -> list[Finding]:
    """Make all checks, in the order of CHECKS; each gives one finding at least.

    Args:
        address: of the cluster, HOST:PORT as for ray.init (None: RAY_ADDRESS, or where this process is connected).
        job_id: the job to look at (None: every one that is not complete).
        store: URI of a durable store to try, besides those of the jobs.
        slime: folder of a checkout of slime (None: the one that is importable, if there is one).
        timeout_s: ends within it, with what was found until then. A cluster that hangs takes 15 s of it, a task on
            a node that hangs 15 s, a store that is away 5 s.
    """
    deadline = time.monotonic() + timeout_s
    ask = {
        "address": address or os.environ.get("RAY_ADDRESS") or _connected_to(),
        "namespace": namespace,
        "job_id": job_id,
        "store": store,
        "slime": slime,
    }
    found: list[Finding] = []
    with tempfile.NamedTemporaryFile(prefix="doctor-") as noise:
        ended = _run({**ask, "noise": noise.name}, noise, deadline, found)
        words = f"the time of {timeout_s:g} s was over"
        if ended is not None:
            words = f"doctor's own process ended with {ended}"
            last = _last_line(noise.name)
            words += f": {last}" if last and ended else ""
    return complete(found, words)


def complete(found: list[Finding], ended: str) -> list[Finding]:
    """In the order of CHECKS, and with a note for each check of which nothing is known: what it needed, or `ended`."""
    bad = {one.check: one for one in reversed(found) if one.severity == "error"}
    seen = {one.check for one in found}
    told = []
    for check, _ in CHECKS:
        told += [one for one in found if one.check == check]
        if check in seen:
            continue
        wanting = [need for need in NEEDS.get(check, ()) if need in bad]
        why = f"it needs what {wanting[0]!r} looks at, see there" if wanting else ended
        told.append(Finding(check, "note", f"not looked at: {why}"))
    return told


def _run(ask: dict[str, Any], noise: Any, deadline: float, found: list[Finding]) -> int | None:
    """Let the child find; its exit code, None where it was stopped at the deadline."""
    tells, told_by = os.pipe()
    ask |= {"tell": told_by, "until": deadline}  # of the machine's monotonic clock: its start takes of the time, too
    path = os.pathsep.join([os.path.abspath(entry) for entry in sys.path])  # noqa: PTH100  also of ''
    child = subprocess.Popen(
        [sys.executable, "-c", _CHILD],
        env={**os.environ, "PYTHONPATH": path},
        stdin=subprocess.PIPE,
        stdout=noise,
        stderr=noise,
        pass_fds=[told_by],
    )
    os.close(told_by)
    try:
        with contextlib.suppress(BrokenPipeError):  # it ended at once; its exit code says so
            assert child.stdin is not None
            child.stdin.write(json.dumps(ask).encode())  # not in argv, which `ps` shows: the store may have a password
            child.stdin.close()
        for line in _lines(tells, deadline):
            found.append(Finding(**json.loads(line)))
        with contextlib.suppress(subprocess.TimeoutExpired):
            return child.wait(max(0.0, min(5.0, deadline - time.monotonic())))
        return None
    finally:
        child.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # it hangs in the kernel: it ends when that lets go
            child.wait(1)


def _lines(tells: int, deadline: float) -> Iterator[bytes]:
    """Whole lines from a pipe, until it is closed or the deadline has passed."""
    rest = b""
    with selectors.DefaultSelector() as selector, os.fdopen(tells, "rb", buffering=0) as pipe:
        selector.register(pipe, selectors.EVENT_READ)
        while (left_s := deadline - time.monotonic()) > 0:
            if not selector.select(left_s):
                return
            data = pipe.read(1 << 16)
            if not data:
                return
            *lines, rest = (rest + data).split(b"\n")
            yield from lines


def _connected_to() -> str | None:
    import ray

    return ray.get_runtime_context().gcs_address if ray.is_initialized() else None


def _last_line(path: str) -> str:
    with open(path, errors="replace") as file:  # noqa: PTH123
        lines = [line.strip() for line in file if line.strip()]
    return lines[-1][:300] if lines else ""
