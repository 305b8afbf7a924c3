"""`doctor`: what is wrong with a cluster, its broker and its jobs, as seen from this machine; a finding for each.

Looking disturbs no run: no broker, vault or client is made, no lease is taken. A task without CPUs runs on each node
for a moment, and a durable store gets one small key, which is deleted.

A child process (__main__.py) makes the checks and prints each finding as a line of JSON. So `diagnose` ends within its
time whatever hangs (Ray, a network file system), with what was found until then, and connects this process to no
cluster. What was not looked at is said, with the reason.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass

from ...types import shortened

SEVERITIES = ("error", "warning", "note", "ok")
CHECKS = (
    "versions",  # Python, Ray, pyarrow and numpy of this process are among those that were tested
    "slime",  # the checkout of slime is patched, as it was applied, and at a tested commit
    "cluster",  # a Ray cluster answers at the address, lets this process in, and has its Ray and Python versions
    "nodes",  # every node that Ray counts as alive runs a task
    "spilling",  # no object store overflows to disk
    "shared memory",  # /dev/shm holds the object store, and has room
    "disk",  # there is room where Ray spills
    "clocks",  # the nodes' clocks agree with this machine's
    "broker",  # the namespace has a broker that answers, of our protocol; when it was restarted
    "vaults",  # every vault answers, and two of them keep the broker's memory
    "object store",  # the nodes' object stores hold the rollouts of the jobs
    "jobs",  # nobody waits for a job that is gone, no live client is silent, rollouts move
    "durable store",  # the durable stores take and give back, quickly
    "quarantine",  # no stored payload was found damaged
)
"""Every check, in the order in which they are told, and what is the case where it finds nothing."""
_OTHERS_NEED = ("cluster", "nodes", "broker")  # without which other checks cannot be made


@dataclass(frozen=True)
class Finding:
    """What one check found: `what` is the case, `why` it matters, what to `do`; `where`: the job, node or store."""

    check: str
    severity: str  # one of SEVERITIES; note: it was not looked at, or says something without being wrong
    what: str
    why: str = ""
    do: str = ""
    where: str = ""


def diagnose(
    address: str,
    namespace: str,
    job_id: str | None = None,
    store: str | None = None,
    slime: str | None = None,
    timeout_s: float = 60.0,
) -> list[Finding]:
    """Make all checks; each gives one finding at least, in the order of CHECKS.

    Args:
        address: of the cluster, HOST:PORT as for ray.init, or "auto".
        job_id: the job to look at (None: every one that is not complete).
        store: URI of a durable store to try, besides those of the jobs.
        slime: folder of a checkout of slime (None: the one that is importable, if there is one).
        timeout_s: ends within it, with what was found until then.
    """
    ask = {"address": address, "namespace": namespace, "job_id": job_id, "store": store, "slime": slime}
    path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)  # noqa: PTH100  also of ''
    ended = ""
    with tempfile.TemporaryFile() as told, tempfile.TemporaryFile() as log:
        command, env = [sys.executable, "-m", __name__], {**os.environ, "PYTHONPATH": path}
        child = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=told, stderr=log)
        try:
            child.communicate(json.dumps(ask).encode(), timeout_s)  # argv is shown by `ps`; this may hold a password
            if child.returncode:
                log.seek(0)
                last = log.read().decode(errors="replace").strip().rpartition("\n")[2]
                ended = f"doctor's own process ended with {child.returncode}: {shortened(last, 300)}"
        except subprocess.TimeoutExpired:
            ended = f"the time of {timeout_s:g} s was over"
        finally:
            child.kill()  # and is not waited for: it may hang in the kernel
        told.seek(0)
        return complete([Finding(**json.loads(line)) for line in told if line.endswith(b"\n")], ended)


def complete(found: list[Finding], ended: str) -> list[Finding]:
    """In the order of CHECKS, with one more for each that was not made: a note that names the check that it needs.
    Where the process `ended` before its time, in these words, the first of them is an error."""
    bad = next((one.check for one in found if one.severity == "error" and one.check in _OTHERS_NEED), "")
    why = f"not looked at: {ended or f'it needs what {bad!r} looks at, see there'}"
    made = {one.check for one in found}
    first = next((check for check in CHECKS if check not in made), "") if ended else ""
    found = found + [Finding(c, "error" if c == first else "note", why) for c in CHECKS if c not in made]
    return sorted(found, key=lambda one: CHECKS.index(one.check))
