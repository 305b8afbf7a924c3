"""The cluster of a chaos run: a head for broker and drivers, a node for the sampler, one for the training ranks.

All on this machine's loopback, as separate raylets with separate addresses; nodes are killed and started again.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from local_cluster import (
    LocalCluster,
    command_of,
    end_with_parent,
    free_ports,
    is_alive,
    processes_of,
    tried,
    wait_started,
)
from tests.chaos.gcs import Head
from tests.support.patience import patient

QUICK = {  # a dead node is noticed in some 5 s, not in 30
    "RAY_health_check_initial_delay_ms": "5000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "4",
}


_STARTED = "Ray runtime started."


class Node:
    """A worker node, as `ray start --address` makes it, with one unit of the resource that it is named after."""

    def __init__(self, cluster: LocalCluster, name: str, ip: str):
        self._cluster, self.name, self._ip = cluster, name, ip
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        tried(self._start, self.end)

    def _start(self) -> None:
        agent_port, metrics_port = free_ports(2)  # else all nodes of a machine choose the same
        command = [
            *(str(Path(sys.executable).with_name("ray")), "start", "--block", f"--address={self._cluster.address}"),
            *(f"--node-ip-address={self._ip}", "--num-cpus=2", f'--resources={{"{self.name}": 1}}'),
            *(f"--dashboard-agent-listen-port={agent_port}", f"--metrics-export-port={metrics_port}"),
            *("--object-store-memory=150000000", "--min-worker-port=0", "--max-worker-port=0"),
            *("--disable-usage-stats", "--log-color=false"),
        ]
        log = self._cluster.folder / f"{self.name}.log"
        with log.open("wb") as out:
            self._process = subprocess.Popen(
                command,
                env=self._cluster.env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=end_with_parent,
            )

        def pids() -> list[int]:
            self._cluster.check()  # a node waits without end for a head that is gone
            return self._pids()

        # one after the other: two that start at once choose the same ports
        wait_started(self._process, pids, log, _STARTED, f"node {self.name}")

    def raylet(self) -> int:
        """Process id of its raylet. Raises LookupError when it has none."""
        for pid in self._pids():
            if command_of(pid)[0].endswith("/raylet"):
                return pid
        raise LookupError(f"node {self.name} has no raylet")

    def end(self) -> None:
        """Kill what is left of it."""
        if self._process is None:
            return
        for pid in self._pids():
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()

    def _pids(self) -> list[int]:
        """All of `ray start`'s session."""
        return processes_of("", self._process.pid) if self._process else []


class Cluster:
    """`with Cluster(env) as cluster:`; nodes by name in `.nodes`."""

    def __init__(self, env: dict[str, str]):
        self._env = env
        self._make()

    def _make(self) -> None:
        self.head = Head(object_store_bytes=150_000_000, env={**QUICK, **self._env})
        self.nodes = {
            name: Node(self.head, name, f"127.0.0.{number}") for number, name in enumerate(("rollout", "train"), 3)
        }

    def kill_and_begin_anew(self) -> int:
        """SIGKILL everything that runs in it, at once, and start another one; how many processes that was."""
        victims = self.head.kill()
        gone = wait_until(lambda: not any(map(is_alive, victims)), 20)
        assert gone, "processes of the cluster outlived SIGKILL"
        self.__exit__()
        self._make()
        self.__enter__()
        return len(victims)

    def __enter__(self) -> "Cluster":
        try:
            self.head.start()
            for node in self.nodes.values():
                node.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for node in self.nodes.values():
            node.end()
        with contextlib.suppress(AssertionError, ProcessLookupError):
            os.kill(self.head.pid, signal.SIGCONT)  # restart_gcs has stopped it
        self.head.stop()


def wait_until(condition: object, timeout_s: float, every_s: float = 0.05) -> bool:
    """Whether `condition()` became true in time."""
    assert callable(condition)
    deadline = time.monotonic() + patient(timeout_s)
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(every_s)
    return True
