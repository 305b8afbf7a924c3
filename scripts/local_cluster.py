"""A private Ray cluster on this machine, on loopback, for the demo, the tests and the benchmarks.

It has free ports and a temporary folder of its own, so that several live side by side. Every process of it, and of the
jobs submitted to it, inherits a marker in its environment; `stop` ends exactly those, and nothing else on the machine.
"""

import contextlib
import ctypes
import functools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

MARKER = "SLIME_CROSS_JOB_CLUSTER"
START_S = 90.0
_READY = "will now block forever"


class LocalCluster:
    """Start with `with LocalCluster() as cluster:`; `.address` is for ray.init, `.api` for Ray's job API.

    Args:
        num_cpus, num_gpus: logical CPUs and GPUs, so that both jobs of a small machine are scheduled.
        object_store_bytes: size of the object store.
        env: more environment variables for all processes of the cluster.
        outlives_us: leave it running when this process is killed (else it ends with us, even after SIGKILL).

    Raises:
        RuntimeError: Ray did not start; the message holds the end of its log.
    """

    ends_by = signal.SIGTERM  # the signal for the head when this process is killed

    def __init__(
        self,
        *,
        num_cpus: int = 8,
        num_gpus: int = 0,
        object_store_bytes: int = 500_000_000,
        env: dict[str, str] | None = None,
        outlives_us: bool = False,
    ):
        self._outlives_us = outlives_us
        self.marker = uuid.uuid4().hex
        self.env = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", MARKER)}
        self.env |= {
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # else a detached actor holds up the end for 30 s
            "AUTOSCALER_METRIC_PORT": "0",
            "DASHBOARD_METRIC_PORT": "0",
            MARKER: self.marker,
            **(env or {}),
        }
        self._args = [
            f"--num-cpus={num_cpus}",
            f"--num-gpus={num_gpus}",
            f"--object-store-memory={object_store_bytes}",
        ]
        self.folder = Path(tempfile.mkdtemp(prefix="xjob"))  # short: Ray puts sockets there, whose paths are limited
        self.address = ""
        self.api = ""
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "LocalCluster":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """The process to end, with SIGTERM, to end the cluster."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start, and wait until jobs can be submitted. Leaves nothing behind where that fails."""
        try:
            self._start()
        except BaseException:
            self.stop()
            raise

    def _start(self) -> None:
        client_port, agent_port = free_ports(2)
        log = self.folder / "start.log"
        command = [
            *(str(Path(sys.executable).with_name("ray")), "start", "--head", "--block"),
            "--node-ip-address=127.0.0.2",  # loopback too, but Ray replaces 127.0.0.1 by the machine's outer address
            *("--port=0", "--dashboard-port=0", "--dashboard-host=127.0.0.1", f"--temp-dir={self.folder}/ray"),
            *(f"--ray-client-server-port={client_port}", f"--dashboard-agent-listen-port={agent_port}"),
            *("--min-worker-port=0", "--max-worker-port=0"),  # the system's choice: two clusters never meet
            *("--disable-usage-stats", "--log-color=false", *self._args),
        ]
        with log.open("wb") as out:
            self._process = subprocess.Popen(
                command,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=None if self._outlives_us else functools.partial(end_with_parent, self.ends_by),
            )
        deadline = time.monotonic() + START_S
        while _READY not in (text := log.read_text(errors="replace")):
            if self._process.poll() is not None or time.monotonic() > deadline:
                state = "did not come up in time" if self._process.poll() is None else "ended"
                raise RuntimeError(f"the local Ray cluster {state}:\n{text[-2000:]}")
            time.sleep(0.1)
        self.address = (self.folder / "ray" / "ray_current_cluster").read_text().strip()
        found = re.search(r"ADDRESS='(http://[^']+)' ray job submit", text)
        if found is None:
            raise RuntimeError(f"the local Ray cluster has no dashboard, hence takes no jobs:\n{text[-2000:]}")
        self.api = found.group(1)

    def pids(self) -> list[int]:
        """Process ids of the cluster and of everything that runs in it.

        Ray's own processes overwrite their environment but keep the session of `ray start`; the drivers of submitted
        jobs have a session of their own but keep the environment.
        """
        return processes_of(self.marker, self._process.pid if self._process else -1)

    def kill(self) -> list[int]:
        """SIGKILL everything that runs in it, at once; the process ids that were there."""
        found = self.pids()
        for pid in found:
            with contextlib.suppress(ProcessLookupError):  # it went down with another
                os.kill(pid, signal.SIGKILL)
        return found

    def stop(self) -> None:
        """End all processes of the cluster, gently first, and remove its folder."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(15)
        gently = time.monotonic() + 3
        while self.pids() and time.monotonic() < gently:
            time.sleep(0.1)
        deadline = time.monotonic() + 15
        while self.kill() and time.monotonic() < deadline:
            time.sleep(0.1)
        if self._process is not None:
            self._process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def processes_of(marker: str, session: int) -> list[int]:
    """Ids of the living processes that have this marker, or are of this session; but for this one."""
    marked, found = f"{MARKER}={marker}".encode(), []
    for pid in (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()):
        with contextlib.suppress(OSError):
            ours = os.getsid(pid) == session or marked in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            alive = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
            if ours and alive and pid != os.getpid():
                found.append(pid)
    return found


def end_with_parent(by: int = signal.SIGTERM) -> None:
    """In the child: get signal `by` when the parent dies, whatever killed it (Linux)."""
    ctypes.CDLL(None).prctl(1, int(by))


def free_ports(count: int) -> list[int]:
    """Ports of the loopback that nobody listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]
    finally:
        for s in sockets:
            s.close()
