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
from collections.abc import Callable
from pathlib import Path

MARKER = "SLIME_CROSS_JOB_CLUSTER"
CREDENTIALS = ("RAY_AUTH_", "RAY_USE_TLS", "RAY_TLS_")
"""How the names of those of Ray's variables begin that let a client into a cluster."""
SILENT_S = 90.0  # without work of any of its processes: it will not come up
START_S = 900.0  # for all of a start: an idle cluster always does a little
_TRIES = 3
_ANEW = "SLIME_CROSS_JOB_BEGUN_ANEW"
_READY = "will now block forever"
_LIBC = ctypes.CDLL(None)  # loaded before a fork: in a child of several threads it could wait for a lock without end


class NotStarted(RuntimeError):
    """Ray did not start; the message holds the end of its log."""


def forget_ray(keep: tuple[str, ...] = ()) -> None:
    """Take Ray's variables (RAY_...) out of this process's environment, but for those that begin with one of `keep`.

    They are about another cluster than the one that is used here: they would lead this process and its children there
    (RAY_ADDRESS), keep them out of their own (RAY_AUTH_MODE), or change how it works.
    """
    for name in [name for name in os.environ if name.startswith("RAY_") and not name.startswith(keep)]:
        del os.environ[name]
    if not keep:
        os.environ["RAY_AUTH_MODE"] = "disabled"  # else Ray asks for a token where the home directory holds one


def begin_without(keep: tuple[str, ...] = ()) -> None:
    """`forget_ray`; where that changes anything this process begins anew, as Ray looks at some when it is imported."""
    before = dict(os.environ)
    forget_ray(keep)
    if os.environ.pop(_ANEW, None) is None and os.environ != before:
        os.environ[_ANEW] = "1"  # once: importing ray sets some, too
        sys.stdout.flush()
        os.execv(sys.executable, sys.orig_argv)


def says_why(main: Callable[[], None]) -> Callable[[], None]:
    """A script's `main`: where Ray does not start, it ends with words on stderr and exit code 4."""

    @functools.wraps(main)
    def run() -> None:
        try:
            main()
        except NotStarted as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(4)

    return run


class LocalCluster:
    """Start with `with LocalCluster() as cluster:`; `.address` is for ray.init, `.api` for Ray's job API.

    Args:
        num_cpus, num_gpus: logical CPUs and GPUs, so that both jobs of a small machine are scheduled.
        object_store_bytes: size of the object store.
        env: more environment variables for all processes of the cluster. It gets none of ours that are Ray's.
        outlives_us: leave it running when this process is killed (else it ends with us, even after SIGKILL).

    Raises:
        NotStarted: Ray did not start. It may take long, up to START_S, as long as its processes do something.
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
        self.env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_") and k != MARKER}
        self.env |= {
            "RAY_AUTH_MODE": "disabled",
            "RAY_gcs_server_port_wait_time_s": "120",  # Ray's patience with itself; 30 s are not enough at a high load
            "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "300",  # 60 s
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
            tried(self._start, self._end)
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
        text = wait_started(self._process, self.pids, log, _READY, "the local Ray cluster")
        self.address = (self.folder / "ray" / "ray_current_cluster").read_text().strip()
        found = re.search(r"ADDRESS='(http://[^']+)' ray job submit", text)
        if found is None:
            raise NotStarted(f"the local Ray cluster has no dashboard, hence takes no jobs. Ray said:\n{text[-2000:]}")
        self.api = found.group(1)

    def check(self) -> None:
        """Raise NotStarted where its head has ended."""
        if self._process is None or self._process.poll() is not None:
            log = self.folder / "start.log"
            said = log.read_text(errors="replace")[-2000:].strip() if log.exists() else "nothing"
            raise NotStarted(
                f"the local Ray cluster at {self.address} has ended: its machine may be overloaded. Ray said:\n{said}"
            )

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
        self._end()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _end(self) -> None:
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


def processes_of(marker: str, session: int) -> list[int]:
    """Ids of the living processes that have this marker, or are of this session; but for this one."""
    import psutil  # here: who only prints how to start a cluster needs none

    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            ours = os.getsid(process.pid) == session or process.environ().get(MARKER) == marker
            if ours and process.status() != psutil.STATUS_ZOMBIE and process.pid != os.getpid():
                found.append(process.pid)
    return found


def is_alive(pid: int) -> bool:
    """Whether there is such a process; one that has ended, and of which its parent has not heard yet, is not alive."""
    import psutil

    with contextlib.suppress(psutil.Error):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def command_of(pid: int) -> list[str]:
    """Its command line, or the title that it gave itself; [""] where it has ended."""
    import psutil

    with contextlib.suppress(psutil.Error):
        return psutil.Process(pid).cmdline() or [""]
    return [""]


def tried(start: Callable[[], object], end: Callable[[], object]) -> None:
    """Let `start` start a node of Ray, and `end` it and start it again, _TRIES times in all, where the machine was too
    slow for the 30 s that Ray gives a node to come up, which cannot be changed. Raises NotStarted, as `start`."""
    for left in reversed(range(_TRIES)):
        try:
            start()
            return
        except NotStarted as error:
            if not left or "timed out during startup" not in str(error):
                raise
            end()


def wait_started(
    process: subprocess.Popen[bytes], pids: Callable[[], list[int]], log: Path, ready: str, what: str
) -> str:
    """Wait until `ray start` (`process`) has written `ready` to its log, as long as those of `pids()` do something.

    Returns what it wrote. Raises NotStarted where it has ended, nothing was done for SILENT_S, or it took START_S.
    """
    began = time.monotonic()
    done, since, looked = 0.0, began, 0.0
    while ready not in (text := log.read_text(errors="replace")):
        code = process.poll()
        if time.monotonic() - looked > SILENT_S / 90:
            before, done, looked = done, len(text) + cpu_s(pids()), time.monotonic()
            since = looked if done != before else since
        late, silent = time.monotonic() - began > START_S, time.monotonic() - since > SILENT_S
        if code is not None or silent or late:
            state = f"did nothing for {SILENT_S:g} s" if silent else f"was not ready after {START_S:g} s"
            state = state if code is None else f"ended with code {code}"
            raise NotStarted(f"{what} did not start: it {state}. Ray said:\n{text[-2000:].strip()}")
        time.sleep(0.1)
    return text


def cpu_s(pids: list[int]) -> float:
    """Seconds of processor time that those of these processes have taken that live."""
    import psutil

    taken_s = 0.0
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            times = psutil.Process(pid).cpu_times()
            taken_s += times.user + times.system
    return taken_s


def end_with_parent(by: int = signal.SIGTERM) -> None:
    """In the child: get signal `by` when the parent dies, whatever killed it (Linux)."""
    _LIBC.prctl(1, int(by))


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
